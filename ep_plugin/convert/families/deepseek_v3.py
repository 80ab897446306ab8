"""DeepSeek-V3: latent attention, first layers dense, experts chosen by sigmoid scores with a bias.

Megatron ranks groups of experts by the sum of their best `topk // group_topk` scores, DeepSeek-V3
by the sum of their best two; so that number must be 2, unless no group is left out. Megatron has
one epsilon for all norms, transformers 1e-6 for those of the latents. The layer for multi-token
prediction behind the last one, which transformers does not read, is left out.
"""

import argparse
from typing import Any

from ep_plugin.config import ConfigError
from ep_plugin.convert.families import _deepseek
from ep_plugin.convert.family import Config, Family, Row


def _to_args(config: Config) -> dict[str, Any]:
    if not config.get("norm_topk_prob", True):
        raise ConfigError(
            "config.json has norm_topk_prob = false; Megatron divides sigmoid scores by their sum; "
            "true would do"
        )
    _check_groups(config["num_experts_per_tok"], config["n_group"], config["topk_group"])
    return _deepseek.latent_args(config) | {
        "moe_router_num_groups": config["n_group"],
        "moe_router_group_topk": config["topk_group"],
        "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
    }


def _to_config(args: argparse.Namespace) -> Config:
    groups, best = args.moe_router_num_groups or 1, args.moe_router_group_topk or 1
    _check_groups(args.moe_router_topk, groups, best)
    routing = {"n_group": groups, "topk_group": best, "norm_topk_prob": True}
    scale = args.moe_router_topk_scaling_factor or 1.0
    return _deepseek.latent_config(args) | routing | {"routed_scaling_factor": scale}


def _check_groups(topk: int, groups: int, best: int) -> None:
    if groups != best and topk // best != 2:
        raise ConfigError(
            f"{best} of {groups} groups for {topk} experts: Megatron ranks groups by their best "
            f"{topk // best} scores, DeepSeek-V3 by their best 2; {2 * best} experts would do"
        )


FAMILY = Family(
    model_type="deepseek_v3",
    moe=True,
    architecture="DeepseekV3ForCausalLM",
    rows=(
        *_deepseek.ROWS,
        Row(
            "model.layers.{layer}.mlp.gate.e_score_correction_bias",
            "decoder.layers.{layer}.mlp.router.expert_bias",
            layers="moe",
        ),
    ),
    fixed=_deepseek.fixed("sigmoid", expert_bias=True),
    fields=_deepseek.FIELDS,
    to_args=_to_args,
    to_config=_to_config,
    defaults=_deepseek.DEFAULTS,
)
