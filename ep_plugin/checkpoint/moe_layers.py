"""Which layers are Mixture-of-Experts layers: what Megatron's --moe-layer-freq says, and `--layers`
of convert in the same words."""

import argparse
import ast
from collections.abc import Sequence
from typing import Any

from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import shown

LEGAL = "use all, every:N, or one 0 or 1 per layer, such as [0,1,0,1] or [0]*1+[1]*3"


def parse_layers(text: str, num_layers: int) -> int | list[int]:
    """Return Megatron's moe_layer_freq: N (layers 0, N, 2N, ...) or a 0/1 list.

    Raises ConfigError for another form, a wrong length, or no MoE layer at all.
    """
    if text == "all":
        return 1
    if text.startswith("every:"):
        step = text.removeprefix("every:")
        if not step.isdecimal() or int(step) < 1:
            raise ConfigError(f"--layers every:N needs N >= 1; got {shown(text)}; use every:2")
        return int(step)
    pattern = _parse_pattern(text)
    if len(pattern) != num_layers:
        raise ConfigError(
            f"--layers {text} has {len(pattern)} entries, but the checkpoint has {num_layers} "
            f"layers; use [{','.join(['1'] * num_layers)}]"
        )
    if not any(pattern):
        raise ConfigError(f"--layers {text} leaves every layer dense; {LEGAL}")
    return pattern


def pattern(args: argparse.Namespace) -> tuple[bool, ...]:
    """Return for each layer of a model with these run arguments whether it is an MoE layer."""
    if not getattr(args, "num_experts", None):
        return (False,) * int(args.num_layers)
    return layers_of(args)


def layers_of(args: Any) -> tuple[bool, ...]:
    """Return for each layer of a model that has experts whether they are in it.

    `args`: run arguments of the right types, or a model's configuration.
    """
    hybrid = hybrid_pattern(args)
    return hybrid_layers(hybrid) if hybrid else moe_layers(args.moe_layer_freq, args.num_layers)


def moe_layers(frequency: int | Sequence[int], num_layers: int) -> tuple[bool, ...]:
    """Return for each layer whether Megatron's moe_layer_freq makes it an MoE layer."""
    if isinstance(frequency, int):
        return tuple(layer % frequency == 0 for layer in range(num_layers))
    return tuple(bool(entry) for entry in frequency)


def hybrid_pattern(args: Any) -> Any:
    """Return the pattern of a HybridModel, also by the name of older releases; None for a GPT.

    `args`: run arguments, validated or not, or a model's configuration. The value is as it was
    found, which need not be a text.
    """
    for name in ("hybrid_layer_pattern", "hybrid_override_pattern"):
        if found := getattr(args, name, None):
            return found
    return None


def has_dense_layer(args: Any) -> bool:
    """Whether a layer is left without experts, by `--moe-layer-freq` or a HybridModel's pattern."""
    if pattern := hybrid_pattern(args):
        return "-" in pattern
    frequency = getattr(args, "moe_layer_freq", 1)
    return frequency > 1 if isinstance(frequency, int) else not all(frequency)


def hybrid_layers(pattern: str) -> tuple[bool, ...]:
    """Return for each layer of a --hybrid-layer-pattern whether it has experts."""
    return tuple(symbol == "E" for symbol in _decoder(pattern))


def hybrid_symbol(pattern: str, layer: int) -> str:
    """Return the symbol of a layer, counted from 0 as in a checkpoint; "" beyond the last."""
    return _decoder(pattern)[layer : layer + 1]


def _decoder(pattern: str) -> str:
    """Return a symbol for each layer of the decoder.

    `|` cuts pipeline stages; behind a `/` stand layers of multi-token prediction.
    """
    return pattern.split("/")[0].replace("|", "")


def _parse_pattern(text: str) -> list[int]:
    try:
        value = _evaluate(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"--layers {shown(text)} cannot be read; {LEGAL}") from error
    if not isinstance(value, list) or any(entry not in (0, 1) for entry in value):
        raise ConfigError(f"--layers {shown(text)} is no list of 0 and 1; {LEGAL}")
    return value


def _evaluate(node: ast.expr) -> int | list[int]:
    """Evaluate lists of numbers under + and *, and nothing else."""
    match node:
        case ast.Constant(value=int(number)) if 0 <= number <= 10_000:
            return int(number)
        case ast.List(elts=entries):
            return [entry for part in entries for entry in [_number(part)]]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _as_list(left) + _as_list(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _as_list(left) * _number(right)
    raise ValueError(ast.dump(node))


def _number(node: ast.expr) -> int:
    value = _evaluate(node)
    if not isinstance(value, int):
        raise ValueError(ast.dump(node))
    return value


def _as_list(node: ast.expr) -> list[int]:
    value = _evaluate(node)
    if not isinstance(value, list):
        raise ValueError(ast.dump(node))
    return value
