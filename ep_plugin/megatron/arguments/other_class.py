"""A checkpoint of the other class than the run's model: what Megatron translates, and what not.

From 0.19 on Megatron loads a GPT into a HybridModel of `*`, `M` and one of `-` and `E`, with its
optimizer's state where that is kept by parameter. All else is refused here, with the conversion to
type, before anybody communicates.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ep_plugin.checkpoint.layer_pairs import natural, pairs_of
from ep_plugin.checkpoint.moe_layers import hybrid_pattern
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.cpu.local_layers import TRANSLATION
from ep_plugin.untrusted import shown

BY_PARAMETER = ("fully_reshardable", "fully_sharded_model_space")
PATTERN = "--hybrid-layer-pattern"


def check_class(
    args: Any, folder: Path, saved: argparse.Namespace, metadata: Any, optimizer: bool
) -> bool:
    """Raise ConfigError for a checkpoint of the other class that Megatron does not translate.

    Returns whether the checkpoint is of the other class. `metadata`: what it says of how it is
    kept; `optimizer`: is its state loaded?
    """
    theirs, ours = hybrid_pattern(saved), hybrid_pattern(args)
    if bool(theirs) == bool(ours):
        return False
    if theirs:
        raise ConfigError(
            f"{folder} holds a HybridModel ({shown(theirs)}), and this run trains a GPT; use "
            f"{PATTERN} {shown(theirs)}, or {to_gpt(folder)}, then --load {folder}-gpt"
        )
    said: dict[str, Any] = metadata if isinstance(metadata, dict) else {}
    why = _why_not(ours, saved, said)
    if why is not None:
        raise ConfigError(
            f"{folder} holds a GPT, and {PATTERN} ({ours}) makes a HybridModel, into which "
            f"Megatron does not load it: {why}; use {_convert(folder, saved)}, then --load "
            f"{folder}-hybrid"
        )
    kind = said.get("distrib_optim_sharding_type")
    if optimizer and args.use_distributed_optimizer and kind not in BY_PARAMETER:
        found = "no such state" if kind is None else f"it as {shown(kind)}"
        raise ConfigError(
            f"{folder} holds a GPT, and Megatron's way into a HybridModel takes the state of a "
            f"distributed optimizer by parameter ({BY_PARAMETER[0]}); the folder has {found}; use "
            f"{_convert(folder, saved)}, then --load {folder}-hybrid, or --no-load-optim"
        )
    return True


def to_gpt(folder: Path) -> str:
    """Return the command that makes a GPT of a HybridModel."""
    return f"ep-plugin convert --from {folder} --to {folder}-gpt --model-class gpt"


def _convert(folder: Path, saved: argparse.Namespace) -> str:
    """Return the command that makes a HybridModel of a GPT."""
    pattern = natural(pairs_of(saved))
    return f"ep-plugin convert --from {folder} --to {folder}-hybrid {PATTERN} '{pattern}'"


def _why_not(pattern: str, saved: argparse.Namespace, metadata: dict[str, Any]) -> str | None:
    """Return why Megatron does not translate a GPT for this pattern; None where it does."""
    if find_spec(TRANSLATION) is None:
        return "it can from megatron-core 0.19 on"
    if "/" in pattern:
        return "the pattern has multi-token prediction, behind its /"
    layers = pattern.replace("|", "")
    others = sorted(set(layers) - set("*M-E"))
    if others:
        return f"the pattern has {', '.join(others)}"
    if "-" in layers and "E" in layers:
        return "the pattern has both - and E"
    attention, blocks = layers.count("*"), layers.count("-") + layers.count("E")
    if not attention == blocks == saved.num_layers:
        return (
            f"the pattern has {attention} attention layers and {blocks} blocks, and the GPT "
            f"{saved.num_layers} layers"
        )
    frequency = getattr(saved, "moe_layer_freq", 1)
    if getattr(saved, "num_experts", None) and frequency != 1:
        return f"it was trained with --moe-layer-freq {frequency}, so that each layer has its names"
    if any(metadata.get(name) for name in ("non_homogeneous_layers", "singleton_local_shards")):
        return "each of its layers has its names"
    return None
