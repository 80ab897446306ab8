"""DeepSeek-V2: latent attention, first layers dense, experts chosen by softmax over all of them.

Neither published size fits Megatron's GPT. The 236B model ranks groups of experts by their best
score and takes two experts from each; Megatron would rank them by the sum of two, so `topk_method`
must be greedy here, or one expert a group. V2-Lite has no latent of queries; Megatron then puts a
norm on what queries are made from, which that model lacks.
"""

import argparse
from typing import Any

from ep_plugin.config import ConfigError
from ep_plugin.convert.families import _deepseek
from ep_plugin.convert.family import Config, Family


def _to_args(config: Config) -> dict[str, Any]:
    groups, best, topk = None, None, config["num_experts_per_tok"]
    if config.get("topk_method", "greedy") != "greedy":
        groups, best = config["n_group"], config["topk_group"]
        _check_groups(topk, groups, best)
    return _deepseek.latent_args(config) | {
        "moe_router_pre_softmax": True,
        "moe_router_num_groups": groups,
        "moe_router_group_topk": best,
        "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
    }


def _to_config(args: argparse.Namespace) -> Config:
    groups, best = args.moe_router_num_groups, args.moe_router_group_topk
    if groups:
        _check_groups(args.moe_router_topk, groups, best)
    routing = {
        "topk_method": "group_limited_greedy" if groups else "greedy",
        "n_group": groups or 1,
        "topk_group": best or 1,
        "norm_topk_prob": False,
    }
    scale = args.moe_router_topk_scaling_factor or 1.0
    return _deepseek.latent_config(args) | routing | {"routed_scaling_factor": scale}


def _check_groups(topk: int, groups: int, best: int) -> None:
    if groups != best and topk // best != 1:
        raise ConfigError(
            f"group_limited_greedy with {best} of {groups} groups for {topk} experts: Megatron "
            f"ranks groups by their best {topk // best} scores, DeepSeek-V2 by the best one; "
            "topk_method = greedy would do"
        )


FAMILY = Family(
    model_type="deepseek_v2",
    moe=True,
    architecture="DeepseekV2ForCausalLM",
    rows=_deepseek.ROWS,
    fixed=_deepseek.fixed("softmax", expert_bias=False) | {"moe_router_pre_softmax": True},
    fields=_deepseek.FIELDS,
    to_args=_to_args,
    to_config=_to_config,
    defaults=_deepseek.DEFAULTS,
)
