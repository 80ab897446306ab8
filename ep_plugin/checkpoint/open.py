"""Any checkpoint, opened: what its folder holds, and under which names its tensors are worked on.

    stored   the names and pieces that the folder has; what is written keeps them, optimizer state
             included: torch_dist to torch_dist
    plain    one spelling for all formats (`names.py`): every other way

Every step from here on is a `Source` whose `read_tensor` asks the one before it, so nothing is
computed until it is written, and then one tensor at a time.
"""

import argparse
import copy
from collections.abc import Collection
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ep_plugin.checkpoint import family as families
from ep_plugin.checkpoint.adapt.against_config import check_counts, check_size
from ep_plugin.checkpoint.adapt.hugging_face import arguments, left_out, to_megatron, with_dtype
from ep_plugin.checkpoint.adapt.model_class import as_class
from ep_plugin.checkpoint.adapt.upcycle import EMBEDDING, OUTPUT
from ep_plugin.checkpoint.carried import EXTRA_STATE, leave_out
from ep_plugin.checkpoint.complete import incomplete, not_there
from ep_plugin.checkpoint.formats import megatron_dist, megatron_legacy
from ep_plugin.checkpoint.moe_layers import hybrid_pattern
from ep_plugin.checkpoint.names import plain, stored_name
from ep_plugin.checkpoint.opened import Opened, Origins
from ep_plugin.checkpoint.run_args import check_counters, check_num_layers, checked
from ep_plugin.checkpoint.tensors import NO_EXTRA_STATE, Source, TensorInfo, finite
from ep_plugin.checkpoint.whole import problems
from ep_plugin.errors import BackendUnavailable, ConfigError
from ep_plugin.extras import pip_install
from ep_plugin.registry import HOME
from ep_plugin.untrusted import shown

Format = Literal["megatron", "hf"]
Kind = Literal["hf", "per-rank", "torch_dist"]
TABLES = (EMBEDDING, OUTPUT)


def is_hf(path: Path) -> bool:
    """Whether `path` is a Hugging Face model."""
    return (path / "config.json").is_file()


def kind_of(path: Path) -> Kind:
    """Return what a folder holds; what is neither of the others is left to torch_dist's reader.

    Raises ConfigError when it is no folder.
    """
    if not path.is_dir():
        raise ConfigError(f"checkpoint {path} is not a folder; give the folder that --save named")
    if is_hf(path):
        return "hf"
    folders = [path, *(child for child in path.glob("*") if child.is_dir())]
    ranks = (folder.glob(f"mp_rank_*/{megatron_legacy.FILE}") for folder in folders)
    return "per-rank" if any(any(found) for found in ranks) else "torch_dist"


def open_source(
    path: Path,
    output: Format,
    vocab_size: int | None = None,
    left_out: Collection[str] = (),
    router: str | None = None,
    hybrid: bool = False,
) -> Opened:
    """Open a checkpoint of any format, to be written as `output`. Reads no tensor but tied ones.

    `vocab_size`: rows of the vocabulary that do not pad it; None: what the checkpoint says.
    `left_out`: run arguments of a Megatron checkpoint that are to be forgotten; `router`: the
    module of the user's that it was trained with; `hybrid`: whether a HybridModel is read; it is
    opened as the GPT that it is where the output is Hugging Face's.
    Reading a value that is NaN or infinite is a ConfigError. Raises ConfigError for a checkpoint
    that is incomplete, contradicts itself or is of no known family, or has fewer rows.
    """
    kind = kind_of(path)
    opened = (
        _open_hf(path, output)
        if kind == "hf"
        else _open_megatron(path, kind, output, left_out, router)
    )
    _check_class(opened.args, path, hybrid)
    size = vocab_size or getattr(opened.args, "ep_vocab_size", None)
    return opened if size is None else _without_padding(opened, size)


def _check_class(args: argparse.Namespace, path: Path, hybrid: bool) -> None:
    """Raise ConfigError for a HybridModel where GPTs alone are read, and for any MambaModel."""
    if pattern := getattr(args, "hybrid_override_pattern", None):
        raise ConfigError(
            f"{path} holds a MambaModel ({shown(pattern)}), which is not read here; give a "
            "checkpoint of a GPT"
        )
    if not hybrid and (pattern := getattr(args, "hybrid_layer_pattern", None)):
        raise ConfigError(
            f"{path} holds a HybridModel ({shown(pattern)}), whose layers are named otherwise than "
            "a GPT's, which alone is read here; make a GPT of it with ep-plugin convert --from "
            f"{path} --to {path}-gpt --model-class gpt"
        )


