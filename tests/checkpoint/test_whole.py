"""Bytes that are not those that were written, or not where `.metadata` says: found, and not copied.

A healthy checkpoint is damaged in one place, drawn at random; then `audit` names what is damaged
there, and `convert --skip-parity` writes nothing.
"""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stored
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from ep_plugin.checkpoint.tensors import Chunk, Range
from ep_plugin.checkpoint.whole import misplaced, other_kind, overlapping
from ep_plugin.cli import main
from ep_plugin.errors import ConfigError
from tests.commands.test_convert import convert, dense_tensors, save_dense

OFTEN = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
Change = Callable[[Metadata], object]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("healthy") / "dense"
    save_dense(root)
    return root


def copied(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("damaged") / "dense"
    shutil.copytree(source, root)
    return root


def metadata_of(root: Path) -> Metadata:
    (path,) = root.glob("iter_*/.metadata")
    metadata = pickle.loads(path.read_bytes())
    assert isinstance(metadata, Metadata)
    return metadata


def rewrite(root: Path, metadata: Metadata) -> None:
    (path,) = root.glob("iter_*/.metadata")
    path.write_bytes(pickle.dumps(metadata))


def audit(root: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return whether anything is wrong but that the optimizer is not whole, and what is said."""
    capsys.readouterr()
    code = main(["audit", str(root), "--json"])
    said = capsys.readouterr()
    if code == 2:
        return code, said.err
    findings = [one for one in json.loads(said.out)["findings"] if one["check"] != "optimizer"]
    return int(bool(findings)), json.dumps(findings)


def not_copied(root: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Convert, be refused, and find nothing left behind; returns the sentence."""
    capsys.readouterr()
    assert convert(root, root.parent / "moe") == 2
    assert [path.name for path in root.parent.iterdir()] == [root.name]
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    return sentence


@OFTEN
@given(data=st.data())
def test_bytes_that_were_not_written_are_found(
    dense: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    data: st.DataObject,
) -> None:
    """Any range of any tensor's or object's archive, zeroed or inverted; its padding binds none."""
    root = copied(dense, tmp_path_factory)
    stored_data = metadata_of(root).storage_data
    index = data.draw(st.sampled_from(sorted(stored_data, key=str)))
    info = stored_data[index]
    (path,) = root.glob(f"iter_*/{info.relative_path}")
    content = bytearray(path.read_bytes())
    begin = data.draw(st.integers(0, info.length - 1)) + info.offset
    end = data.draw(
        st.integers(begin + 1, info.offset + info.length) | st.just(info.offset + info.length)
    )
    old = bytes(content[begin:end])
    new = data.draw(st.sampled_from([bytes(end - begin), bytes(255 ^ byte for byte in old)]))
    content[begin:end] = new
    path.write_bytes(content)
    code, findings = audit(root, capsys)
    if code == 0:
        assert _same_values(dense, root)
    else:
        assert index.fqn in findings or "run arguments" in findings
    shutil.rmtree(root.parent)


@OFTEN
@given(data=st.data())
def test_values_that_were_not_written_are_found(
    dense: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    data: st.DataObject,
) -> None:
    """Within the values of one tensor, so that its archive can be read: one byte, or all zero."""
    root = copied(dense, tmp_path_factory)
    tensors = dense_tensors()
    name = data.draw(st.sampled_from([name for name in tensors if "optimizer" not in name]))
    values = tensors[name].numpy().tobytes()
    (path,) = (p for p in root.glob("iter_*/*.distcp") if values in p.read_bytes())
    content = bytearray(path.read_bytes())
    begin = content.find(values)
    if data.draw(st.booleans()):
        content[begin : begin + len(values)] = bytes(len(values))
    else:
        at, bit = data.draw(st.integers(0, len(values) - 1)), data.draw(st.integers(0, 7))
        content[begin + at] ^= 1 << bit
    path.write_bytes(content)
    code, findings = audit(root, capsys)
    assert code == 1
    assert name in findings
    assert "other bytes than were written" in findings
    assert f"tensor {name} at" in not_copied(root, capsys)
    shutil.rmtree(root.parent)


def _same_values(one: Path, other: Path) -> bool:
    """Whether torch's own reader finds the same in both."""
    import torch.distributed.checkpoint as dcp

    found = []
    for root in (one, other):
        shapes = metadata_of(root).state_dict_metadata
        state: dict[str, Any] = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in shapes.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        (folder,) = root.glob("iter_*")
        dcp.load(state, checkpoint_id=folder, no_dist=True)
        found.append(state)
    return all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@OFTEN
@given(data=st.data())
def test_what_lies_on_something_else_is_found(
    dense: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    data: st.DataObject,
) -> None:
    root = copied(dense, tmp_path_factory)
    metadata = metadata_of(root)
    indices = sorted(metadata.storage_data, key=str)
    one = data.draw(st.sampled_from(indices))
    other = data.draw(st.sampled_from([index for index in indices if index != one]))
    swap = data.draw(st.booleans())
    places = metadata.storage_data
    before = places[one], places[other]
    places[one], places[other] = before[1], before[0] if swap else before[1]
    if swap and _alike(metadata, one, other):
        return  # which of two alike is which, nothing says
    rewrite(root, metadata)
    code, findings = audit(root, capsys)
    assert code in (1, 2)
    assert one.fqn in findings or other.fqn in findings or "run arguments" in findings
    if not swap:
        not_copied(root, capsys)
    shutil.rmtree(root.parent)


def _alike(metadata: Metadata, *indices: Any) -> bool:
    """Whether both are tensors' parts of one shape and dtype, or both objects."""
    kinds = set()
    for index in indices:
        entry = metadata.state_dict_metadata[index.fqn]
        if isinstance(entry, TensorStorageMetadata):
            (sizes,) = {tuple(chunk.sizes) for chunk in entry.chunks}
            kinds.add((sizes, entry.properties.dtype))
        else:
            kinds.add("common" if "common" in index.fqn else "object")
    return len(kinds) == 1


def change_dtype(entry: TensorStorageMetadata) -> None:
    entry.properties = TensorProperties(dtype=torch.int32)


def change_wider(entry: TensorStorageMetadata) -> None:
    entry.properties = TensorProperties(dtype=torch.float64)


def change_narrower(entry: TensorStorageMetadata) -> None:
    entry.properties = TensorProperties(dtype=torch.bfloat16)


def change_size(entry: TensorStorageMetadata) -> None:
    entry.size = torch.Size([entry.size[0] + 1, *entry.size[1:]])


def change_huge(entry: TensorStorageMetadata) -> None:
    size = torch.Size([2**40, *entry.size[1:]])
    entry.size, entry.chunks = size, [ChunkStorageMetadata(torch.Size([0] * len(size)), size)]


def change_hole(entry: TensorStorageMetadata) -> None:
    """As many elements as there should be, one row twice and one not at all."""
    (chunk,) = entry.chunks
    half = torch.Size([chunk.sizes[0] // 2, *chunk.sizes[1:]])
    rest = [0] * (len(half) - 1)
    entry.chunks = [ChunkStorageMetadata(torch.Size([at, *rest]), half) for at in (0, 1)]


@pytest.mark.parametrize(
    "change",
    [change_dtype, change_wider, change_narrower, change_size, change_huge, change_hole],
)
def test_a_tensor_is_what_metadata_says(
    dense: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[TensorStorageMetadata], None],
) -> None:
    """Turned into zeros or other values by nobody: refused by `convert`, named by `audit`."""
    names = [
        name
        for name, entry in metadata_of(dense).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer")
    ]
    for name in names:
        root = copied(dense, tmp_path_factory)
        metadata = metadata_of(root)
        change(metadata.state_dict_metadata[name])  # type: ignore[arg-type]
        rewrite(root, metadata)
        code, findings = audit(root, capsys)
        assert code in (1, 2)
        assert name in re.sub(r"layers\.\d+\.", "layers.", findings) or "100000 layers" in findings
        without_layer = name.removeprefix("decoder.layers.")
        assert without_layer in not_copied(root, capsys)


def test_an_object_of_another_kind_is_found() -> None:
    rng, rerun = [[{"random_rng_state": (3,)}]], [{"rerun_requested": False}]
    assert other_kind("rng_state/shard_0.0_1.1", rng) is None
    assert other_kind("rerun_state_machine_state/shard_0_2", rerun) is None
    assert other_kind("decoder.layers.mlp.linear_fc1._extra_state/shard_0_4", [None]) is None
    assert other_kind("rng_state/shard_0.0_1.1", rerun) == (
        "holds what belongs to rerun_state_machine_state"
    )
    assert other_kind("decoder.layers.mlp.linear_fc1._extra_state/shard_0_4", rng) == (
        "holds what belongs to rng_state"
    )
    assert other_kind("rng_state/shard_0.0_1.1", [None]) == "holds nothing"


RANGES = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 20), st.integers(1, 8)))


