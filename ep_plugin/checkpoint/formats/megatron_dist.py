"""Megatron's `torch_dist` checkpoints, read by one process without a process group.

A checkpoint folder holds `latest_checkpointed_iteration.txt` and `iter_NNNNNNN/`, which holds

    metadata.json      {"sharded_backend": "torch_dist", ...}
    .metadata          pickle: each tensor's global shape; each chunk's file, offset and length
    __R_T.distcp       the chunks, one after the other, each a `torch.save` of its own
    common.pt          run arguments and counters; newer: the object `common_state/shard_0_1`

`dist_writer.py` writes them.

Blocks whose layers are alike are stored with the layers stacked on a leading axis:

    stored   decoder.layers.mlp.linear_fc2.weight                   [L, H, F]
    listed   decoder.layers.0.mlp.linear_fc2.weight ... L - 1       [H, F] each

Objects carry their place in the name: `decoder.layers.X/shard_{layer}_{L}` is listed as
`decoder.layers.{layer}.X/shard_0_1`. What is written is never stacked, and says so in its
`content_metadata` (`non_homogeneous_layers`): such a checkpoint loads whichever layers are MoE
layers and however `--moe-layer-freq` is spelled.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import MetadataIndex

from ep_plugin.checkpoint.carried import check_copied
from ep_plugin.checkpoint.formats._dcp_reader import Files, Reader
from ep_plugin.checkpoint.formats._iteration import COMMON_STATE as COMMON_STATE
from ep_plugin.checkpoint.formats._iteration import (
    CONFIG,
    inside,
    load_common,
    load_metadata,
    load_object,
    read_small,
)
from ep_plugin.checkpoint.formats._iteration import TRACKER as TRACKER
from ep_plugin.checkpoint.formats._iteration import iteration_folder as _iteration_folder
from ep_plugin.checkpoint.inert import Unreadable, explained
from ep_plugin.checkpoint.tensors import Damaged, Source, Stored
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import read_json

FIRST_ITERATION = "iter_0000001"
_HINT = "save the dense model with --ckpt-format torch_dist"


def iteration_folder(path: Path) -> Path:
    """Return the folder of one iteration; `path` is that, or what --save named.

    Raises ConfigError when there is none, or it is of another format.
    """
    folder = _iteration_folder(path, _is_iteration)
    config = folder / "metadata.json"
    if not config.is_file():
        raise ConfigError(f"{folder} has no metadata.json, so it is not torch_dist; {_HINT}")
    backend = read_json(inside(config, folder), _HINT).get("sharded_backend")
    if not isinstance(backend, str):
        raise ConfigError(f"{config} names no sharded_backend; {_HINT}")
    if backend != CONFIG["sharded_backend"]:
        raise ConfigError(f"{folder} is a {backend[:80]!r} checkpoint, not torch_dist; {_HINT}")
    return folder


def open_checkpoint(path: Path) -> Source:
    """Open the checkpoint at `path`: the folder with the tracker file, or an iteration's own.

    Raises ConfigError when it is missing, of another format, or incomplete. Reads no tensor.
    """
    folder = iteration_folder(path)
    if folder.name != "release" and not re.fullmatch(r"iter_\d{7,}", folder.name):
        raise ConfigError(
            f"{folder} is not named as Megatron names an iteration's folder; "
            "rename it to iter_ and the iteration in seven digits, such as iter_0001000"
        )
    common_in_file = (folder / "common.pt").is_file()
    if common_in_file:
        common = _common_file(folder)
    reader = Reader(folder, load_metadata(folder))
    if not common_in_file:
        if COMMON_STATE not in reader.objects:
            raise ConfigError(
                f"{folder} has no run arguments (neither common.pt nor {COMMON_STATE}); "
                "give a checkpoint that Megatron itself saved"
            )
        common = load_common(reader.read_object(COMMON_STATE), folder, listed=True)
    return Source(
        folder=folder,
        common=common,
        common_in_file=common_in_file,
        tensors=reader.tensors,
        objects=frozenset(reader.objects) - {COMMON_STATE},
        read_tensor=reader.read_tensor,
        read_object=partial(_object_to_copy, reader, folder),
    )


def _object_to_copy(reader: Reader, folder: Path, name: str) -> bytes:
    """Return an object's bytes, which whoever loads the copy unpickles; raises ConfigError."""
    content = reader.read_object(name)
    try:
        value = load_object(content)
    except Unreadable as error:
        raise Damaged(f"{name} in {folder} {explained(error)}") from error
    check_copied(name, value, folder)
    return content


def read_common(path: Path) -> dict[str, Any]:
    """Return what stands beside the tensors of the checkpoint at `path`.

    Raises as `open_stored`.
    """
    folder = iteration_folder(path)
    if (folder / "common.pt").is_file():
        return _common_file(folder)
    return _common_object(Files(folder, load_metadata(folder)))


def _common_object(files: Files) -> dict[str, Any]:
    content = files.read_bytes(MetadataIndex(COMMON_STATE))
    return load_common(content, files.folder, listed=True)


def _common_file(folder: Path) -> dict[str, Any]:
    return load_common(read_small(folder / "common.pt", folder), folder)


def open_stored(path: Path) -> Stored:
    """Open the checkpoint at `path` as `open_checkpoint` does, and check nothing of its content.

    Raises ConfigError when it is none of Megatron's, Damaged when it does not say what it holds.
    """
    folder = iteration_folder(path)
    files = Files(folder, load_metadata(folder))
    in_file = (folder / "common.pt").is_file()
    common = _common_file(folder) if in_file else _common_object(files)
    entries = files.metadata.state_dict_metadata
    return Stored(
        folder=folder,
        common=common,
        tensors={key: files.info(key) for key in files.entries},
        chunks={key: files.chunks(key) for key in files.entries},
        objects=frozenset(entries) - set(files.entries) - {COMMON_STATE},
        read_chunk=files.read_chunk,
        ranges=files.ranges(),
        read_object=files.read_object,
        unsummed=files.unsummed,
    )


def _is_iteration(folder: Path) -> bool:
    return (folder / ".metadata").is_file() or (folder / "metadata.json").is_file()