def _without_padding(model: Opened, size: int) -> Opened:
    """Return the model without the rows that pad its vocabulary; where names stay, rows do too.

    The size travels in the arguments either way: Megatron pads it anew for its layout.
    """
    table = model.source.tensors.get(EMBEDDING)
    rows = table.shape[0] if table is not None and table.shape else 0
    if not isinstance(size, int) or not 0 < size <= rows:
        raise ConfigError(
            f"a vocabulary of {shown(size)} is asked for, and {EMBEDDING} in {model.folder} has "
            f"{rows} rows; use --vocab-size {rows}"
        )
    args = copy.copy(model.args)
    args.ep_vocab_size = size
    if model.spelling == "stored":
        return replace(model, args=args, source=_with_args(model.source, args))
    args.padded_vocab_size, whole = size, model.source
    tensors = {
        name: TensorInfo((size, *info.shape[1:]), info.dtype) if name in TABLES else info
        for name, info in whole.tensors.items()
    }

    def read_tensor(name: str) -> Tensor:
        values = whole.read_tensor(name)
        return values[:size] if name in TABLES else values

    source = replace(_with_args(whole, args), tensors=tensors, read_tensor=read_tensor)
    return replace(model, args=args, source=source, cut_rows=rows - size)


def check_required(model: Opened) -> None:
    """Raise ConfigError where a parameter is missing that the model's run arguments ask for."""
    for name, wrong in not_there(model.source.tensors, model.args):
        raise ConfigError(f"{name} {wrong}, in {model.folder}; copy the checkpoint again")
    number = getattr(model.args, "num_experts", None)
    counts = getattr(model.args, "ep_experts_per_layer", None) or (number,)
    for name, info in model.source.tensors.items():
        if name.endswith(".mlp.router.weight") and not {*info.shape[:1]} & {*counts}:
            raise ConfigError(
                f"{name} in {model.folder} has shape {list(info.shape)}, and the run arguments say "
                f"{shown(number)} experts; copy the checkpoint again"
            )
        router, at, _ = name.partition(".experts.experts.linear_")
        rows = model.source.tensors.get(f"{router}.router.weight") if at else None
        if rows is not None and info.shape[:1] != rows.shape[:1]:
            raise ConfigError(
                f"{name} in {model.folder} has shape {list(info.shape)}, and its router "
                f"{list(rows.shape)}; copy the checkpoint again"
            )


def _with_args(source: Source, args: argparse.Namespace) -> Source:
    """Return the source with other run arguments."""
    return replace(source, common=source.common | {"args": args})


def _open_megatron(
    path: Path, kind: Kind, output: Format, left_out: Collection[str], router: str | None
) -> Opened:
    opener = megatron_dist if kind == "torch_dist" else megatron_legacy
    source = finite(opener.open_checkpoint(path))
    args = source.common.get("args")
    if not isinstance(args, argparse.Namespace):
        raise ConfigError(
            f"{source.folder} holds no run arguments; give a checkpoint that Megatron saved"
        )
    args = _with_router(leave_out(args, left_out), router, source.folder)
    _check_modules(args, source.folder)
    check_counters(source.common, source.folder)
    args = checked(args, source.folder)
    check_num_layers(args, source.tensors, source.folder)
    for name, wrong in incomplete(source.tensors, args):
        raise ConfigError(f"{name} {wrong}, in {source.folder}; copy the checkpoint again")
    source = _with_args(source, args)
    if EXTRA_STATE in left_out:
        source, emptied = _without_states(source)
    else:
        emptied = ()
    same: Origins = {name: (name,) for name in source.tensors}
    opened = Opened(source.folder, source, args, "stored", same, emptied=emptied)
    if kind == "torch_dist" and output == "megatron":
        return opened
    if kind == "torch_dist" and hybrid_pattern(args):  # a family is of GPTs
        opened = replace(as_class(opened, "gpt", None, keep_optimizer=False), reclassed=None)
    return _in_plain(opened, output)


