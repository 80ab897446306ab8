"""What DeepSeek-V2 and V3 share: latent attention, dense layers first, shared experts."""

import argparse
from typing import Any

from ep_plugin.checkpoint.config_keys import Keys, refusal
from ep_plugin.checkpoint.families import _config, _rows
from ep_plugin.checkpoint.families._rope import kind, rope_args
from ep_plugin.checkpoint.family import Config
from ep_plugin.checkpoint.moe_layers import moe_layers
from ep_plugin.checkpoint.router_losses import each_layer_args, each_layer_config
from ep_plugin.errors import ConfigError

ROWS = (
    *(_rows.EMBEDDING + _rows.LATENT_ATTENTION + _rows.DENSE + _rows.MOE_NORM),
    *(_rows.ROUTER, *_rows.EXPERTS),
    *_rows.feed_forward("mlp.shared_experts.", "mlp.shared_experts.", _rows.SHARED, "moe"),
)
FIELDS = _config.MOE_FIELDS | {
    "n_routed_experts": "num_experts",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
}
DEFAULTS = _config.DEFAULTS | {
    "q_lora_rank": 1536,
    "rms_norm_eps": 1e-6,
    "aux_loss_alpha": 0.0,  # transformers has no such loss
    "seq_aux": True,
}
_LATENT_EPSILON = 1e-6
_YARN = {  # key of config.json -> argument
    "factor": "rotary_scaling_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
# Megatron has no flag for these beside latent attention: those of --yarn-* are for other models.
_YARN_FIXED = {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}


def fixed(score_function: str, expert_bias: bool) -> dict[str, Any]:
    """Return the arguments that all models of one generation share."""
    values = _config.with_shared_expert(
        multi_latent_attention=True,
        qk_layernorm=True,
        window_size=None,
        moe_router_score_function=score_function,
        moe_router_enable_expert_bias=expert_bias,
    )
    return {name: value for name, value in values.items() if name != "moe_router_num_groups"}


def group_args(topk: int, groups: int, best: int, each: int) -> dict[str, Any]:
    """Return the arguments of a choice in `best` groups, ranked by the sum of `each` scores.

    Megatron sums `topk // best` of them; another number is a setting of ours alone.
    """
    megatrons = groups == best or each * best == topk
    return {
        "moe_router_num_groups": groups,
        "moe_router_group_topk": best,
        "ep_group_score_topk": None if megatrons else each,
    }


def check_groups(args: argparse.Namespace, each: int) -> None:
    """Raise ConfigError where groups are left out and not ranked by the sum of `each` scores."""
    groups, best = args.moe_router_num_groups or 1, args.moe_router_group_topk or 1
    found = getattr(args, "ep_group_score_topk", None) or args.moe_router_topk // best
    if groups != best and found != each:
        raise ConfigError(
            f"{best} of {groups} groups for {args.moe_router_topk} experts are ranked by their "
            f"best {found} scores, this family's by their best {each}; "
            f"give a model trained with --ep-group-score-topk {each}"
        )


def latent_args(config: Keys) -> dict[str, Any]:
    """Return the arguments of attention, layers, shared experts and losses."""
    if config["rms_norm_eps"] != _LATENT_EPSILON:
        raise refusal(
            config, "rms_norm_eps", f"{_LATENT_EPSILON}: Megatron has one epsilon for all norms"
        )
    if not config.get("q_lora_rank"):
        raise ConfigError(
            "config.json has no q_lora_rank; Megatron has no norm for the latents of keys and "
            "values without one for queries, which this model lacks; give a model "
            "with a q_lora_rank"
        )
    heads = config["num_attention_heads"]
    if config.get("num_key_value_heads", heads) != heads:
        raise refusal(config, "num_key_value_heads", f"num_attention_heads ({heads}) of them")
    _config.refuse(config, "moe_layer_freq", 1)
    parts = {"head_dim": ["qk_rope_head_dim"]}
    parts["qk_head_dim"] = ["qk_nope_head_dim", "qk_rope_head_dim"]
    for key, summed in parts.items():
        legal = sum(config[part] for part in summed)
        if config.get(key, legal) != legal:
            raise refusal(config, key, f"{' + '.join(summed)} ({legal})")
    first, layers = config.number("first_k_dense_replace", whole=True), config["num_hidden_layers"]
    if not 0 <= first < layers:
        raise refusal(config, "first_k_dense_replace", f"a number from 0 to {layers - 1}")
    shared = config.number("n_shared_experts", whole=True)
    if shared < 1:
        raise refusal(config, "n_shared_experts", "at least 1")
    return {
        **_config.decoder_args(config),
        **_rope_args(config),
        **each_layer_args(config),
        "group_query_attention": False,
        "num_query_groups": None,
        "kv_channels": config["v_head_dim"],
        "moe_layer_freq": [0] * first + [1] * (layers - first) if first else 1,
        "moe_shared_expert_intermediate_size": shared * config["moe_intermediate_size"],
        "moe_router_topk_scaling_factor": config.number("routed_scaling_factor"),
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
    }


def groups_of(config: Keys) -> tuple[int, int, int]:
    """Return experts of a token, groups, and groups of a token."""
    topk, groups, best = (
        config.number(key, whole=True) for key in ("num_experts_per_tok", "n_group", "topk_group")
    )
    if not 1 <= best <= groups or config["n_routed_experts"] % groups:
        raise refusal(config, "n_group", "a divisor of n_routed_experts, at least topk_group")
    return topk, groups, best


def latent_config(args: argparse.Namespace) -> Config:
    """Return what `latent_args` read."""
    _config.check_normalize(args)
    if args.layernorm_epsilon != _LATENT_EPSILON:
        raise ConfigError(
            f"layernorm_epsilon is {args.layernorm_epsilon}, and DeepSeek has {_LATENT_EPSILON} in "
            "the norms of its latents; give a model trained with "
            f"--norm-epsilon {_LATENT_EPSILON}"
        )
    chosen = moe_layers(args.moe_layer_freq, args.num_layers)
    first = chosen.index(True)
    if not all(chosen[first:]):
        raise ConfigError(
            f"DeepSeek has dense layers before its MoE layers, none after; moe_layer_freq is "
            f"{args.moe_layer_freq}; use another --family"
        )
    shared = args.moe_shared_expert_intermediate_size
    if not shared or shared % args.moe_ffn_hidden_size:
        raise ConfigError(
            f"the shared expert's size ({shared}) must be a multiple of an expert's "
            f"({args.moe_ffn_hidden_size}); use another --family"
        )
    return {
        **_config.decoder_config(args),
        **_rope_config(args),
        **each_layer_config(args),
        "num_key_value_heads": args.num_attention_heads,
        "first_k_dense_replace": first,
        "n_shared_experts": shared // args.moe_ffn_hidden_size,
    }


def _rope_args(config: Keys) -> dict[str, Any]:
    values, settings = rope_args(config, yarn=True)
    if kind(settings) != "yarn":
        return values | {"rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale_all_dim": 0.0}
    for key, legal in _YARN_FIXED.items():
        default = config["max_position_embeddings"] if key.startswith("original") else legal
        if settings.get(key, default) != legal:
            raise refusal(settings, key, f"{legal}, which Megatron has no flag for")
    _config.refuse(settings, "truncate", True)
    both = settings.get("mscale", 0), settings.get("mscale_all_dim", 0)
    if not both[1]:  # then transformers does not look at mscale either
        both = 1.0, 0.0
    elif not both[0]:
        raise refusal(settings, "mscale", "mscale beside mscale_all_dim")
    scales = dict(zip(("mscale", "mscale_all_dim"), both, strict=True))
    return values | {
        "rope_type": "yarn",
        "rotary_scaling_factor": settings.number("factor"),
        **scales,
    }


def _rope_config(args: argparse.Namespace) -> Config:
    if args.rope_type != "yarn":
        return {}
    values = {key: getattr(args, name) for key, name in _YARN.items()}
    for key, usual in _YARN_FIXED.items():  # a script may set them
        value = getattr(args, key, None)
        values[key] = usual if value is None else value
    return {"rope_scaling": {"rope_type": "yarn", **values}}
