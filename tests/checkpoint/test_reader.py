"""The reader of pickles and archives: nothing runs, whatever the bytes; real ones read as torch
reads them."""

import argparse
import contextlib
import io
import pickle
import re
import signal
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ep_plugin.checkpoint.carried import check_carried, check_copied, dangers, engine_reads
from ep_plugin.checkpoint.formats import _pickle
from ep_plugin.checkpoint.formats._archive import open_archive
from ep_plugin.checkpoint.formats._dcp_reader import Files
from ep_plugin.checkpoint.formats._iteration import load_common, load_metadata, load_object
from ep_plugin.checkpoint.formats._metadata import NAMES, to_metadata
from ep_plugin.checkpoint.formats._pickle import read_pickle
from ep_plugin.checkpoint.formats._write_pickle import carried_bytes
from ep_plugin.checkpoint.inert import Made, Name, OldOpcode, Unreadable, explained
from ep_plugin.checkpoint.tensors import Damaged
from ep_plugin.errors import ConfigError

MANY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def metadata() -> Metadata:
    shape, half = torch.Size([4, 3]), torch.Size([2, 3])
    chunks = [ChunkStorageMetadata(torch.Size([begin, 0]), half) for begin in (0, 2)]
    entry = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), shape, chunks)
    return Metadata(
        state_dict_metadata={"weight": entry, "state": BytesStorageMetadata()},
        storage_data={
            **{
                MetadataIndex("weight", chunk.offsets, number): _StorageInfo("a", 9 * number, 9)
                for number, chunk in enumerate(chunks)
            },
            MetadataIndex("state"): _StorageInfo("b", 0, 7),
        },
        planner_data={"weight": ("weight",)},
        version="1.0.0",
    )


def state() -> dict[str, Any]:
    args = argparse.Namespace(
        lr=0.5, dtype=torch.bfloat16, shape=torch.Size([2, 3]), when=signal.SIGTERM, name="x" * 300
    )
    tensor = torch.arange(12.0).view(3, 4)
    return {
        "args": args,
        "model": OrderedDict(weight=tensor[1:, ::2], same=tensor, fp8=tensor.to(torch.float8_e5m2)),
        "numbers": [1, -1, 1 << 40, 1 << 80, 2.5, True, None, b"bytes", {3: (4, 5)}, {6}],
    }


# ---- what is right is read


def test_a_state_reads_as_torch_reads_it() -> None:
    found = load_object(saved(state()))
    assert vars(found["args"]).keys() == vars(state()["args"]).keys()
    assert (found["args"].dtype, found["args"].shape) == (torch.bfloat16, torch.Size([2, 3]))
    assert found["args"].when.kind.key == ("signal", "Signals")
    assert found["numbers"] == state()["numbers"]
    for name, values in state()["model"].items():
        assert found["model"][name].dtype == values.dtype
        assert torch.equal(found["model"][name].float(), values.float())
    assert found["model"]["same"].data_ptr() + 16 == found["model"]["weight"].data_ptr()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_metadata_reads_as_pickle_reads_it(protocol: int) -> None:
    assert to_metadata(read_pickle(pickle.dumps(metadata(), protocol), NAMES)) == Metadata(
        metadata().state_dict_metadata, None, metadata().storage_data, version="1.0.0"
    )


def test_metadata_of_other_releases() -> None:
    """Fields that they lack, and the class that had the properties before torch 2.3."""
    content = pickle.dumps(metadata(), 2)
    moved = content.replace(
        b"ctorch.distributed.checkpoint.metadata\nTensorProperties\n",
        b"ctorch.distributed._shard.sharded_tensor.metadata\nTensorProperties\n",
    )
    assert moved != content
    old = metadata()
    for info in old.storage_data.values():
        del info.__dict__["transform_descriptors"]
    theirs = content.replace(
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n",
        b"cmegatron.core.dist_checkpointing.strategies.torch\nMCoreMetadata\n",
    )
    assert theirs != content
    for one in (moved, theirs, pickle.dumps(old)):
        read = to_metadata(read_pickle(one, NAMES))
        assert read.storage_data == metadata().storage_data
        assert read.state_dict_metadata == metadata().state_dict_metadata


