"""DeepSeek-V3: latent attention, first layers dense, experts chosen by sigmoid scores with a bias.

Groups of experts are ranked by the sum of their best two scores. Megatron has one epsilon for all
norms, transformers 1e-6 for those of the latents. The layer for multi-token
prediction behind the last one, which transformers does not read, is left out.
"""

import argparse
from typing import Any

from ep_plugin.checkpoint.config_keys import Keys
from ep_plugin.checkpoint.families import _config, _deepseek
from ep_plugin.checkpoint.family import Config, Family, Row


def _read(config: Keys) -> dict[str, Any]:
    _config.refuse(config, "norm_topk_prob", True)  # Megatron divides sigmoid scores by their sum
    _config.refuse(config, "scoring_func", "sigmoid")
    _config.refuse(config, "topk_method", "noaux_tc")
    _config.refuse(config, "rope_interleave", True)
    groups = _deepseek.group_args(*_deepseek.groups_of(config), each=2)
    return {**_deepseek.latent_args(config), **groups}


def _to_config(args: argparse.Namespace) -> Config:
    _deepseek.check_groups(args, each=2)
    groups, best = args.moe_router_num_groups or 1, args.moe_router_group_topk or 1
    routing = {"n_group": groups, "topk_group": best, "norm_topk_prob": True}
    routing["rope_interleave"] = True
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
            ("num_experts",),
            layers="moe",
        ),
    ),
    fixed=_deepseek.fixed("sigmoid", expert_bias=True),
    fields=_deepseek.FIELDS,
    read=_read,
    to_config=_to_config,
    defaults=_deepseek.DEFAULTS
    | {
        "num_key_value_heads": 128,
        "first_k_dense_replace": 3,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
    },
    balancing="of a layer",
)
