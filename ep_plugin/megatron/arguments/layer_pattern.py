"""What `--hybrid-layer-pattern` must say for our block, and what a HybridModel cannot have."""

from typing import Any

from ep_plugin.checkpoint.moe_layers import hybrid_layers, hybrid_pattern
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.only_gpt import FLAG, check_only_gpt
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.seams import touchpoints

# Symbols without a layer on the CPU, and what they are made of.
OF_GPUS = {
    "M": "Mamba layers need the package mamba-ssm",
    "G": "gated delta nets need Transformer Engine and the package flash-linear-attention",
    "D": "DeepSeek's sparse attention needs Transformer Engine",
}


def pattern_of(args: Any) -> str | None:
    """Return the pattern of a HybridModel as Megatron will join it of its flags; None for a GPT."""
    pattern = hybrid_pattern(args)
    behind = getattr(args, "mtp_hybrid_override_pattern", None)
    if pattern and behind and getattr(args, "mtp_num_layers", None) and "/" not in pattern:
        return f"{pattern}/{behind}"
    return str(pattern) if pattern else None


def check_hybrid(args: Any, two_batch: bool) -> None:
    """Raise ConfigError for a pattern without a place for experts, or beside what it cannot have.

    `two_batch` says whether two micro-batches are to be run at once.
    """
    pattern = pattern_of(args)
    if pattern is None:
        return
    decoder, _, predicting = pattern.partition("/")
    release = touchpoints.release_for(touchpoints.installed_version())
    if args.num_experts is None:
        if "E" in pattern:
            raise ConfigError(f"{FLAG} ({pattern}) has layers of experts, E; use --num-experts 8")
        _check_on_the_cpu(pattern)
        return
    if not release.HYBRID:
        raise ConfigError(
            f"{FLAG} ({pattern}) is a MambaModel in megatron-core "
            f"{touchpoints.installed_version()}, and the plugin serves HybridModels, from 0.18 on; "
            "use pip install 'megatron-core>=0.18'"
        )
    if not any(hybrid_layers(pattern)):
        place = decoder.replace("-", "E", 1) if "-" in decoder else f"{decoder}E"
        place = "/".join([place, predicting.replace("E", "-")] if predicting else [place])
        raise ConfigError(
            f"--num-experts ({args.num_experts}) is given, and {FLAG} ({pattern}) has no layer of "
            f"experts, E; use {FLAG} '{place}'"
        )
    if "E" in predicting:
        dense = f"{decoder}/{predicting.replace('E', '-')}"
        raise ConfigError(
            f"{FLAG} ({pattern}) has experts in layers of multi-token prediction, which are not "
            f"served in a HybridModel; use {FLAG} '{dense}'"
        )
    if args.moe_layer_freq != 1 and getattr(args, "ep_preset", None):
        raise ConfigError(
            f"--ep-preset ({args.ep_preset}) says which layers of a GPT have experts, and {FLAG} "
            f"({pattern}) says it for a HybridModel; use --moe-layer-freq 1 beside them"
        )
    if args.moe_layer_freq != 1:
        raise ConfigError(
            f"--moe-layer-freq ({args.moe_layer_freq}) is for a GPT; in a HybridModel each E of "
            f"{FLAG} ({pattern}) is a layer of experts; leave --moe-layer-freq out"
        )
    if two_batch:
        raise ConfigError(
            "--ep-overlap (two_batch) needs Megatron's schedule for two micro-batches, which runs "
            f"GPTs alone, and {FLAG} ({pattern}) makes a HybridModel; use --ep-overlap auto"
        )
    if getattr(args, "ep_teacher", None):
        raise ConfigError(
            f"--ep-teacher ({args.ep_teacher}) teaches a GPT, and {FLAG} ({pattern}) makes a "
            f"HybridModel; use {FLAG} without --ep-teacher"
        )
    _check_on_the_cpu(pattern)
    check_only_gpt(args, pattern)


def _check_on_the_cpu(pattern: str) -> None:
    if not cpu_mode.wanted():
        return
    for symbol, needs in OF_GPUS.items():
        if symbol in pattern:
            raise ConfigError(
                f"{FLAG} ({pattern}) has {symbol}, and {needs}, which is for GPUs; on the CPU use "
                "a pattern of *, +, - and E"
            )
    if "/" in pattern:
        raise ConfigError(
            f"{FLAG} ({pattern}) has multi-token prediction, whose layers in a HybridModel need "
            f"Transformer Engine, which is for GPUs; on the CPU use '{pattern.split('/')[0]}'"
        )
