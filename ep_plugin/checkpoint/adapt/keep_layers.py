"""A student of a teacher's layers: some layers of a checkpoint, renumbered, bit for bit.

What lies outside of the layers goes along. Optimizer, random-number and rerun state belong to the
run that ends here and stay behind. Nothing is computed, so every value is the teacher's.
"""

import argparse
import copy
import re
from collections import Counter
from dataclasses import replace

from ep_plugin.checkpoint.adapt.renamed import LAYER, OF_THE_RUN, OPTIMIZER, content, renamed
from ep_plugin.checkpoint.moe_layers import pattern
from ep_plugin.checkpoint.opened import Kept, Opened
from ep_plugin.checkpoint.run_args import said
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import shown

_LEGAL = "use numbers from 0 and ranges of them, such as --keep-layers 0-19,23"
_PART = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?", re.ASCII)
_MOST = 100_000
# Models whose layers differ in ways that are counted from the first layer on, or that have layers
# beside the decoder's: renumbered, they would compute something else. None, 0 or empty elsewhere.
BY_NUMBER = (
    *("mtp_num_layers", "mtp_hybrid_override_pattern"),
    *("spec", "heterogeneous_layers_config_path"),
    *("heterogeneous_layers_config_encoded_json", "experimental_attention_variant"),
    *("linear_attention_freq", "no_rope_freq", "window_attn_skip_freq"),
)


def parse_kept(text: str) -> tuple[int, ...]:
    """Return the layers, counted from 0, that `0-19,23` names, in its order.

    Raises ConfigError for what is no such list, is empty, or names a layer twice.
    """
    layers: list[int] = []
    for part in text.split(","):
        found = _PART.fullmatch(part.strip())
        if found is None:
            raise ConfigError(f"--keep-layers {shown(text)} cannot be read; {_LEGAL}")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise ConfigError(
                f"--keep-layers {text}: {part.strip()} ends before it begins; use {last}-{first}"
            )
        layers.extend(range(first, last + 1))
        if len(layers) > _MOST:
            raise ConfigError(f"--keep-layers {text} names more than {_MOST} layers; {_LEGAL}")
    if len(set(layers)) < len(layers):
        twice = Counter(layers).most_common(1)[0][0]
        raise ConfigError(f"--keep-layers {text} names layer {twice} twice; name each layer once")
    return tuple(layers)


def keep_layers(model: Opened, kept: tuple[int, ...] | None) -> Opened:
    """Return the model with those of its layers alone; itself without any. Reads no tensor.

    Raises ConfigError for a layer that it has not, for a Mixture-of-Experts of which no MoE layer
    is kept, and for a model whose layers cannot be renumbered.
    """
    if kept is None:
        return model
    args = _student_args(model, kept)
    new = {old: number for number, old in enumerate(kept)}
    source = model.source
    names = {}  # the teacher's -> the student's
    for name in (*source.tensors, *sorted(source.objects)):
        if _stays(name):
            continue
        found = LAYER.fullmatch(name)
        if found is None and name.startswith("decoder.layers."):
            raise ConfigError(
                f"--keep-layers cannot renumber {shown(name)} in {model.folder}, which is of no "
                "layer; copy the checkpoint again"
            )
        if found is None:
            names[name] = name
        elif int(found[1]) in new:
            names[name] = f"decoder.layers.{new[int(found[1])]}.{found[2]}"
    made = renamed(source, names, args, {})
    dropped = sum(map(_stays, (*source.tensors, *source.objects)))
    return replace(
        model,
        source=made,
        args=args,
        origins={new: model.origins.get(old, (old,)) for old, new in names.items()},
        kept=Kept(kept, model.args.num_layers, content(made), tuple(names.items()), dropped),
    )


def _stays(name: str) -> bool:
    """Whether this belongs to the teacher's run."""
    return bool(OPTIMIZER.fullmatch(name) or OF_THE_RUN.fullmatch(name))


def _student_args(model: Opened, kept: tuple[int, ...]) -> argparse.Namespace:
    """Return the run arguments of the student."""
    teacher = model.args
    beyond = [layer for layer in kept if layer >= teacher.num_layers]
    if beyond:
        raise ConfigError(
            f"--keep-layers names layer {beyond[0]}, and {model.folder} has the layers 0 to "
            f"{teacher.num_layers - 1}; use --keep-layers 0-{teacher.num_layers - 1}, less those "
            "that are to go"
        )
    for name in BY_NUMBER:
        if (value := said(teacher, name)) is not None:
            raise ConfigError(
                f"--keep-layers cannot renumber the layers of {model.folder}, which was trained "
                f"with {name} = {shown(value)}; give a plain decoder without it"
            )
    args = copy.copy(teacher)
    args.num_layers = len(kept)
    if getattr(teacher, "encoder_num_layers", None) is not None:
        args.encoder_num_layers = len(kept)
    args.no_save_optim, args.no_save_rng = True, True
    if getattr(teacher, "num_experts", None):
        _keep_experts(args, teacher, kept, model)
    return args


def _keep_experts(
    args: argparse.Namespace, teacher: argparse.Namespace, kept: tuple[int, ...], model: Opened
) -> None:
    """Set which layers of the student have experts, and how many each."""
    is_moe = pattern(teacher)
    if not any(is_moe[layer] for layer in kept):
        having = ",".join(str(layer) for layer, moe in enumerate(is_moe) if moe)
        raise ConfigError(
            f"--keep-layers keeps none of the layers of {model.folder} that have experts "
            f"({having}); keep one of them"
        )
    args.moe_layer_freq = [int(is_moe[layer]) for layer in kept]
    counts = getattr(teacher, "ep_experts_per_layer", None)
    if counts is None:
        return
    of_layer = dict(zip((layer for layer, moe in enumerate(is_moe) if moe), counts, strict=True))
    ours = tuple(of_layer[layer] for layer in kept if is_moe[layer])
    args.ep_experts_per_layer = ours
    args.num_experts = max(ours)
