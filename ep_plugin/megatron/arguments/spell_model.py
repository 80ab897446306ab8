"""A model as flags, from the arguments in its checkpoint: to print, and for `flags.txt`.

`spell.py` has those of a preset; `flags_file.py` writes and reads `flags.txt`. No torch.
"""

import argparse
import copy
from collections.abc import Mapping
from math import lcm
from typing import Any

from ep_plugin.checkpoint.moe_layers import pattern
from ep_plugin.megatron.arguments.table import TABLE
from ep_plugin.megatron.arguments.theirs import several
from ep_plugin.moe.rules import said

_VALUES = {  # flag -> argument, where it is set
    "--num-layers": "num_layers",
    "--hidden-size": "hidden_size",
    "--ffn-hidden-size": "ffn_hidden_size",
    "--num-attention-heads": "num_attention_heads",
    "--kv-channels": "kv_channels",
    "--max-position-embeddings": "max_position_embeddings",
    "--seq-length": "seq_length",
    "--padded-vocab-size": "padded_vocab_size",
    "--normalization": "normalization",
    "--norm-epsilon": "layernorm_epsilon",
    "--init-method-std": "init_method_std",
    "--position-embedding-type": "position_embedding_type",
    "--rotary-base": "rotary_base",
    "--window-size": "window_size",
    "--transformer-impl": "transformer_impl",
    "--ep-dense-activation": "ep_dense_activation",
    "--attention-dropout": "attention_dropout",
    "--hidden-dropout": "hidden_dropout",
}
# argument -> flags that count where it is set
_VALUES_WITH = {
    "group_query_attention": {"--num-query-groups": "num_query_groups"},
    "use_rope_scaling": {"--rope-scaling-factor": "rope_scaling_factor"},
    "use_mup": {
        "--mup-embedding-mult": "mup_embedding_mult",
        "--mup-output-mult": "mup_output_mult",
        "--mup-base-hidden-size": "mup_base_hidden_size",
        "--mup-base-head-dim": "mup_base_head_dim",
        "--mup-attn-scale-power": "mup_attn_scale_power",
    },
    "num_experts": {
        "--ep-expert-activation": "ep_expert_activation",
        "--ep-shared-expert": "ep_shared_expert",
        "--num-experts": "num_experts",
        "--moe-ffn-hidden-size": "moe_ffn_hidden_size",
        "--moe-layer-freq": "moe_layer_freq",
        "--moe-router-topk": "moe_router_topk",
        "--moe-router-score-function": "moe_router_score_function",
        "--moe-router-topk-scaling-factor": "moe_router_topk_scaling_factor",
        "--moe-router-num-groups": "moe_router_num_groups",
        "--moe-router-group-topk": "moe_router_group_topk",
        "--ep-group-score-topk": "ep_group_score_topk",
        "--moe-router-load-balancing-type": "moe_router_load_balancing_type",
        "--moe-aux-loss-coeff": "moe_aux_loss_coeff",
        "--ep-aux-loss-counts": "ep_aux_loss_counts",
        "--ep-aux-loss-layers": "ep_aux_loss_layers",
        "--moe-z-loss-coeff": "moe_z_loss_coeff",
        "--moe-input-jitter-eps": "moe_input_jitter_eps",
        "--moe-shared-expert-intermediate-size": "moe_shared_expert_intermediate_size",
        "--moe-token-dispatcher-type": "moe_token_dispatcher_type",
    },
    "multi_latent_attention": {
        "--q-lora-rank": "q_lora_rank",
        "--kv-lora-rank": "kv_lora_rank",
        "--qk-head-dim": "qk_head_dim",
        "--qk-pos-emb-head-dim": "qk_pos_emb_head_dim",
        "--v-head-dim": "v_head_dim",
        "--rope-type": "rope_type",
        "--rotary-scaling-factor": "rotary_scaling_factor",
        "--mscale": "mscale",
        "--mscale-all-dim": "mscale_all_dim",
    },
}
_SWITCHES = {  # flag -> argument, given when the argument is true
    "--swiglu": "swiglu",
    "--apply-layernorm-1p": "layernorm_zero_centered_gamma",
    "--use-mup": "use_mup",
    "--group-query-attention": "group_query_attention",
    "--add-qkv-bias": "add_qkv_bias",
    "--qk-layernorm": "qk_layernorm",
    "--untie-embeddings-and-output-weights": "untie_embeddings_and_output_weights",
    "--use-rope-scaling": "use_rope_scaling",
    "--multi-latent-attention": "multi_latent_attention",
    "--moe-router-pre-softmax": "moe_router_pre_softmax",
    "--moe-router-enable-expert-bias": "moe_router_enable_expert_bias",
    "--moe-shared-expert-gate": "moe_shared_expert_gate",
    "--bf16": "bf16",
    "--fp16": "fp16",
}
_MORE_SWITCHES = {  # in flags.txt alone, as all below
    "--squared-relu": "squared_relu",
    "--quick-geglu": "quick_geglu",
    "--openai-gelu": "openai_gelu",
    "--rotary-interleaved": "rotary_interleaved",
    "--apply-query-key-layer-scaling": "apply_query_key_layer_scaling",
    "--qk-l2-norm": "qk_l2_norm",
    "--apply-residual-connection-post-layernorm": "apply_residual_connection_post_layernorm",
}
PATTERN = "--hybrid-layer-pattern"
_OF_A_GPT = ("--num-layers", "--moe-layer-freq")  # the pattern of a HybridModel says them
# Megatron's default is 0.1; a checkpoint whose arguments do not say has none.
_DROPOUTS = ("--attention-dropout", "--hidden-dropout")
Defaults = Mapping[str, tuple[str, Any]]  # flag -> (argument, default)
_OTHERS: Defaults = {
    "--rotary-percent": ("rotary_percent", 1.0),
    "--rotary-seq-len-interpolation-factor": ("rotary_seq_len_interpolation_factor", None),
    "--softmax-type": ("softmax_type", "vanilla"),
    "--window-attn-skip-freq": ("window_attn_skip_freq", None),
    "--no-rope-freq": ("no_rope_freq", None),
    "--activation-func-clamp-value": ("activation_func_clamp_value", None),
    "--glu-linear-offset": ("glu_linear_offset", 0.0),
}
_YARN: Defaults = {  # of models without latent attention; Megatron 0.19 has the last ones
    "--rotary-scaling-factor": ("rotary_scaling_factor", 1.0),
    "--mscale": ("mscale", 1.0),
    "--mscale-all-dim": ("mscale_all_dim", 0.0),
    "--yarn-original-max-position-embeddings": ("yarn_original_max_position_embeddings", None),
    "--yarn-beta-fast": ("yarn_beta_fast", None),
    "--yarn-beta-slow": ("yarn_beta_slow", None),
}
_UNROUNDED = "--no-yarn-correction-range-round-to-int"
_OF_EXPERTS: Defaults = {
    "--moe-router-dtype": ("moe_router_dtype", None),
    "--moe-expert-capacity-factor": ("moe_expert_capacity_factor", None),
    "--moe-token-drop-policy": ("moe_token_drop_policy", "probs"),
}
_GROUPS = ("routing", "capacity", "losses", "experts")  # of the table, about the model
_OF_THE_RUN = ("--ep-gemm", "--ep-save")  # but for these
_SAID = {*_VALUES.values(), *_SWITCHES.values(), *_VALUES_WITH["num_experts"].values()}
_OURS: Defaults = {
    row.flag: (row.dest, row.default if row.kind else row.field_default)
    for row in TABLE
    if row.group in _GROUPS and row.flag not in _OF_THE_RUN and row.dest not in _SAID
}
# What a dense run's command line needs beside its own for experts made of it.
BESIDE_DENSE: Defaults = {
    "--num-experts": ("num_experts", None),
    "--moe-router-topk": ("moe_router_topk", None),
    "--moe-ffn-hidden-size": ("moe_ffn_hidden_size", None),
    "--moe-layer-freq": ("moe_layer_freq", 1),
    "--moe-router-score-function": ("moe_router_score_function", "softmax"),
    "--moe-router-pre-softmax": ("moe_router_pre_softmax", False),
    "--moe-router-topk-scaling-factor": ("moe_router_topk_scaling_factor", None),
    "--moe-router-num-groups": ("moe_router_num_groups", None),
    "--moe-router-group-topk": ("moe_router_group_topk", None),
    "--moe-router-enable-expert-bias": ("moe_router_enable_expert_bias", False),
    "--moe-router-load-balancing-type": ("moe_router_load_balancing_type", "aux_loss"),
    "--moe-aux-loss-coeff": ("moe_aux_loss_coeff", 0.0),
    "--ep-aux-loss-counts": ("ep_aux_loss_counts", None),
    "--moe-z-loss-coeff": ("moe_z_loss_coeff", 0.0),
    "--moe-shared-expert-intermediate-size": ("moe_shared_expert_intermediate_size", 0),
    "--ep-shared-expert": ("ep_shared_expert", "sum"),
}
# What a model can have and these flags do not say; None, 0 or empty in all others.
UNSAID = (
    *("mtp_num_layers", "mtp_hybrid_override_pattern", "hybrid_override_pattern"),
    *("spec", "heterogeneous_layers_config_path"),
    *("heterogeneous_layers_config_encoded_json", "moe_latent_size"),
    *("experimental_attention_variant", "attention_output_gate", "softmax_scale"),
    *("mrope_section", "original_max_position_embeddings", "beta_fast", "beta_slow"),
)
# Each flag that can describe a model -> whether a value follows it: ours, and those of Megatron's
# that are printed here.
LEGAL: Mapping[str, bool] = {
    **dict.fromkeys([*_VALUES, *(flag for more in _VALUES_WITH.values() for flag in more)], True),
    **dict.fromkeys([*_SWITCHES, *_MORE_SWITCHES, "--disable-bias-linear", _UNROUNDED], False),
    **dict.fromkeys([*_OTHERS, *_YARN, *_OF_EXPERTS, *_DROPOUTS, PATTERN], True),
    **{row.flag: row.default is not False for row in TABLE},
}


