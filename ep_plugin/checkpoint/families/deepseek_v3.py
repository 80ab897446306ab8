"""DeepSeek-V3: latent attention, first layers dense, experts chosen by sigmoid scores with a bias.

Groups of experts are ranked by the sum of their best two scores. Megatron has one epsilon for all
norms, transformers 1e-6 for those of the latents. The layer for multi-token
prediction behind the last one, which transformers does not read, is left out.
"""

import argparse
from typing import Any

from ep_plugin.checkpoint.families import _deepseek
from ep_plugin.checkpoint.family import Config, Family, Row
from ep_plugin.errors import ConfigError


def _to_args(config: Config) -> dict[str, Any]:
    if not config.get("norm_topk_prob", True):
        raise ConfigError(
            "config.json has norm_topk_prob = false; Megatron divides sigmoid scores by their sum; "
            "give a model with true"
        )
    topk, groups, best = (config[k] for k in ("num_experts_per_tok", "n_group", "topk_group"))
    return {
        **_deepseek.latent_args(config),
        **_deepseek.group_args(topk, groups, best, each=2),
        "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
    }


def _to_config(args: argparse.Namespace) -> Config:
    _deepseek.check_groups(args, each=2)
    groups, best = args.moe_router_num_groups or 1, args.moe_router_group_topk or 1
    routing = {"n_group": groups, "topk_group": best, "norm_topk_prob": True}
    scale = args.moe_router_topk_scaling_factor or 1.0
    return _deepseek.latent_config(args) | routing | {"routed_scaling_factor": scale}


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
