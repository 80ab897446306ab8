"""What is to be written: content, names, and how, in the format that was asked for.

A Hugging Face family cannot hold every model: one is fitted to it before it is written as one.
"""

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ep_plugin.checkpoint import family as families
from ep_plugin.checkpoint.adapt import fold_gemma
from ep_plugin.checkpoint.adapt.class_names import ONLY_HYBRID
from ep_plugin.checkpoint.adapt.hugging_face import to_hf
from ep_plugin.checkpoint.adapt.model_class import as_hybrid
from ep_plugin.checkpoint.adapt.silent_expert import with_silent_expert
from ep_plugin.checkpoint.adapt.upcycle import KEPT
from ep_plugin.checkpoint.carried import check_carried
from ep_plugin.checkpoint.formats.dist_writer import write_checkpoint
from ep_plugin.checkpoint.names import stored, stored_name
from ep_plugin.checkpoint.open import Format, is_hf, safetensors
from ep_plugin.checkpoint.opened import Kept, ModelClass, Opened, Reclassed, Upcycled
from ep_plugin.checkpoint.tensors import NO_EXTRA_STATE, NewObject, NewTensor, one_region
from ep_plugin.checkpoint.writer import Journal, OnBytes
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import read_json

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_NEW = ("(new)",)  # the origin of what the source has no counterpart of

Hashes = dict[str, dict[str, Any]]  # file -> {num_bytes, sha256}


class Write(Protocol):
    """Writes below `root` what `journal` lacks; returns hashes of the files that hold tensors."""

    def __call__(
        self, *, root: Path, on_bytes: OnBytes, journal: Journal, processes: int
    ) -> Hashes: ...


@dataclass(frozen=True)
class Target:
    """What to write of a model."""

    model: Opened
    content: Sequence[NewTensor | NewObject]
    write: Write
    name_map: Sequence[tuple[str, str]]  # (names in the source, names in the result)
    args: argparse.Namespace  # of a run of this model
    iteration: str | None = None  # the folder below the target that holds the model; None: itself

    @property
    def tensors(self) -> list[NewTensor]:
        return [entry for entry in self.content if isinstance(entry, NewTensor)]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.info.num_bytes for tensor in self.tensors)


def fit_family(model: Opened, dense: Opened, output: Format, model_type: str | None) -> Opened:
    """Return the same function as a Hugging Face family has it; any other output keeps it as it is.

    `dense` is what `model` was before it got experts, or the same. Without `model_type`, the family
    is the source's, or the first whose models have these settings. Raises ConfigError for none.
    """
    if output != "hf":
        return model
    has_shared = getattr(model.args, "moe_shared_expert_intermediate_size", None)
    if model is not dense and getattr(model.args, "add_qkv_bias", False) and not has_shared:
        source, args = with_silent_expert(model.source, dense.source, model.args)
        model = replace(model, source=source, args=args)
    if fold_gemma.applies(model.args):
        source, args, lost = fold_gemma.fold(model.source, model.args)
        deviations = (*model.deviations, *lost)
        model = replace(model, source=source, args=args, deviations=deviations)
    chosen = families.load(model_type) if model_type else model.family
    return replace(model, family=chosen or families.recognise(model.args))


def aim(
    model: Opened,
    output: Format,
    implementation: str | None,
    to_class: ModelClass | None = None,
    pattern: str | None = None,
) -> Target:
    """Return what a folder of format `output` holds; reads no tensor.

    `implementation`: whose names a torch_dist checkpoint gets; None: those of the model.
    `to_class`, `pattern`: what a model under plain names, a GPT, is written as; None: a GPT, and
    the pattern without cuts. Raises ConfigError for what has no counterpart in a HybridModel.
    """
    if output == "hf":
        return _hf_folder(model)
    made = model.upcycled or model.kept or model.reclassed
    if made is not None and model.spelling == "stored":
        return _same_names(model, made)
    target = _new_names(model, implementation)
    return _as_hybrid(target, pattern) if to_class == "hybrid" else target


