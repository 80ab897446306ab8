"""A GPT or a HybridModel: what a script that can build either trains, and what a run may load.

A new run trains a HybridModel whose layers are those of the GPT that the flags describe, where
Megatron has one and it can have these settings. A run that loads a checkpoint goes on with the
checkpoint's class. The variable MODEL_CLASS, gpt or hybrid, chooses.
"""

import argparse
import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ep_plugin.checkpoint.adapt import model_class
from ep_plugin.checkpoint.adapt.model_class import POSITIONS, SPLITS
from ep_plugin.checkpoint.layer_pairs import natural, pairs_of
from ep_plugin.checkpoint.moe_layers import hybrid_pattern
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.other_class import to_gpt
from ep_plugin.megatron.arguments.resume import loaded_model
from ep_plugin.megatron.arguments.stages import segments
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.untrusted import shown

VARIABLE = "MODEL_CLASS"
PATTERN = "--hybrid-layer-pattern"
MODEL = "megatron.core.models.hybrid"
# What a GPT alone has. Latent attention's norms are among --qk-layernorm's.
ONLY_GPT = (
    *model_class.ONLY_GPT,
    *("spec", "mtp_num_layers"),
    *("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"),
    *("experimental_attention_variant", "linear_attention_freq", "no_rope_freq"),
    *("window_attn_skip_freq", "first_last_layers_bf16", "overlap_moe_expert_parallel_comm"),
    "ep_teacher",
)


def choose_or_refuse(args: Any) -> None:
    """Call `choose`; rank 0 prints what it says. A mistake ends the run with code 2."""
    from ep_plugin.megatron.seams.refusal import refuse

    try:
        said = choose(args)
    except ConfigError as error:
        refuse(error)
    if said is not None and os.environ.get("RANK", "0") == "0":
        print(f"ep_plugin: {said}", flush=True)


def choose(args: Any) -> str | None:
    """Give parsed arguments the pattern of a HybridModel, or leave them a GPT's.

    Returns what to say of it, once; None where there is nothing to say. Raises ConfigError for a
    MODEL_CLASS that cannot be.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "gpt", "hybrid"):
        raise ConfigError(
            f"{VARIABLE} must be gpt or hybrid; got {shown(wanted)}; without it a new run trains a "
            "HybridModel where it can"
        )
    typed = hybrid_pattern(args)
    if typed:
        if wanted == "gpt":
            raise ConfigError(
                f"{VARIABLE}=gpt and {PATTERN} ({typed}) contradict each other; leave one of them "
                "out"
            )
        return None
    if find_spec(MODEL) is None:
        if wanted == "hybrid":
            raise ConfigError(
                f"{VARIABLE}=hybrid needs megatron-core 0.18 or newer; use {VARIABLE}=gpt"
            )
        return None
    folder, saved = loaded_model(args)
    if folder is not None:  # what is not whole, Megatron says
        return None if saved is None else _as_loaded(args, wanted, folder, saved)
    return None if wanted == "gpt" else _as_new(args, wanted)


def _as_new(args: Any, wanted: str) -> str | None:
    why, pattern = translated(args)
    if pattern is not None:
        become_hybrid(args, pattern)
        return f"a new run, which trains a HybridModel ({pattern}); {VARIABLE}=gpt trains a GPT"
    if why is None:
        return None  # Megatron says what is wrong with these flags
    if wanted == "hybrid":
        raise ConfigError(f"{VARIABLE}=hybrid cannot be: {why}; use {VARIABLE}=gpt")
    return f"a new run, which trains a GPT: {why}"


def _as_loaded(args: Any, wanted: str, folder: Path, saved: argparse.Namespace) -> str | None:
    theirs = hybrid_pattern(saved)
    why, pattern = translated(args)
    if not theirs:
        if wanted == "hybrid":
            if why is not None:
                raise ConfigError(f"{VARIABLE}=hybrid cannot be: {why}; use {VARIABLE}=gpt")
            if pattern is not None:
                become_hybrid(args, pattern)  # what it loads is checked with all else
            return None
        if wanted == "gpt":
            return None
        command = f"ep-plugin convert --from {folder} --to {folder}-hybrid --model-class hybrid"
        other = f"; {command} makes a HybridModel of it" if pattern is not None else ""
        return f"{folder} holds a GPT, and goes on as one{other}"
    if wanted == "gpt":
        raise ConfigError(
            f"{VARIABLE}=gpt is given, and {folder} holds a HybridModel ({shown(theirs)}); use "
            f"{VARIABLE}=hybrid, or {to_gpt(folder)}"
        )
    if pattern is None or pattern.replace("|", "") != str(theirs).replace("|", ""):
        found = why or f"the flags describe {pattern or 'a GPT'}"
        raise ConfigError(
            f"{folder} holds a HybridModel ({shown(theirs)}), and {found}; use {PATTERN} "
            f"{shown(theirs)}"
        )
    become_hybrid(args, pattern)
    return None


def translated(args: Any) -> tuple[str | None, str | None]:
    """Return why a HybridModel cannot be what these flags of a GPT describe, and its pattern.

    Both are None where the flags describe no model.
    """
    for name in ONLY_GPT:
        if getattr(args, name, None):
            return f"--{name.replace('_', '-')} has no counterpart in a HybridModel", None
    if getattr(args, "ep_overlap", None) == "two_batch":
        return "--ep-overlap two_batch runs GPTs alone", None
    if args.position_embedding_type not in POSITIONS:
        kind = args.position_embedding_type
        return f"--position-embedding-type {kind} has no counterpart in a HybridModel", None
    latent = args.multi_latent_attention
    if latent and not hasattr(import_module(f"{MODEL}.hybrid_layer_allocation").Symbols, "MLA"):
        return "latent attention is in a HybridModel from megatron-core 0.19 on", None
    if args.transformer_impl == "local" and not cpu_mode.wanted():
        return "a HybridModel on a GPU is of Transformer Engine's layers, not local ones", None
    frequency = args.moe_layer_freq
    if not isinstance(args.num_layers, int) or args.num_layers < 1:
        return None, None
    if isinstance(frequency, list) and len(frequency) != args.num_layers:
        return None, None
    return _with_cuts(args)


def _with_cuts(args: Any) -> tuple[str | None, str | None]:
    layers = segments(args)
    if layers is None:
        return None, None
    if not all(layers):
        return "a pipeline stage of it has no layers", None
    symbols = natural(pairs_of(args))
    ends = [2 * sum(layers[: place + 1]) for place in range(len(layers))]
    return None, "|".join(symbols[a:b] for a, b in zip([0, *ends], ends, strict=False))


def become_hybrid(args: Any, pattern: str) -> None:
    """Make parsed arguments of a GPT those of the HybridModel with this pattern, in place."""
    args.hybrid_layer_pattern = pattern
    args.num_layers = args.encoder_num_layers = None  # Megatron takes the pattern's
    args.moe_layer_freq = 1
    for name, off in SPLITS.items():
        if hasattr(args, name):
            setattr(args, name, off)
    if args.recompute_num_layers is not None:
        args.recompute_num_layers *= 2  # of layers that are half as large