def model_flags(args: argparse.Namespace) -> list[str]:
    """Return the flags of a whole model, for a run that is told nothing else of it."""
    if getattr(args, "ep_further_losses", None):
        # The run noted them with Megatron's flags too, which then have the main loss alone here.
        args = copy.copy(args)
        for name in ("moe_router_load_balancing_type", "moe_aux_loss_coeff"):
            setattr(args, name, several(getattr(args, name))[0])
    flags = run_flags(args)
    flags += [flag for flag, name in _MORE_SWITCHES.items() if getattr(args, name, False)]
    flags += [word for flag in _DROPOUTS if flag not in flags for word in (flag, "0.0")]
    flags += where_other(args, _OTHERS) + _yarn(args)
    if getattr(args, "num_experts", None):
        flags += where_other(args, {**_OF_EXPERTS, **_OURS})
    return flags


def _yarn(args: argparse.Namespace) -> list[str]:
    latent = getattr(args, "multi_latent_attention", False)
    if latent or getattr(args, "position_embedding_type", None) != "yarn":
        return []
    rounded = getattr(args, "yarn_correction_range_round_to_int", None)
    return where_other(args, _YARN) + ([_UNROUNDED] if rounded is False else [])


def run_flags(args: argparse.Namespace) -> list[str]:
    """Return the flags of a model with these arguments; data and optimizer are the user's."""
    args = copy.copy(args)
    if getattr(args, "padded_vocab_size", None) is not None:
        args.padded_vocab_size = padded_vocabulary(args)
    flags = [] if args.add_bias_linear else ["--disable-bias-linear"]
    flags += [flag for flag, name in _SWITCHES.items() if getattr(args, name, False)]
    values = dict(_VALUES)
    for condition, more in _VALUES_WITH.items():
        if getattr(args, condition, None):
            values |= more
    if getattr(args, "hybrid_layer_pattern", None):
        for flag in _OF_A_GPT:
            values.pop(flag, None)
        values = {PATTERN: "hybrid_layer_pattern", **values}
    for flag, name in values.items():
        value = getattr(args, name, None)
        if value is not None:
            flags += [flag, *words_of(value)]
    return flags


