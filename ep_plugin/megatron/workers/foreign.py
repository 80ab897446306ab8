"""Megatron loads a checkpoint of somebody else's without reading a byte of its pickles.

Megatron plans which parts of which tensors a model takes; what it would unpickle for that is
written anew, from what our reader found: `.metadata`, and run arguments of plain values. The parts
themselves come from our reader too. Objects beside the tensors (the state of Transformer Engine's
layers) are empty ones: the layers that are built here have none. A HybridModel whose layers pair
up is loaded as the GPT that it is.
"""

import argparse
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException  # it is no Exception
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import LoadItemType
from torch.futures import Future

from ep_plugin.checkpoint.adapt.gpt_view import gpt_view
from ep_plugin.checkpoint.carried import is_plain
from ep_plugin.checkpoint.formats.dist_writer import write_common, write_metadata
from ep_plugin.checkpoint.formats.megatron_dist import open_stored
from ep_plugin.checkpoint.tensors import NO_EXTRA_STATE, Damaged, Stored
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import cut

_TENSORS, _OBJECTS = "tensors", "objects"  # files that are named and not there


@contextmanager
def as_megatron_loads(
    folder: Path,
    router: str | None,
    called: Path | None = None,
    instead: str = "use a checkpoint that it saved",
) -> Iterator[Path]:
    """Yield a folder that Megatron loads as it would the iteration in `folder`, for as long.

    `router` takes the place of the one in its run arguments. Raises Damaged, and ConfigError for
    whatever Megatron raises meanwhile: it names the folder as `called`, and ends with `instead`.
    """
    stored = gpt_view(open_stored(folder))
    with TemporaryDirectory(prefix="ep_plugin_") as name:
        view = Path(name)
        _write(view, stored, router)

        original = FileSystemReader.read_data

        def read_data(self: FileSystemReader, plan: Any, planner: Any) -> Future[None]:
            if Path(self.path) != view:
                return original(self, plan, planner)
            for item in plan.items:
                if item.type == LoadItemType.BYTE_IO:
                    planner.load_bytes(item, io.BytesIO(NO_EXTRA_STATE))
                else:
                    _read(stored, item, planner)
            done: Future[None] = Future()
            done.set_result(None)
            return done

        FileSystemReader.read_data = read_data  # type: ignore[method-assign]
        try:
            yield view
        except (ConfigError, MemoryError, torch.OutOfMemoryError):
            raise
        except (Exception, CheckpointException) as error:  # whatever Megatron says of wrong ones
            cause, name = _first(error), str(called or folder)
            words = f"{type(cause).__name__}: {cause}".replace(str(view), name)
            raise ConfigError(
                f"Megatron makes no model of the run arguments and tensors in {name} "
                f"({cut(words, 500)}); {instead}"
            ) from error
        finally:
            FileSystemReader.read_data = original  # type: ignore[method-assign]


def _first(error: BaseException) -> BaseException:
    """Return what went wrong on the first rank, where torch has collected that of all."""
    failures = error.failures if isinstance(error, CheckpointException) else {}
    return next((cause for cause, _ in failures.values()), error)


def _write(view: Path, stored: Stored, router: str | None) -> None:
    """Write what Megatron unpickles itself."""
    args = argparse.Namespace(
        **{name: value for name, value in vars(stored.common["args"]).items() if is_plain(value)}
    )
    if router is not None:
        args.ep_router = router
    args.async_save = False  # else Megatron may read through another package
    metadata = stored.common.get("content_metadata")
    common = {"args": args, "content_metadata": metadata if is_plain(metadata) else None}
    tensors = [
        {
            "name": name,
            "dtype": str(info.dtype).removeprefix("torch."),
            "shape": list(info.shape),
            "chunks": [[chunk.offsets, chunk.sizes, 0, 0] for chunk in stored.chunks[name]],
        }
        for name, info in stored.tensors.items()
    ]
    objects = [{"name": name, "chunks": [[[], [], 0, 0]]} for name in stored.objects]
    write_metadata(view, [(_TENSORS, tensors), (_OBJECTS, objects)])
    write_common(view, common)


def _read(stored: Stored, item: Any, planner: Any) -> None:
    """Copy the part of a tensor that Megatron asks for; raises Damaged."""
    index = item.storage_index
    info, offsets = stored.tensors[index.fqn], tuple(index.offset)
    chunk = next(chunk for chunk in stored.chunks[index.fqn] if chunk.offsets == offsets)
    values = stored.read_chunk(index.fqn, chunk)
    if values.dtype != info.dtype:
        raise Damaged(
            f"{index.fqn} in {stored.folder} is {values.dtype}, and .metadata says {info.dtype}; "
            "copy the checkpoint again"
        )
    for dim, (begin, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        values = torch.narrow(values, dim, begin, length)
    target = planner.resolve_tensor(item).detach()
    target.copy_(values)
    planner.commit_tensor(item, target)