def test_what_is_written_again_has_the_same_bytes() -> None:
    value = {"args": argparse.Namespace(when=signal.SIGTERM, dtype=torch.int8), "iteration": 3}
    again = carried_bytes(load_object(saved(value)))
    assert torch.load(io.BytesIO(again), weights_only=False) == value
    assert carried_bytes(load_object(again)) == again


# ---- what is wrong is refused

X = b"X"  # BINUNICODE


def text(words: str) -> bytes:
    return X + len(words.encode()).to_bytes(4, "little") + words.encode()


DAMAGED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "ends too early"),
    "no end": (b"\x80\x02N", "ends too early"),
    "long text": (b"\x80\x02X\xff\xff\xff\xff.", "4294967295 bytes follow"),
    "very long bytes": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.", "bytes follow"),
    "a frame": (b"\x80\x04\x95" + b"\xff" * 7 + b"\x7fN.", "bytes follow"),
    "an integer": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "an integer of 2147483647 bytes"),
    "a memo's number": (b"\x80\x02Nr\xff\xff\xff\xff0j\xfe\xff\xff\xff.", "takes object"),
    "an old opcode": (b"\x80\x02(ios\nsystem\n.", "opcode of pickle protocol 0 or 1"),
    "a name of 5,000": (b"\x80\x02c" + b"a" * 5000 + b"\nb\n.", "does not end"),
    "a long name": (b"\x80\x04" + text("a" * 300) + text("b") + b"\x93.", "300 characters"),
    "a call of text": (b"\x80\x02" + text("a") + b")R.", "no class"),
    "state of a class": (b"\x80\x02ctorch\nSize\n}b.", "has none"),
    "state of a list": (b"\x80\x02]}b.", "has none"),
    "items of a class": (b"\x80\x02ctorch\nSize\nNNs.", "has none"),
    "append to a class": (b"\x80\x02ctorch\nSize\nNa.", "no list"),
    "a list as key": (b"\x80\x02}]Ns.", "a list is a key"),
    "bytes after it": (b"\x80\x02N.N", "left over"),
    "two values": (b"\x80\x02NN.", "left over"),
    "half a character": (b"\x80\x02X\x01\0\0\0\xff.", "not UTF-8"),
    "a surrogate name": (b"\x80\x04" + text("a\n") + b"N\x93.", "is no text"),
    "many lists": (b"\x80\x02(" + b"]" * (1 << 18) + b"t.", "more objects than its size"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_pickles_say_what_is_wrong(name: str) -> None:
    content, words = DAMAGED[name]
    with pytest.raises(Unreadable, match=words):
        read_pickle(content)


@pytest.mark.parametrize("protocol", [0, 1])
@pytest.mark.parametrize("value", [7, 1 << 40, 0.5, "x", {"a": 1}, [1], (2,), True])
def test_old_protocols_are_named_with_a_way_out(protocol: int, value: Any) -> None:
    content = pickle.dumps([{"iteration": [value, "a"]}], protocol)
    try:
        read = read_pickle(content)
    except Unreadable as error:
        said = explained(error)
        assert re.search("opcode of pickle protocol 0 or 1 .*save it anew", said), said
    else:
        assert protocol == 1
        assert read == [{"iteration": [value, "a"]}]


def test_text_of_python_2_is_named_with_a_way_out() -> None:
    for content in (b"\x80\x02U\x01a.", b"\x80\x02T\x01\0\0\0a.", b"\x80\x02I1\n."):
        with pytest.raises(OldOpcode) as caught:
            read_pickle(content)
        assert "Python 2" in explained(caught.value)


def test_numbers_of_numpy_are_numbers() -> None:
    for value in (np.int64(-5), np.float32(0.5), np.float64(1e-8), np.bool_(True), np.uint8(200)):
        read = load_object(saved([value]))
        assert read == [value.item()]
        assert type(read[0]) is type(value.item())
    assert type(load_object(saved([np.complex64(1j)]))[0]) is Made


def test_items_one_by_one_are_not_copied_each_time() -> None:
    """The list of a stand-in's items grows in place."""
    start = b"\x80\x02ccollections\nOrderedDict\n)Rq\x00"
    made = read_pickle(start + b"K\x01K\x02s" * 3 + b".")
    assert made.items == [(1, 2)] * 3
    kept: list[list[Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_pickle, "_more", lambda made, pairs: kept.append(pairs) or pairs)
        read_pickle(start + b"K\x01K\x02s" * 3 + b".")
    assert kept == [[(1, 2)]] * 3


def test_nesting_and_cycles_end() -> None:
    deep = b"\x80\x02" + b"]" * 60_000 + b"a" * 59_999 + b"."
    cycle = b"\x80\x02]q\0h\0a."
    for content, words in ((deep, "nested more than"), (cycle, "holds itself")):
        with pytest.raises(Unreadable, match=words):
            load_object(archive(content))


def test_objects_that_share_objects_are_looked_at_once() -> None:
    """Each of 90 calls has the one before it twice."""
    content = b"\x80\x02cevil\nCall\nq\0)R"
    for number in range(1, 90):
        put, get = b"q" + bytes([number]), b"h" + bytes([number])
        content += put + b"0h\0" + get + get + b"\x86R"
    found = load_object(archive(content + b"."))
    assert {said for _, said in dangers(found)} == {"an object of evil.Call"}


def archive(
    content: bytes, *, prefix: str = "archive/", compress: bool = False, **more: bytes
) -> bytes:
    """Return a zip file with this pickle, and more records; `__` stands for a slash."""
    buffer = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", kind) as file:
        file.writestr(prefix + "data.pkl", content)
        for name, value in more.items():
            file.writestr(prefix + name.replace("__", "/").replace("DOT", "."), value)
    return buffer.getvalue()


NOTHING = b"\x80\x02N."
BAD_ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "TorchScript's constants": (lambda: archive(NOTHING, constantsDOTpkl=b""), "TorchScript"),
    "TorchScript's code": (lambda: archive(NOTHING, code__aDOTpy=b""), "TorchScript"),
    "compressed": (lambda: archive(NOTHING * 99, compress=True), "compressed"),
    "another's record": (lambda: archive(NOTHING, evilDOTpy=b""), "does not write"),
    "big-endian": (lambda: archive(NOTHING, byteorder=b"big"), "byte order"),
    "cut off": (lambda: saved(state())[:-1], "cut off"),
    "bytes behind": (lambda: saved(state()) + b"x", "cut off, or bytes follow"),
    "a tar": (lambda: b"a" * 512, "no archive of torch.save"),
}


@pytest.mark.parametrize("name", BAD_ARCHIVES)
def test_bad_archives_say_what_is_wrong(name: str) -> None:
    make, words = BAD_ARCHIVES[name]
    with pytest.raises(Unreadable, match=words):
        load_object(make())


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_records_twice_and_over_each_other() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a/data.pkl", NOTHING)
        file.writestr("a/data.pkl", NOTHING)
    with pytest.raises(Unreadable, match="twice"):
        open_archive(buffer.getvalue())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a/data.pkl", NOTHING)
        file.writestr("a/version", b"3")
        file.filelist[1].header_offset = 0
    with pytest.raises(Unreadable, match="another than its directory says"):
        open_archive(buffer.getvalue())


def test_the_old_format_of_torch_is_named() -> None:
    buffer = io.BytesIO()
    torch.save({"a": 1}, buffer, _use_new_zipfile_serialization=False)
    with pytest.raises(Unreadable, match=r"torch before 1\.6"):
        load_object(buffer.getvalue())


@pytest.mark.parametrize("checksums", [True, False])
def test_a_flipped_byte_of_a_pickle_is_seen_where_it_was_summed(checksums: bool) -> None:
    torch.serialization.set_crc32_options(checksums)
    try:
        content = bytearray(saved({"iteration": 1000}))
    finally:
        torch.serialization.set_crc32_options(True)
    content[content.index(b"\xe8\x03")] ^= 1
    if checksums:
        with pytest.raises(Unreadable, match=r"damaged|has other bytes than were written"):
            load_object(bytes(content))
    else:
        assert load_object(bytes(content)) == {"iteration": 1001}


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((1 << 60,), (1,), 0),
        ((1 << 60,), (0,), 0),
        ((4,), (1,), 1),
        ((2, 2), (1 << 61, 1), 0),
        ((-1,), (1,), 0),
        ((2,), (-1,), 1),
        ((1, 1), (1,), 0),
    ],
)
def test_tensors_stay_in_their_storage(
    size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    class Large:
        def __reduce__(self) -> Any:
            storage = torch.zeros(4).storage()
            return torch._utils._rebuild_tensor_v2, (
                storage, offset, size, stride, False, OrderedDict(),
            )  # fmt: skip

    with pytest.raises(Unreadable, match=r"tensor|shape"):
        load_object(saved(Large()))


def test_views_that_negate_are_not_read_as_their_values() -> None:
    class Negative:
        def __reduce__(self) -> Any:
            storage = torch.ones(4).storage()
            arguments = (storage, 0, (4,), (1,), False, OrderedDict(), {"neg": True})
            return torch._utils._rebuild_tensor_v2, arguments

    with pytest.raises(Unreadable, match="negates or conjugates"):
        load_object(saved(Negative()))


def test_a_large_object_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").touch()
    with (tmp_path / "__0_0.distcp").open("wb") as stream:
        stream.truncate(1 << 30)
    index = MetadataIndex("state")
    place = _StorageInfo("__0_0.distcp", 0, 1 << 30)
    files = Files(tmp_path, Metadata({}, storage_data={index: place}))
    with pytest.raises(Damaged, match="none of more than 67108864 is read"):
        files.read_bytes(index)


# ---- names


def test_names_are_not_imported_and_not_written(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return exec, ("import marker_that_is_not_there",)

    common = load_common(saved({"args": argparse.Namespace(x=[Evil()])}), tmp_path)
    assert type(common["args"].x[0]) is Made
    assert repr(common["args"].x[0]) == "an object of __builtin__.exec"
    with pytest.raises(ConfigError, match=r"builtin.*exec.*; use --leave-out x"):
        check_carried(common, tmp_path)
    with pytest.raises(ConfigError, match="cannot go along"):
        carried_bytes(common)
    assert [where for where, _ in dangers(common)] == ["args.x"]
    with pytest.raises(ConfigError, match="which is not copied"):
        check_copied("state", common, tmp_path)


def test_a_tensor_that_is_a_pickle_is_not_copied(tmp_path: Path) -> None:
    """Transformer Engine keeps its state as one, and unpickles it."""
    content = torch.frombuffer(bytearray(pickle.dumps(print)), dtype=torch.uint8)
    name = "decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1"
    for empty in (None, [None], b"", "", [torch.zeros(0, dtype=torch.uint8), None]):
        check_copied(name, empty, tmp_path)
        assert not engine_reads(name, empty)
    words = bytes(content.numpy())
    kinds = [[content.view(dtype)] for dtype in (torch.int8, torch.bool)]
    for value in (*kinds, words, bytearray(words), "text", {"a": [content]}, [1], {"a": None}):
        assert engine_reads(name, value)
        with pytest.raises(ConfigError, match="use --leave-out _extra_state"):
            check_copied(name, value, tmp_path)


def test_names_are_shown_escaped() -> None:
    name = Name("a\nb\x1b[31m", "c" * 200)
    assert str(name).isprintable()
    assert len(str(name)) < 120


@pytest.mark.parametrize("file", ["../a", "/etc/passwd", "a/b", "..", "", "a\0b", "x" * 5000])
def test_files_of_metadata_lie_beside_it(file: str) -> None:
    wrong = metadata()
    wrong.storage_data[MetadataIndex("state")].relative_path = file
    with pytest.raises(Unreadable, match="which is none beside it"):
        to_metadata(read_pickle(pickle.dumps(wrong), NAMES))


def _layers(entry: Any) -> None:
    entry.size = torch.Size([10**9, 3])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m.state_dict_metadata["weight"].__dict__.pop("size"),
        lambda m: m.state_dict_metadata["weight"].__dict__.pop("properties"),
        lambda m: m.state_dict_metadata["weight"].__dict__.update(chunks=3),
        lambda m: m.state_dict_metadata.update({"x" * 5000: BytesStorageMetadata()}),
        lambda m: m.state_dict_metadata.update({"a\nb": BytesStorageMetadata()}),
        lambda m: m.storage_data.update({MetadataIndex("z"): 3}),
        lambda m: m.storage_data.update({MetadataIndex("z"): _StorageInfo("a", -1, 1)}),
        lambda m: m.storage_data.update({MetadataIndex("z"): _StorageInfo("a", 0, 1 << 63)}),
        lambda m: m.__dict__.pop("storage_data"),
        lambda m: m.__dict__.update(planner_data={"x": print}),
        lambda m: _layers(m.state_dict_metadata.setdefault(
            "decoder.layers.mlp.router.weight", m.state_dict_metadata["weight"]
        )),
    ],
)  # fmt: skip
def test_spoilt_metadata_is_damage(tmp_path: Path, spoil: Callable[[Any], Any]) -> None:
    wrong = metadata()
    spoil(wrong)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(wrong))
    with pytest.raises(Damaged, match="cannot be read") as error:
        load_metadata(tmp_path)
    assert len(str(error.value)) < 1000


