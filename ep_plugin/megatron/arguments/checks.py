"""Megatron's arguments: what ours mean, and every check that needs no communication."""

from dataclasses import fields
from typing import Any

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.parser import BLOCK, KINDS, ROUTING, automatic
from ep_plugin.megatron.arguments.supported import check_supported
from ep_plugin.megatron.seams import touchpoints
from ep_plugin.megatron.settings import (
    SCOPES,
    EdgeSettings,
    moe_pattern,
    overlap_schedule,
    ranks_per_node,
    routing_config,
)
from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.parallel import ParallelConfig, check_experts_over_ranks
from ep_plugin.moe.routing_config import RoutingConfig
from ep_plugin.registry import available, resolve


def settings_from_args(args: Any) -> EdgeSettings:
    """Return the `--ep-*` settings; raises ConfigError for a name that is no option.

    What Megatron acts on itself is written into its arguments: the type of the load-balancing loss
    (it starts a global one anew after each step), pre-softmax (it refuses top-1 without), and the
    schedule that `--ep-overlap two_batch` names.
    """
    chosen = {kind: getattr(args, f"ep_{kind}") for kind, _, _ in KINDS}
    for kind, name in chosen.items():
        _check_option(kind, name)
    names = [f.name for f in fields(RoutingConfig) if ROUTING[f.name][0] is None]
    routing = {name: getattr(args, f"ep_{name}") for name in names}
    routing = {name: value for name, value in routing.items() if value is not None}
    if "aux_loss_scope" in routing:
        args.moe_router_load_balancing_type = SCOPES[routing["aux_loss_scope"]]
    if routing.get("normalize") in ("none", "after_drop"):
        args.moe_router_pre_softmax = True
    elif "normalize" in routing and args.moe_router_pre_softmax:
        raise ConfigError(
            f"--ep-normalize ({routing['normalize']}) and --moe-router-pre-softmax contradict each "
            "other; leave one of them out"
        )
    if chosen["overlap"] == "two_batch":
        args.overlap_moe_expert_parallel_comm = True
    return EdgeSettings(
        **chosen,
        routing=routing,
        experts_per_layer=args.ep_experts_per_layer,
        metrics=bool(args.tensorboard_dir or args.wandb_project),
        **{name: getattr(args, f"ep_{name}") for name in BLOCK},
    )


def _check_option(kind: str, name: str) -> None:
    if name in automatic(kind):
        return
    if "." not in name and name not in available(kind):
        legal = ", ".join((*automatic(kind), *available(kind)))
        raise ConfigError(f"--ep-{kind} must be one of {legal}; got {name!r}")
    resolve(kind, name)


def check_arguments(args: Any, settings: EdgeSettings) -> None:
    """Raise ConfigError for a layout or a pattern that cannot work, before Megatron looks at it."""
    parallel = ParallelConfig(
        world_size=args.world_size,
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        cp=args.context_parallel_size,
        ep=args.expert_model_parallel_size,
        etp=args.expert_tensor_parallel_size,
        order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
    )
    if args.ep_audit_save and args.ckpt_format != "torch_dist":
        raise ConfigError(
            f"--ep-audit-save reads --ckpt-format torch_dist; got {args.ckpt_format}; use "
            "torch_dist, or no --ep-audit-save"
        )
    if args.num_experts is None:
        if parallel.ep > 1:
            raise ConfigError(
                f"--expert-model-parallel-size ({parallel.ep}) needs experts; use "
                f"--num-experts {parallel.ep}"
            )
        return
    pattern = args.moe_layer_freq
    if isinstance(pattern, list) and len(pattern) != args.num_layers:
        example = ([0, 1] * args.num_layers)[: args.num_layers]
        raise ConfigError(
            f"--moe-layer-freq must have one entry per layer, --num-layers ({args.num_layers}); "
            f"got {len(pattern)} entries: {pattern}; use {example}"
        )
    check_supported(args)
    ranks_per_node(settings)
    if overlap_schedule(args, settings) == "two_batch":
        _check_combined_schedule()
    routing = routing_config(args, settings)
    for num_experts in _experts(args, settings):
        check_experts_over_ranks(num_experts, parallel.ep)
        MoEConfig(
            hidden_size=1,
            ffn_hidden_size=1,
            num_experts=num_experts,
            routing=routing,
            router=settings.router,
        )
    if settings.shared_expert == "learned" and not args.moe_shared_expert_intermediate_size:
        raise ConfigError(
            "--ep-shared-expert learned weighs a shared expert, and there is none; use "
            "--moe-shared-expert-intermediate-size SIZE"
        )


def _experts(args: Any, settings: EdgeSettings) -> tuple[int, ...]:
    """Return the numbers of experts that layers have."""
    per_layer = settings.experts_per_layer
    if per_layer is None:
        return (args.num_experts,)
    num_moe_layers = sum(moe_pattern(args))
    if not isinstance(args.moe_layer_freq, list):
        raise ConfigError(
            f"--ep-experts-per-layer needs --moe-layer-freq as a list, so that Megatron saves each "
            f"layer under its own name; got {args.moe_layer_freq}; use "
            f"--moe-layer-freq '{[1] * args.num_layers}'"
        )
    if len(per_layer) != num_moe_layers or max(per_layer) != args.num_experts:
        raise ConfigError(
            f"--ep-experts-per-layer must have one entry per MoE layer ({num_moe_layers}) with "
            f"--num-experts ({args.num_experts}) the largest; got {per_layer}; use "
            f"{args.num_experts}*{num_moe_layers}"
        )
    return per_layer


def _check_combined_schedule() -> None:
    """Raise ConfigError for a Megatron whose schedule for two micro-batches is not ours to run."""
    version = touchpoints.installed_version()
    if not touchpoints.release_for(version).COMBINED_1F1B:
        raise ConfigError(
            "--overlap-moe-expert-parallel-comm is tested with megatron-core 0.19 alone; got "
            f"{version}; use --ep-overlap chunked"
        )