@given(RANGES)
def test_overlaps_are_those_that_bytes_show(drawn: list[tuple[str, int, int]]) -> None:
    ranges = [Range(str(n), file, at, at + size) for n, (file, at, size) in enumerate(drawn)]
    taken: set[tuple[str, int]] = set()
    twice = False
    for one in ranges:
        bytes_ = {(one.file, at) for at in range(one.begin, one.end)}
        twice |= bool(bytes_ & taken)
        taken |= bytes_
    assert bool(list(overlapping(ranges))) == twice


SHAPE = (4, 6)
CHUNKS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(1, 4), st.integers(1, 6)),
    max_size=5,
)


@given(CHUNKS)
def test_elements_are_counted_as_one_by_one(drawn: list[tuple[int, int, int, int]]) -> None:
    chunks = [Chunk((row, column), (rows, columns)) for row, column, rows, columns in drawn]
    inside = [
        c for c in chunks if c.offsets[0] + c.sizes[0] <= 4 and c.offsets[1] + c.sizes[1] <= 6
    ]
    times = torch.zeros(SHAPE)
    for chunk in inside:
        (row, column), (rows, columns) = chunk.offsets, chunk.sizes
        times[row : row + rows, column : column + columns] += 1
    wanted = {}
    if len(inside) < len(chunks):
        wanted["lie outside its shape [4, 6]"] = None
    for message, count in (("are in no file", times == 0), ("are there twice", times > 1)):
        if count.any():
            wanted[message] = int(count.sum())  # type: ignore[assignment]
    found = {message: sum(places.values()) for message, places in misplaced(SHAPE, chunks)}
    assert found.keys() == wanted.keys()
    assert all(found[message] == count for message, count in wanted.items() if count is not None)


def test_more_parts_than_are_looked_at_are_refused() -> None:
    chunks = [Chunk((at, at, at), (1, 1, 1)) for at in range(1000)]
    with pytest.raises(ConfigError, match="edges are not those of a grid"):
        list(misplaced((2**40, 2**40, 2**40), chunks))
    with pytest.raises(ConfigError, match="more than 100000 layers or experts"):
        list(misplaced((2**40, 2), [], lead=1))


def test_a_moe_checkpoint_is_fine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit(stored.write(stored.healthy(), tmp_path / "moe"), capsys) == (0, "[]")


def test_a_chunk_without_elements_lies_nowhere() -> None:
    chunks = [Chunk((0,), (4,)), Chunk((4,), (0,))]
    assert list(misplaced((4,), chunks)) == []
