"""DeepSeek-V2: latent attention, first layers dense, experts chosen by softmax over all of them.

The 236B model ranks groups of experts by their best score and takes two experts from each, which
only our router does (`--ep-group-score-topk 1`). V2-Lite has no latent of queries; Megatron then
puts a norm on what queries are made from, which that model lacks, so it is refused.
"""

import argparse
from typing import Any

from ep_plugin.checkpoint.config_keys import Keys, refusal
from ep_plugin.checkpoint.families import _config, _deepseek
from ep_plugin.checkpoint.family import Config, Family


def _read(config: Keys) -> dict[str, Any]:
    groups: dict[str, Any] = {"moe_router_num_groups": None, "moe_router_group_topk": None}
    method = config.get("topk_method", "greedy")
    if method == "group_limited_greedy":
        groups = _deepseek.group_args(*_deepseek.groups_of(config), each=1)
    elif method == "greedy":
        config.passed_over("n_group", "topk_group")
    else:
        raise refusal(config, "topk_method", "'greedy' or 'group_limited_greedy'")
    _config.refuse(config, "scoring_func", "softmax")
    _config.refuse(config, "norm_topk_prob", False)  # transformers does not look at it
    return {**_deepseek.latent_args(config), **groups, "moe_router_pre_softmax": True}


def _to_config(args: argparse.Namespace) -> Config:
    groups = args.moe_router_num_groups
    if groups:
        _deepseek.check_groups(args, each=1)
    routing = {
        "topk_method": "group_limited_greedy" if groups else "greedy",
        "n_group": groups or 1,
        "topk_group": args.moe_router_group_topk or 1,
        "norm_topk_prob": False,
    }
    scale = args.moe_router_topk_scaling_factor or 1.0
    return _deepseek.latent_config(args) | routing | {"routed_scaling_factor": scale}


FAMILY = Family(
    model_type="deepseek_v2",
    moe=True,
    architecture="DeepseekV2ForCausalLM",
    rows=_deepseek.ROWS,
    fixed=_deepseek.fixed("softmax", expert_bias=False) | {"moe_router_pre_softmax": True},
    fields=_deepseek.FIELDS,
    read=_read,
    to_config=_to_config,
    defaults=_deepseek.DEFAULTS
    | {"first_k_dense_replace": 0, "n_shared_experts": 2, "routed_scaling_factor": 1.0},
    balancing="of a layer",
)
