"""The settings of a preset as flags; `spell_model.py` has those of a checkpoint's model."""

from dataclasses import fields
from itertools import groupby
from typing import Any

from ep_plugin.checkpoint.scopes import SCOPES
from ep_plugin.megatron.arguments.table import BY_NAME, SWITCHES
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
