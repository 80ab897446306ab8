"""Tensors mapped out of the middle of a file, against torch.load."""

import io
import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ep_plugin.checkpoint.formats import _dcp_reader
from ep_plugin.checkpoint.formats._mapped import map_tensor
from ep_plugin.checkpoint.inert import Unreadable

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def placed(tmp_path: Path, values: object, before: int) -> tuple[Path, int, int]:
    """Save `values` behind `before` other bytes and before some more."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    path = tmp_path / "file"
    path.write_bytes(b"x" * before + buffer.getvalue() + b"y" * 77)
    return path, before, len(buffer.getvalue())


@pytest.mark.parametrize("before", [0, 1, 4096, 12345])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_those_saved(tmp_path: Path, dtype: torch.dtype, before: int) -> None:
    values = (torch.randn(7, 5) * 3).abs().to(dtype)
    mapped = map_tensor(*placed(tmp_path, values, before)).clone()
    assert mapped.dtype == dtype
    assert torch.equal(mapped.view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize(
    "values",
    [
        torch.arange(24.0).view(4, 6)[1:3, ::2],
        torch.arange(6.0).view(2, 3).T,
        torch.zeros(0, 3),
        torch.tensor(2.5),
        torch.nn.Parameter(torch.ones(3)),
    ],
    ids=["view", "transposed", "empty", "scalar", "parameter"],
)
def test_every_kind_of_tensor(tmp_path: Path, values: Tensor) -> None:
    mapped = map_tensor(*placed(tmp_path, values, 33))
    assert mapped.shape == values.shape
    assert torch.equal(mapped.clone(), values.detach())


def test_changes_stay_in_memory(tmp_path: Path) -> None:
    where = placed(tmp_path, torch.ones(4), 8)
    map_tensor(*where).fill_(3)
    assert torch.equal(map_tensor(*where).clone(), torch.ones(4))


def test_nothing_else_is_unpickled(tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match="it holds no tensor"):
        map_tensor(*placed(tmp_path, [print], 0))


def test_a_chunk_is_summed_once_for_all_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers are forked; what one of them has summed, no other sums again."""
    torch.save(torch.arange(6.0), tmp_path / "__0_0.distcp")
    shape, offset = torch.Size([6]), torch.Size([0])
    entry = TensorStorageMetadata(
        TensorProperties(dtype=torch.float32), shape, [ChunkStorageMetadata(offset, shape)]
    )
    size = (tmp_path / "__0_0.distcp").stat().st_size
    stored = {MetadataIndex("weight", offset): _StorageInfo("__0_0.distcp", 0, size)}
    files = _dcp_reader.Files(tmp_path, Metadata({"weight": entry}, storage_data=stored))
    (chunk,) = files.chunks("weight")
    worker = multiprocessing.get_context("fork").Process(
        target=files.read_chunk, args=("weight", chunk), daemon=True
    )
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    summed: list[Path] = []
    monkeypatch.setattr(_dcp_reader, "check_sums", lambda path, *_: summed.append(path))
    assert files.read_chunk("weight", chunk).tolist() == [0, 1, 2, 3, 4, 5]
    assert not summed