def _in_plain(model: Opened, output: Format) -> Opened:
    """Return a GPT under plain names."""
    source, args = model.source, model.args
    # Only Megatron's layers have a place for what nothing here reads.
    gone, empty = (source.unread, ()) if output == "hf" else ((), source.unread)
    emptied = (*model.emptied, *empty)
    source = plain(source, args)
    names = {name: stored_name(name, args) for name in source.tensors}
    origins = {name: model.origins.get(stored, (stored,)) for name, stored in names.items()}
    return Opened(model.folder, source, args, "plain", origins, left_out=gone, emptied=emptied)


def _without_states(source: Source) -> tuple[Source, tuple[str, ...]]:
    """Return the source with every layer's state empty, and their names; other objects stay."""
    names = tuple(sorted(name for name in source.objects if EXTRA_STATE in name))
    if not names:
        raise ConfigError(
            f"--leave-out {EXTRA_STATE}: {source.folder} has none that would be copied; leave "
            f"{EXTRA_STATE} out of --leave-out"
        )
    read = source.read_object
    emptied = replace(
        source, read_object=lambda name: NO_EXTRA_STATE if EXTRA_STATE in name else read(name)
    )
    return emptied, names


def _with_router(args: argparse.Namespace, router: str | None, folder: Path) -> argparse.Namespace:
    """Return the arguments with the router that was typed, where theirs is a user's module.

    Its name is imported, so it is never taken from a checkpoint; raises ConfigError without one.
    """
    said = getattr(args, "ep_router", None)
    own = (type(said) is not str and said is not None) or "." in (said or "")
    if own and router is None:
        raise ConfigError(
            f"{folder} was trained with the router {shown(said)}, a module that would be imported; "
            "if it is yours, use --router with its name, such as --router my_package.my_router"
        )
    if router is None:
        return args
    if not own or "." not in router:
        raise ConfigError(
            f"--router {router} is for a checkpoint that was trained with a router of your own, "
            f"named with a dot; its router is {shown(said or 'topk')}; leave --router out"
        )
    args = copy.copy(args)
    args.ep_router = router
    return args


def _check_modules(args: argparse.Namespace, folder: Path) -> None:
    """Raise ConfigError where another option is a user's module: a run would import it."""
    for kind in HOME:
        said = getattr(args, name := f"ep_{kind}", None)
        if kind != "router" and said is not None and (type(said) is not str or "." in said):
            raise ConfigError(
                f"{folder} was trained with {name} = {shown(said)}, a module that would be "
                f"imported; use --leave-out {name}, and give the run --ep-{kind} anew"
            )


def _open_hf(path: Path, output: Format) -> Opened:
    source = safetensors().open_folder(path)
    if output == "hf":
        safetensors().files_beside(path)  # raises for what must not go along
    config = source.common["config"]
    if "model_type" not in config:
        legal = ", ".join(families.names())
        raise ConfigError(f"{path / 'config.json'} has no model_type; set it to one of {legal}")
    family = families.load(str(config["model_type"]))
    check_counts(config, source.tensors, family)
    args = arguments(with_dtype(config, source), family)
    check_size(args, len(source.tensors), family)
    origins = {pair.megatron: pair.hf for pair in families.pairs(family, args)}
    unused = tuple(sorted(left_out(source, family)))
    source = to_megatron(finite(source), family, args)
    return Opened(path, source, args, "plain", origins, family, unused)


def stored_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Return the tensors that a folder which `convert` wrote holds, under their stored names.

    Raises ConfigError for a folder that cannot be opened.
    """
    if is_hf(folder):
        found: dict[str, TensorInfo] = safetensors().open_folder(folder).tensors
        return found
    stored = megatron_dist.open_stored(folder)
    for name, wrong in problems(stored):
        raise ConfigError(f"{name} in {stored.folder} {wrong}; convert the source again")
    return stored.tensors


def safetensors() -> Any:
    """Return the format's module; its package is needed by those alone who use it."""
    try:
        return import_module("ep_plugin.checkpoint.formats.hf_safetensors")
    except ImportError as error:
        raise BackendUnavailable(
            f"Hugging Face folders need safetensors ({error}); use {pip_install('hf')}"
        ) from error