# ---- whatever the bytes


def opcodes() -> st.SearchStrategy[bytes]:
    """Pieces of pickles: opcodes with small arguments, and names worth calling."""
    names = ["os\nsystem", "builtins\nexec", "torch\nSize", "argparse\nNamespace", "torch\nint8",
             "collections\nOrderedDict", "torch._utils\n_rebuild_tensor_v2", "a b\n\x7f",
             "torch.distributed.checkpoint.metadata\nMetadata"]  # fmt: skip
    return st.one_of(
        st.sampled_from([bytes([op]) for op in b"()lt]}Nasebu0.1Q\x52\x81\x85\x86\x87\x88\x89"]),
        st.sampled_from([b"\x8f", b"\x90", b"\x91", b"\x93", b"\x94"]),
        st.integers(0, 255).map(lambda n: bytes([0x4B, n])),
        st.integers(0, 6).map(lambda n: bytes([0x68, n])),
        st.integers(0, 6).map(lambda n: bytes([0x71, n])),
        st.text(max_size=5).map(text),
        st.sampled_from(names).map(lambda name: b"c" + name.encode() + b"\n"),
        st.binary(max_size=6),
    )


def read(content: bytes) -> None:
    """Read bytes in every way that there is, and write what may be written; nothing else."""
    for attempt in (
        lambda: to_metadata(read_pickle(content, NAMES)),
        lambda: carried_bytes(load_object(archive(content, data__0=b"1234"))),
        lambda: list(dangers(load_object(archive(content)))),
    ):
        with watched(), contextlib.suppress(Unreadable, ConfigError):
            attempt()


