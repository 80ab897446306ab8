"""Run arguments and counters of the new checkpoint, as a Megatron MoE run saves them."""

import argparse
import copy
from typing import Any

from ep_plugin.checkpoint.adapt.optimizer_state import new_groups
from ep_plugin.checkpoint.adapt.upcycling import Upcycling
from ep_plugin.checkpoint.tensors import Source

# What goes along from the run that ends, beside its arguments.
KEPT = ("checkpoint_version", "iteration", "num_floating_point_operations_so_far")


def new_common(
    source: Source,
    args: argparse.Namespace,
    settings: Upcycling,
    frequency: int | list[int],
    optimizer: bool,
) -> dict[str, Any]:
    """Return what stands beside the tensors; random-number state belongs to the run that ends."""
    args, gates = copy.copy(args), settings.gates
    args.num_experts = settings.num_experts
    args.moe_router_topk = settings.topk
    args.moe_layer_freq = frequency
    args.moe_ffn_hidden_size = args.ffn_hidden_size // settings.granularity
    # What the sum of the gates rests on.
    args.moe_router_score_function = gates.score_function
    args.moe_router_pre_softmax = gates.pre_softmax
    args.moe_router_topk_scaling_factor = None
    if gates.scaling_factor != 1:
        args.moe_router_topk_scaling_factor = gates.scaling_factor
    if gates.num_groups is not None:
        args.moe_router_num_groups = gates.num_groups
        args.moe_router_group_topk = gates.group_topk
    if gates.expert_bias:
        args.moe_router_enable_expert_bias = True
    if settings.shared_expert != "none":
        args.moe_shared_expert_intermediate_size = args.ffn_hidden_size
    if settings.shared_expert == "learned":
        args.ep_shared_expert = "learned"
    args.no_save_optim, args.no_save_rng = not optimizer, True
    kept = {key: source.common[key] for key in KEPT if key in source.common}
    if optimizer:
        groups = source.common["optimizer"]
        two = settings.ep != 1
        kept["optimizer"] = new_groups(groups, args.add_bias_linear) if two else groups
        kept["opt_param_scheduler"] = source.common["opt_param_scheduler"]
    return {"args": args, **kept}
