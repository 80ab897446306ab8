"""Coefficients of router losses: what they mean in config.json, and what in Megatron.

E experts, K choices of a token, L MoE layers. f[l, e] is the share of layer l's choices that went
to expert e, P[l, e] its mean score in that layer, mean_l the mean over layers:

    transformers, once for the model     router_aux_loss_coef * E * K * sum_e mean_l f * mean_l P
    Megatron, in each layer              moe_aux_loss_coeff   * E     * sum_e f[l] * P[l]

If all layers load their experts alike, the gradient of P[l, e] has the factor
router_aux_loss_coef * K / L in transformers, and moe_aux_loss_coeff in Megatron. DeepSeek's
`aux_loss_alpha` is the coefficient of each layer's own loss, as in Megatron.
"""

import argparse
from collections.abc import Callable
from typing import Any

from ep_plugin.checkpoint.config_keys import Config, Keys, refusal
from ep_plugin.checkpoint.moe_layers import pattern
from ep_plugin.errors import ConfigError

_CHOOSING = {"sinkhorn", "quantile_balancing"}
_SCOPES = {"seq_aux_loss": "each sequence", "global_aux_loss": "all tokens of a step"}


def whole_model_args(config: Keys, layers: int) -> dict[str, Any]:
    """Return Megatron's arguments for `router_aux_loss_coef`; `layers` counts the MoE layers."""
    topk = config.number("num_experts_per_tok", whole=True)
    coefficient = _coefficient(config, "router_aux_loss_coef") * topk / layers
    return {
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": _rounded(coefficient),
    }


def _coefficient(config: Keys, key: str) -> Any:
    value = config.number(key)
    if not 0 <= value < float("inf"):
        raise refusal(config, key, "a number of at least 0")
    return value


def whole_model_config(args: argparse.Namespace) -> Config:
    """Return the keys that `whole_model_args` reads: its inverse."""
    layers = sum(pattern(args))
    over = 1 if getattr(args, "ep_aux_loss_layers", None) == "mean" else layers
    return {"router_aux_loss_coef": _rounded(coefficient(args) * over / args.moe_router_topk)}


def each_layer_args(config: Keys) -> dict[str, Any]:
    """Return Megatron's arguments for DeepSeek's coefficient; transformers ignores it."""
    alpha = float(_coefficient(config, "aux_loss_alpha"))
    kind = "seq_aux_loss" if config.get("seq_aux") else "aux_loss"
    if not alpha:
        return {"moe_router_load_balancing_type": "none"}
    return {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": alpha}


def each_layer_config(args: argparse.Namespace) -> Config:
    """Return the keys that `each_layer_args` reads: its inverse."""
    found = coefficient(args)
    if getattr(args, "ep_aux_loss_layers", None) == "mean":
        found = _rounded(found / sum(pattern(args)))
    return {"aux_loss_alpha": found, "seq_aux": _types(args) == ["seq_aux_loss"]} if found else {}


def coefficient(args: argparse.Namespace) -> float:
    """Return the sum of the coefficients of all load-balancing losses of a run."""
    types, found = _types(args), getattr(args, "moe_aux_loss_coeff", None) or 0.0
    values = found if isinstance(found, list | tuple) else [found] * len(types)
    return float(sum(v for kind, v in zip(types, values, strict=True) if kind != "none"))


def _types(args: argparse.Namespace) -> list[str]:
    """Return the types of balancing losses; raises ConfigError for a type that changes routing."""
    found = getattr(args, "moe_router_load_balancing_type", None) or "none"
    types = [found] if isinstance(found, str) else list(found)
    for kind in _CHOOSING & {*types}:
        raise ConfigError(
            f"moe_router_load_balancing_type ({kind}) chooses experts in a way that config.json "
            "cannot say; give a model trained with aux_loss or none"
        )
    return types


def _rounded(value: float) -> float:
    """Return `value` with 12 digits, so that a conversion and its inverse give the same number."""
    return float(f"{value:.12g}")


def notes_of_import(args: argparse.Namespace, of_model: bool, jitters: bool) -> list[str]:
    """Return notes on how training in Megatron differs from config.json, and what was converted."""
    if not getattr(args, "num_experts", None):
        return []
    notes = []
    found, topk, layers = coefficient(args), args.moe_router_topk, sum(pattern(args))
    if found and of_model:
        theirs = _rounded(found * layers / topk)
        notes.append(
            f"router_aux_loss_coef {theirs:g} of the whole model (its loss counts all {topk} "
            f"choices and takes the mean over {layers} layers) is --moe-aux-loss-coeff {found:g} "
            f"of each layer. {_ACROSS} transformers adds it where output_router_logits is true, "
            "Megatron always"
        )
    if jitters and getattr(args, "moe_input_jitter_eps", None):
        notes.append(
            f"router_jitter_noise {args.moe_input_jitter_eps:g} multiplies the input of router and "
            "experts in transformers, that of the router alone in Megatron"
        )
    return notes


def notes_of_export(args: argparse.Namespace, of_model: bool, jitters: bool) -> list[str]:
    """Return notes on what a run trained with that config.json cannot say, or says differently."""
    notes = [
        f"{name} ({value:g}) has no key in config.json and is left out"
        for name, value in _left_out(args, jitters)
    ]
    if not getattr(args, "num_experts", None) or not coefficient(args):
        return notes
    if of_model:
        theirs = whole_model_config(args)["router_aux_loss_coef"]
        notes.append(
            f"moe_aux_loss_coeff {coefficient(args):g} is router_aux_loss_coef {theirs:g} of the "
            f"whole model. {_ACROSS} transformers adds it where output_router_logits is true"
        )
    for kind in _types(args):
        exact = ("aux_loss", *(() if of_model else ("seq_aux_loss",)))
        if kind in _SCOPES and kind not in exact:
            notes.append(
                f"moe_router_load_balancing_type {kind} takes loads over {_SCOPES[kind]}, and "
                "config.json knows those of a micro-batch alone"
            )
    if getattr(args, "ep_aux_loss_counts", None) == "top1":
        notes.append("ep_aux_loss_counts top1 counts first choices, config.json means all of them")
    return notes


_ACROSS = (
    "Gradients are equal where layers load their experts alike; else those of expert e in layer l "
    "differ by the ratio of the mean load of e over all layers, which transformers takes, to its "
    "load in l."
)


def _left_out(args: argparse.Namespace, jitters: bool) -> list[tuple[str, float]]:
    has: Callable[[str], float] = lambda name: getattr(args, name, None) or 0.0  # noqa: E731
    names = ["hidden_dropout"]
    if has("num_experts"):
        names += ["moe_z_loss_coeff", *([] if jitters else ["moe_input_jitter_eps"])]
    return [(name, has(name)) for name in names if has(name)]