def where_other(args: argparse.Namespace, defaults: Defaults) -> list[str]:
    """Return the flags of those arguments that are set, and to something else than the default."""
    flags = []
    for flag, (name, default) in defaults.items():
        value = getattr(args, name, None)
        if value not in (None, default):
            flags += [flag] if flag in _SWITCHES else [flag, *words_of(value)]
    return flags


def padded_vocabulary(args: argparse.Namespace) -> int:
    """Return the number of rows, at least those there are, that each tensor-parallel size divides
    which divides what else is cut: heads, groups of them, and the channels of dense blocks."""
    cut = [args.num_attention_heads, getattr(args, "moe_shared_expert_intermediate_size", 0) or 0]
    if not all(pattern(args)):
        cut.append(args.ffn_hidden_size)
    grouped = getattr(args, "group_query_attention", False)
    groups = args.num_query_groups if grouped else args.num_attention_heads
    sizes = [
        tp
        for tp in range(1, args.num_attention_heads + 1)
        if not any(size % tp for size in cut) and 0 in (groups % tp, tp % groups)
    ]
    rows = int(args.padded_vocab_size)
    return -(-rows // lcm(*sizes)) * lcm(*sizes)


def words_of(value: object) -> list[str]:
    """Return an argument as a command line has it; several balancing losses are several words."""
    if isinstance(value, bool | tuple):
        return [said(value)]
    if isinstance(value, list) and not all(isinstance(entry, int) for entry in value):
        return [str(entry) for entry in value]
    return [str(value).replace(" ", "")]
