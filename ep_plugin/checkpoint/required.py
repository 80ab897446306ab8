"""Which parameters a model must have by its run arguments, whatever its other layers have.

Only what an argument says plainly, for layers of a GPT and those of a HybridModel that
are a GPT's too. Each requirement lists the names of one parameter: releases and implementations
spell it in different ways, and one of them is enough.
"""

import argparse
import re
from collections.abc import Collection, Iterator, Mapping

from ep_plugin.checkpoint.moe_layers import hybrid_pattern, hybrid_symbol, pattern
from ep_plugin.checkpoint.run_args import said
from ep_plugin.errors import ConfigError

MAX_LAYERS = 16384
Names = tuple[str, ...]
# What makes layers others than a GPT's.
OTHER_LAYERS = (
    *("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"),
    *("experimental_attention_variant", "linear_attention_freq"),
)
_ATTENTION, _LATENT, _DENSE, _EXPERTS = "*", "+", "-", "E"  # as a pattern names them
_QKV, _PROJ = "self_attention.linear_qkv", "self_attention.linear_proj"
_FC1, _FC2 = "mlp.linear_fc1", "mlp.linear_fc2"
_SHARED = "mlp.shared_experts"
# Stacked, or an expert's each; a router of one's own may have other parameters than these.
_EACH = re.compile(r"(?<=\.experts\.)(experts|local_experts)\.(\d+\.)?|(_w|\d+)$")
_OF_EXPERTS = ("mlp.experts.linear_fc1.weight", "mlp.experts.linear_fc2.weight")
_NORMS: dict[object, Names] = {"RMSNorm": ("weight",), "LayerNorm": ("weight", "bias")}


def absent(
    layers: Mapping[str, Collection[str]], outside: Collection[str], args: argparse.Namespace
) -> Iterator[str]:
    """Yield the names of parameters that run arguments ask for and that are not there.

    `layers`: of each layer's number the names of its parameters; `outside`: all other names.
    """
    for names in _outside(args):
        if not any(name in outside for name in names):
            yield names[0]
    if any(said(args, name) is not None for name in OTHER_LAYERS):
        return
    kinds = _kinds(args)
    for layer, there in layers.items():
        for kind in kinds[int(layer)] if int(layer) < len(kinds) else "":
            for names in _of(kind, args):
                if not any(name in there for name in names):
                    yield f"decoder.layers.{layer}.{names[0]}"
            for name in _OF_EXPERTS if kind == _EXPERTS else ():
                if not any(_EACH.sub("", one) == name for one in there):
                    yield f"decoder.layers.{layer}.{name}"


def _kinds(args: argparse.Namespace) -> list[str]:
    """Return what each layer is made of, as symbols; nothing where that is not known."""
    symbols, number = hybrid_pattern(args), getattr(args, "num_layers", None)
    if isinstance(symbols, str):
        return [hybrid_symbol(symbols, layer) for layer in range(min(len(symbols), MAX_LAYERS))]
    if said(args, "spec") is not None or type(number) is not int or not 0 < number <= MAX_LAYERS:
        return []
    attention = _ATTENTION if said(args, "multi_latent_attention") is None else _LATENT
    try:
        experts = pattern(args)
    except (ConfigError, AttributeError, TypeError, ValueError, ArithmeticError):
        return [attention] * number  # whoever needs the layers says what is wrong
    return [attention + (_EXPERTS if one else _DENSE) for one in experts]


def _outside(args: argparse.Namespace) -> Iterator[Names]:
    if hybrid_pattern(args) or said(args, "spec") is not None:
        return
    if getattr(args, "position_embedding_type", None) == "learned_absolute":
        yield ("embedding.position_embeddings.weight",)
    if getattr(args, "normalization", None) == "LayerNorm":
        yield ("decoder.final_layernorm.bias",)


def _of(kind: str, args: argparse.Namespace) -> Iterator[Names]:
    """Yield the parameters of one part of a layer."""

    def has(name: str) -> bool:
        return said(args, name) is not None

    biases = has("add_bias_linear")
    norms = _NORMS.get(getattr(args, "normalization", None), ())
    if kind in (_ATTENTION, _LATENT) and not has("num_attention_heads"):
        return
    if kind == _ATTENTION:
        yield from ((f"{_QKV}.weight",), (f"{_PROJ}.weight",))
        yield from ((f"{_QKV}.layer_norm_{one}", f"input_layernorm.{one}") for one in norms)
        if biases or has("add_qkv_bias"):
            yield (f"{_QKV}.bias",)
        if has("qk_layernorm") and not has("qk_l2_norm"):
            yield from ((f"self_attention.{one}_layernorm.weight",) for one in "qk")
    if kind == _LATENT:
        yield from _latent(args)
    if kind in (_ATTENTION, _LATENT) and biases:
        yield (f"{_PROJ}.bias",)
    if kind in (_DENSE, _EXPERTS):
        yield from ((f"{_FC1}.layer_norm_{one}", f"pre_mlp_layernorm.{one}") for one in norms)
    if kind == _DENSE and has("ffn_hidden_size"):
        yield from ((f"{_FC1}.weight", f"{_FC1}.weight_w"), (f"{_FC2}.weight",))
        if biases:
            yield from ((f"{_FC1}.bias", f"{_FC1}.bias_w"), (f"{_FC2}.bias",))
    if kind == _EXPERTS:
        if not _is_own_router(getattr(args, "ep_router", None)):
            yield ("mlp.router.weight",)
        if has("moe_router_enable_expert_bias"):
            yield ("mlp.router.expert_bias",)
        if has("moe_shared_expert_intermediate_size"):
            fc1 = f"{_SHARED}.linear_fc1"
            yield from ((f"{fc1}.weight", f"{fc1}.weight_w"), (f"{_SHARED}.linear_fc2.weight",))
            if has("moe_shared_expert_gate"):
                yield (f"{_SHARED}.gate_weight",)


def _is_own_router(router: object) -> bool:
    """Whether a router is a module of the user's: it may have other parameters than a gate."""
    return router is not None and not (type(router) is str and "." not in router)


def _latent(args: argparse.Namespace) -> Iterator[Names]:
    parts = ["kv"] if said(args, "q_lora_rank") is None else ["kv", "q"]
    for part in parts:
        up = f"self_attention.linear_{part}_up_proj"
        down = (f"self_attention.linear_{one}_down_proj.weight" for one in (part, "qkv"))
        yield from (tuple(down), (f"{up}.weight",))
        if said(args, "qk_layernorm") is not None:
            yield (f"{up}.layer_norm_weight", f"self_attention.{part}_layernorm.weight")
    if len(parts) == 1:
        yield ("self_attention.linear_q_proj.weight",)
    yield (f"{_PROJ}.weight",)
