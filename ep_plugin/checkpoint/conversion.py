"""From a folder to what is to be written: which format it is, experts or not, which format it gets.

    source -> plain Megatron names -> (experts) -> Megatron's stored names, or a family's

Every arrow is a `Source` whose `read_tensor` asks the one before it, so nothing is computed until
it is written, and then one tensor at a time.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from ep_plugin.checkpoint import family as families
from ep_plugin.checkpoint import manifest
from ep_plugin.checkpoint.adapt import fold_gemma
from ep_plugin.checkpoint.adapt.hugging_face import arguments, left_out, to_hf, to_megatron
from ep_plugin.checkpoint.adapt.silent_expert import with_silent_expert
from ep_plugin.checkpoint.adapt.upcycle import Upcycling, plan
from ep_plugin.checkpoint.family import Family
from ep_plugin.checkpoint.formats import megatron_dist, megatron_legacy
from ep_plugin.checkpoint.names import plain, stored, stored_name
from ep_plugin.checkpoint.regions import whole
from ep_plugin.checkpoint.run_flags import run_flags
from ep_plugin.checkpoint.staging import Staging
from ep_plugin.checkpoint.tensors import NewObject, NewTensor, Region, Source, finite
from ep_plugin.checkpoint.writer import OnBytes
from ep_plugin.errors import BackendUnavailable, ConfigError

_KEPT = ("checkpoint_version", "iteration", "num_floating_point_operations_so_far")

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")

_Names = dict[str, tuple[str, ...]]
_NEW = ("(new)",)  # the origin of what the source has no counterpart of


@dataclass(frozen=True)
class Opened:
    """A checkpoint under plain names, its arguments, and where each tensor comes from."""

    source: Source
    args: argparse.Namespace
    origins: _Names  # plain name -> names in the folder
    family: Family | None = None  # of a Hugging Face model
    left_out: tuple[str, ...] = ()
    deviations: tuple[str, ...] = ()  # why experts do not keep the function; empty: they do


@dataclass(frozen=True)
class Result:
    """What to write. `write(staging, processes, on_bytes)` returns the folder that then holds the
    model."""

    content: list[NewTensor | NewObject]
    write: Callable[[Staging, int, OnBytes], Path]
    name_map: list[tuple[str, str]]  # (names in the source, names in the result)
    family: str | None
    left_out: tuple[str, ...]
    flags: list[str]  # that ask Megatron for this model
    deviations: tuple[str, ...] = ()

    @property
    def tensors(self) -> list[NewTensor]:
        return [entry for entry in self.content if isinstance(entry, NewTensor)]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.info.num_bytes for tensor in self.tensors)


def is_hf(path: Path) -> bool:
    """Whether `path` is a Hugging Face model."""
    return (path / "config.json").is_file()


def is_stored(path: Path) -> bool:
    """Whether `path` is neither that nor Megatron's per-rank files, so that torch_dist is left."""
    return not is_hf(path) and not megatron_legacy.is_checkpoint(path)


def open_source(path: Path) -> Opened:
    """Open a checkpoint of any format. Reads no tensor but those of tied embeddings.

    Raises ConfigError for one that is incomplete, contradicts itself or is of no known family.
    """
    if is_hf(path):
        return _open_hf(path)
    opener = megatron_dist if is_stored(path) else megatron_legacy
    source = opener.open_checkpoint(path)
    args = source.common.get("args")
    if not isinstance(args, argparse.Namespace):
        raise ConfigError(f"{source.folder} holds no run arguments; give one that Megatron saved")
    source = plain(finite(source), args)
    return Opened(source, args, {name: (stored_name(name, args),) for name in source.tensors})


def with_experts(opened: Opened, settings: Upcycling) -> Opened:
    """Return the checkpoint that upcycling makes of this one, not computed yet."""
    args = copy.copy(opened.args)
    args.transformer_impl = "transformer_engine"  # whose names plain ones are
    common = {**opened.source.common, "args": args}
    common["content_metadata"] = {"singleton_local_shards": True}
    new = plan(replace(opened.source, common=common), settings)
    tensors = {entry.name: entry for entry in new.content if isinstance(entry, NewTensor)}

    origins = {}
    for old, target in new.name_map:
        for expert in range(settings.num_experts) if "*" in target else (0,):
            origins[target.replace("*", str(expert))] = opened.origins.get(old, _NEW)
    source = replace(
        opened.source,
        common=new.common,
        tensors={name: entry.info for name, entry in tensors.items()},
        read_tensor=lambda name: whole(tensors[name]),
    )
    made = new.common["args"]
    made.transformer_impl = getattr(opened.args, "transformer_impl", "transformer_engine")
    made.moe_token_dispatcher_type = "alltoall"
    return Opened(source, made, origins, left_out=opened.left_out, deviations=new.deviations)