def _same_names(model: Opened, made: Upcycled | Kept | Reclassed) -> Target:
    source = model.source
    check_carried(source.common, model.folder)
    write = partial(write_checkpoint, source=source, common=source.common, content=made.content)
    return Target(model, made.content, write, made.name_map, model.args, source.folder.name)


def _new_names(model: Opened, implementation: str | None) -> Target:
    args = copy.copy(model.args)
    if implementation is not None:
        args.transformer_impl = implementation
    content = stored(model.source, args)
    targets = {name: (stored_name(name, args),) for name in model.source.tensors}
    return _named(model, args, content, _name_map(model, targets))


def _named(
    model: Opened,
    args: argparse.Namespace,
    content: Sequence[NewTensor | NewObject],
    name_map: Sequence[tuple[str, str]],
) -> Target:
    style = replace(
        model.source,
        common={"content_metadata": {"singleton_local_shards": False}},
        common_in_file=True,
    )
    kept = {key: model.source.common[key] for key in KEPT if key in model.source.common}
    common = {"args": args, **kept}
    check_carried(common, model.folder)
    write = partial(write_checkpoint, source=style, common=common, content=content)
    return Target(model, content, write, name_map, args, style.folder.name)


def _as_hybrid(gpt: Target, pattern: str | None) -> Target:
    """Return a GPT's content under the names of the HybridModel that it is."""
    model = replace(gpt.model, args=gpt.args)
    spelled, args = as_hybrid(model, pattern)
    content = [replace(entry, name=spelled(entry.name)) for entry in gpt.content]
    names = [(old, spelled(name)) for old, name in gpt.name_map]
    content = [*content, NewObject(ONLY_HYBRID, NO_EXTRA_STATE)]
    return _named(gpt.model, args, content, names)


def _hf_folder(model: Opened) -> Target:
    assert model.family is not None, "fit_family has chosen one"
    made = to_hf(model.source, model.family, model.args)
    config = _token_ids(model.folder) | made.common["config"]
    check_padding_token(model.folder, config["vocab_size"])
    targets = {pair.megatron: pair.hf for pair in families.pairs(model.family, model.args)}
    content = [
        NewTensor(name, info, partial(one_region, info, partial(made.read_tensor, name)))
        for name, info in made.tensors.items()
    ]
    format_ = safetensors()

    def write(*, root: Path, on_bytes: OnBytes, journal: Journal, processes: int) -> Hashes:
        hashes: Hashes = format_.write_folder(
            root, config, content, on_bytes, journal=journal, processes=processes
        )
        if is_hf(model.folder):
            format_.copy_beside(model.folder, root)
        return hashes

    return Target(model, content, write, _name_map(model, targets), model.args)


def _token_ids(path: Path) -> dict[str, Any]:
    """Return what config.json says of special tokens: where generation begins and ends."""
    config = _config(path)
    return {name: config[name] for name in SPECIAL if config.get(name) is not None}


def check_padding_token(path: Path, rows: int | None = None) -> None:
    """Raise ConfigError where transformers could not load a model of so many rows; None: the
    source's own.

    It builds the table of embeddings with the row of that token marked. Other special tokens are
    read by who generates alone.
    """
    config = _config(path)
    token, own = config.get("pad_token_id"), config.get("vocab_size")
    rows = own if rows is None else rows
    if type(token) is int and type(rows) is int and token >= rows:
        more = f"use --vocab-size {token + 1}, or " if type(own) is int and token < own else ""
        raise ConfigError(
            f"config.json has pad_token_id = {token}, and the vocabulary has {rows} rows; {more}"
            "set pad_token_id in config.json"
        )


def _config(path: Path) -> dict[str, Any]:
    """Return config.json; nothing of a Megatron checkpoint."""
    if not is_hf(path):
        return {}
    config: dict[str, Any] = read_json(path / "config.json", "copy the model again", by_hand=True)
    return config


def _name_map(model: Opened, targets: Mapping[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    rows = (
        (", ".join(model.origins.get(name, _NEW)), ", ".join(targets[name]))
        for name in model.source.tensors
    )
    return list(dict.fromkeys(rows))