class Watch:
    """Remembers what a reader has no business doing; an audit hook stays as long as the process."""

    on = False
    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def hook(cls, event: str, _: Any) -> None:
        if cls.on and event.partition(".")[0] in ("open", "import", "exec", "socket", "subprocess"):
            cls.seen.append(event)


sys.addaudithook(Watch.hook)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Fail where anything is opened, imported or run inside."""
    Watch.seen.clear()
    Watch.on = True
    try:
        yield
    finally:
        Watch.on = False
    assert Watch.seen == []


@pytest.fixture(autouse=True, scope="module")
def _warm() -> None:
    """Import what torch imports on first use."""
    load_object(carried_bytes(load_object(saved(state()))))


@MANY
@given(st.lists(opcodes(), max_size=40).map(b"".join))
def test_any_opcodes(body: bytes) -> None:
    read(b"\x80\x02" + body + b".")


@MANY
@given(st.data())
def test_real_pickles_with_changed_bytes(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(REAL)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(opcodes())
    read(bytes(content))


REAL = [pickle.dumps(metadata()), pickle.dumps(metadata(), 2), pickle.dumps([1, {2: (3,)}], 2)]
ARCHIVE = saved(state())


@MANY
@given(st.data())
def test_archives_with_changed_bytes(data: st.DataObject) -> None:
    """Of the directory and headers above all: the last kilobyte and a half."""
    content = bytearray(ARCHIVE)
    for _ in range(data.draw(st.integers(1, 4))):
        low = data.draw(st.sampled_from([0, len(content) - 1500]))
        at = data.draw(st.integers(low, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    with watched(), contextlib.suppress(Unreadable):
        found = load_object(bytes(content))
        tensors = found["model"].values() if "model" in found else ()
        assert all(
            values.float().sum() is not None for values in tensors if torch.is_tensor(values)
        )
