"""Settings as flags: of a preset, and of a run whose arguments a checkpoint has."""

import argparse
from dataclasses import fields
from itertools import groupby
from typing import Any

from ep_plugin.megatron.arguments.table import BY_NAME, SCOPES, SWITCHES
from ep_plugin.moe.routing_config import RoutingConfig
from ep_plugin.moe.rules import said
from ep_plugin.presets import Model, Preset


def megatron_arguments(preset: Preset) -> list[str]:
    """Return the arguments of Megatron's GPT, one decoder, with this preset's model and routing.

    Vocabulary, data, optimizer and layout are left to the user.
    """
    arguments = [*_shape(preset.model, preset.seq_length)]
    arguments += ["--attention-dropout", str(preset.dropout)]
    arguments += ["--hidden-dropout", str(preset.dropout)]
    if preset.init_std is not None:
        arguments += ["--init-method-std", str(preset.init_std)]
    if any(preset.model.experts):
        arguments += [*_experts(preset.model), *_routing(preset.routing, preset.model)]
        if preset.router != "topk":
            arguments += ["--ep-router", preset.router]
    return arguments


def _shape(model: Model, seq_length: int) -> list[str]:
    arguments = [
        *("--num-layers", str(len(model.experts)), "--hidden-size", str(model.hidden)),
        *("--ffn-hidden-size", str(model.dense_ffn), "--num-attention-heads", str(model.heads)),
        *("--seq-length", str(seq_length)),
        *("--max-position-embeddings", str(model.max_positions or seq_length)),
    ]
    if model.latent is None and model.heads * model.head_dim != model.hidden:
        arguments += ["--kv-channels", str(model.head_dim)]
    if model.kv_heads is not None:
        arguments += ["--group-query-attention", "--num-query-groups", str(model.kv_heads)]
    if model.latent is not None:
        arguments += [
            *("--multi-latent-attention", "--q-lora-rank", str(model.latent.q_rank)),
            *("--kv-lora-rank", str(model.latent.kv_rank)),
            *("--qk-head-dim", str(model.latent.nope_dim)),
            *("--qk-pos-emb-head-dim", str(model.latent.rope_dim)),
            *("--v-head-dim", str(model.latent.value_dim)),
        ]
    if model.positions == "learned":
        arguments += ["--position-embedding-type", "learned_absolute"]
    else:
        arguments += ["--position-embedding-type", "rope", "--rotary-base", str(model.rotary_base)]
    if not model.layer_norm:
        arguments += ["--normalization", "RMSNorm"]
    if model.norm_epsilon != 1e-5:  # Megatron's default
        arguments += ["--norm-epsilon", str(model.norm_epsilon)]
    if model.qk_norm or model.latent is not None:
        arguments += ["--qk-layernorm"]
    if not model.biases:
        arguments += ["--disable-bias-linear"]
    if not model.tied:
        arguments += ["--untie-embeddings-and-output-weights"]
    return arguments + _activation(model)


def _activation(model: Model) -> list[str]:
    if model.dense_activation == "swiglu":
        return ["--swiglu"]
    if model.dense_activation == "gelu" and model.biases:
        return []  # Megatron's default
    return ["--ep-dense-activation", model.dense_activation]


def _experts(model: Model) -> list[str]:
    counts = [experts for experts in model.experts if experts]
    arguments = [
        *("--num-experts", str(max(counts)), "--moe-ffn-hidden-size", str(model.expert_ffn)),
        *("--moe-layer-freq", _pattern([int(experts > 0) for experts in model.experts])),
    ]
    if len(set(counts)) > 1:
        runs = [(experts, len(list(group))) for experts, group in groupby(counts)]
        arguments += ["--ep-experts-per-layer", ",".join(f"{e}*{n}" for e, n in runs)]
    if model.expert_activation != model.dense_activation:
        arguments += ["--ep-expert-activation", model.expert_activation]
    if model.shared_ffn:
        arguments += ["--moe-shared-expert-intermediate-size", str(model.shared_ffn)]
        if model.shared_expert == "learned":
            arguments += ["--ep-shared-expert", "learned"]
    return arguments


def _pattern(layers: list[int]) -> str:
    """Return a short expression for the list, as `--moe-layer-freq` reads it."""
    for period in (2, 3, 4):
        times = len(layers) // period
        if len(set(layers)) > 1 and layers == layers[:period] * times:
            return f"({'+'.join(f'[{x}]' for x in layers[:period])})*{times}"
    return "+".join(f"[{x}]*{len(list(group))}" for x, group in groupby(layers))


def _routing(routing: RoutingConfig, model: Model) -> list[str]:
    default, arguments = RoutingConfig(), []
    for field in fields(RoutingConfig):
        value = getattr(routing, field.name)
        if field.name == "router_bias":
            if value != model.biases:
                arguments += ["--ep-router-bias", said(value)]
        elif value != getattr(default, field.name):
            arguments += _flag(field.name, value)
    return arguments


def _flag(name: str, value: Any) -> list[str]:
    """Return the flag of a field of RoutingConfig: Megatron's own where it has one."""
    row = BY_NAME[name]
    if row.twin in SWITCHES:
        return [f"{row.twin_flag}"]
    if row.twin_flag is not None:
        return [row.twin_flag, said(value)]
    if (name, value) == ("normalize", "none"):
        return ["--moe-router-pre-softmax"]
    if name == "aux_loss_scope" and value in ("sequence", "global"):
        return ["--moe-router-load-balancing-type", SCOPES[value]]
    return [row.flag, said(value)]


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


def words_of(value: object) -> list[str]:
    """Return an argument as a command line has it; several balancing losses are several words."""
    if isinstance(value, tuple):
        return [",".join(map(str, value))]
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