def to_megatron_checkpoint(opened: Opened, implementation: str | None) -> Result:
    """Return what a torch_dist checkpoint holds, under the names of `implementation`."""
    args = copy.copy(opened.args)
    if implementation is not None:
        args.transformer_impl = implementation
    style = replace(
        opened.source,
        common={"content_metadata": {"singleton_local_shards": False}},
        common_in_file=True,
    )
    kept = {key: opened.source.common[key] for key in _KEPT if key in opened.source.common}
    content = stored(opened.source, args)

    def write(staging: Staging, processes: int, on_bytes: OnBytes) -> Path:
        written = megatron_dist.write_checkpoint(
            *(staging.folder, style, {"args": args, **kept}, content, on_bytes),
            *(staging.journal, processes),
        )
        manifest.write(staging.folder, written, content, {"format": "megatron"})
        return staging.folder / style.folder.name

    targets: _Names = {name: (stored_name(name, args),) for name in opened.source.tensors}
    name = opened.family.model_type if opened.family else None
    rows = _name_map(opened, targets)
    return Result(content, write, rows, name, opened.left_out, run_flags(args), opened.deviations)


def to_hf_folder(opened: Opened, dense: Opened, model_type: str | None, path: Path) -> Result:
    """Return what a Hugging Face folder holds.

    `dense` is what `opened` was before it got experts, or the same; `path` is where it came from.
    """
    has_shared = getattr(opened.args, "moe_shared_expert_intermediate_size", None)
    if opened is not dense and getattr(opened.args, "add_qkv_bias", False) and not has_shared:
        source, args = with_silent_expert(opened.source, dense.source, opened.args)
        opened = replace(opened, source=source, args=args)
    if fold_gemma.applies(opened.args):
        source, args, lost = fold_gemma.fold(opened.source, opened.args)
        opened = replace(opened, source=source, args=args, deviations=(*opened.deviations, *lost))
    chosen = families.load(model_type) if model_type else opened.family
    family = chosen or families.recognise(opened.args)
    made = to_hf(opened.source, family, opened.args)
    config = _token_ids(path) | made.common["config"]
    targets: _Names = {pair.megatron: pair.hf for pair in families.pairs(family, opened.args)}
    content = [
        NewTensor(name, info, partial(_one_region, made, name))
        for name, info in made.tensors.items()
    ]
    safetensors = _safetensors()

    def write(staging: Staging, processes: int, on_bytes: OnBytes) -> Path:
        written = safetensors.write_folder(
            *(staging.folder, config, content, on_bytes),
            *(safetensors.MAX_SHARD_BYTES, staging.journal, processes),
        )
        if is_hf(path):
            safetensors.copy_beside(path, staging.folder)
        manifest.write(staging.folder, written, content, {"format": "hf"})
        return staging.folder

    rows = _name_map(opened, targets)
    flags = run_flags(opened.args)
    return Result(
        [*content], write, rows, family.model_type, opened.left_out, flags, opened.deviations
    )


def _token_ids(path: Path) -> dict[str, Any]:
    """Return what config.json says of special tokens: where generation begins and ends."""
    if not is_hf(path):
        return {}
    config = json.loads((path / "config.json").read_text())
    return {name: config[name] for name in _SPECIAL if config.get(name) is not None}


def _open_hf(path: Path) -> Opened:
    source = _safetensors().open_folder(path)
    config = source.common["config"]
    if "model_type" not in config:
        legal = ", ".join(families.names())
        raise ConfigError(f"{path / 'config.json'} has no model_type; supported are {legal}")
    family = families.load(str(config["model_type"]))
    args = arguments(config, family)
    origins = {pair.megatron: pair.hf for pair in families.pairs(family, args)}
    unused = tuple(sorted(left_out(source, family)))
    return Opened(to_megatron(finite(source), family, args), args, origins, family, unused)


def _safetensors() -> Any:
    """Return the format's module; its package is needed by those alone who use it."""
    try:
        return import_module("ep_plugin.checkpoint.formats.hf_safetensors")
    except ImportError as error:
        raise BackendUnavailable(
            f"Hugging Face folders need safetensors ({error}); install 'ep-plugin[hf]'"
        ) from error


def _one_region(source: Source, name: str) -> Iterator[Region]:
    values = source.read_tensor(name)
    yield Region((0,) * values.dim(), values)


def _name_map(opened: Opened, targets: _Names) -> list[tuple[str, str]]:
    rows = (
        (", ".join(opened.origins.get(name, _NEW)), ", ".join(targets[name]))
        for name in opened.source.tensors
    )
    return list(dict.fromkeys(rows))
