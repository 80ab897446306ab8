"""The run arguments of a checkpoint as flags."""

import argparse
import copy
from math import lcm

from ep_plugin.checkpoint.moe_layers import pattern
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


def printed_flags() -> dict[str, bool]:
    """Return each flag that `run_flags` can print -> whether a value follows it."""
    switches = dict.fromkeys([*_SWITCHES, "--disable-bias-linear"], False)
    more = [flag for flags in _VALUES_WITH.values() for flag in flags]
    return dict.fromkeys([*_VALUES, *more], True) | switches


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
    for flag, name in values.items():
        value = getattr(args, name, None)
        if value is not None:
            flags += [flag, *words_of(value)]
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
    if isinstance(value, tuple):
        return [said(value)]
    if isinstance(value, list) and not all(isinstance(entry, int) for entry in value):
        return [str(entry) for entry in value]
    return [str(value).replace(" ", "")]


def experts_flags(args: argparse.Namespace) -> list[str]:
    """Return the flags that a dense run's command line needs beside its own for these experts."""
    flags = ["--num-experts", str(args.num_experts), "--moe-router-topk", str(args.moe_router_topk)]
    flags += ["--moe-ffn-hidden-size", str(args.moe_ffn_hidden_size)]
    if args.moe_layer_freq != 1:
        flags += ["--moe-layer-freq", str(args.moe_layer_freq).replace(" ", "")]
    if args.moe_router_score_function != "softmax":
        flags += ["--moe-router-score-function", args.moe_router_score_function]
    if args.moe_router_pre_softmax:
        flags += ["--moe-router-pre-softmax"]
    if args.moe_router_topk_scaling_factor is not None:
        flags += ["--moe-router-topk-scaling-factor", str(args.moe_router_topk_scaling_factor)]
    if getattr(args, "moe_router_num_groups", None) is not None:
        flags += ["--moe-router-num-groups", str(args.moe_router_num_groups)]
        flags += ["--moe-router-group-topk", str(args.moe_router_group_topk)]
    if getattr(args, "moe_router_enable_expert_bias", False):
        flags += ["--moe-router-enable-expert-bias"]
    if args.moe_router_load_balancing_type != "aux_loss":  # Megatron's default
        flags += ["--moe-router-load-balancing-type", args.moe_router_load_balancing_type]
    if args.moe_router_load_balancing_type != "none":
        flags += ["--moe-aux-loss-coeff", str(args.moe_aux_loss_coeff)]
    if getattr(args, "ep_aux_loss_counts", None):
        flags += ["--ep-aux-loss-counts", args.ep_aux_loss_counts]
    if getattr(args, "moe_z_loss_coeff", None):
        flags += ["--moe-z-loss-coeff", str(args.moe_z_loss_coeff)]
    if getattr(args, "moe_shared_expert_intermediate_size", None):
        shared = str(args.moe_shared_expert_intermediate_size)
        flags += ["--moe-shared-expert-intermediate-size", shared]
    if getattr(args, "ep_shared_expert", None) == "learned":
        flags += ["--ep-shared-expert", "learned"]
    return flags
