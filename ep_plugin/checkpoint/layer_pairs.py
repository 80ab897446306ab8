"""Patterns of a HybridModel whose layers pair up to those of a GPT: attention, then its block.

    symbol  * attention, + latent attention     - dense block, E experts
    GPT     the first half of a layer           the second half

Anywhere, | cuts pipeline stages.
"""

import argparse
from dataclasses import dataclass
from itertools import zip_longest

from ep_plugin.checkpoint.moe_layers import pattern as moe_pattern
from ep_plugin.errors import ConfigError

# Symbols of layers that a GPT has none of.
_OTHERS = {
    "M": "a Mamba layer",
    "G": "a gated delta net",
    "D": "DeepSeek's sparse attention",
}


@dataclass(frozen=True)
class Pairs:
    """The layers of a GPT that a pattern's are."""

    latent: bool  # attention is latent
    is_moe: tuple[bool, ...]  # of each layer of the GPT


def pairs_of(args: argparse.Namespace) -> Pairs:
    """Return the layers of a GPT with these run arguments."""
    return Pairs(bool(getattr(args, "multi_latent_attention", False)), moe_pattern(args))


def natural(pairs: Pairs) -> str:
    """Return the pattern of these layers, without cuts."""
    attention = "+" if pairs.latent else "*"
    return "".join(attention + ("E" if is_moe else "-") for is_moe in pairs.is_moe)


def parse(pattern: str, said: str, instead: str) -> Pairs:
    """Return the layers of a GPT that a pattern says.

    `said` names it and `instead` what to do in a ConfigError, which is raised where there are none.
    """
    if "/" in pattern:
        raise ConfigError(
            f"{said} has multi-token prediction behind its /, which has no counterpart in the "
            f"other class; {instead}"
        )
    layers = pattern.replace("|", "")
    for place, symbol in enumerate(layers, start=1):
        if symbol not in "*+-E":
            what = _OTHERS.get(symbol, "which is no symbol of a layer here")
            raise ConfigError(
                f"{said} has {symbol!a} as layer {place}, {what}, and a GPT is of *, +, - and "
                f"E alone; {instead}"
            )
    halves = list(zip_longest(layers[::2], layers[1::2], fillvalue=""))
    for layer, (attention, block) in enumerate(halves):
        if attention not in "*+" or block not in ("-", "E"):
            raise ConfigError(
                f"{said} has {attention + block} where layer {layer} of a GPT is an attention "
                f"(* or +) and then its block (- or E); {instead}"
            )
    if len(set(layers[::2])) != 1:
        found = "no layers" if not layers else "both * and +, and a GPT has one kind of attention"
        raise ConfigError(f"{said} has {found}; {instead}")
    return Pairs(layers[0] == "+", tuple(block == "E" for _, block in halves))
