"""Archives of `torch.save` with something planted in them, record by record."""

import io
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.hostile import pickles, script_module

NAMES = (
    *("../{}", "../../../../{}", "/tmp/{}", "a/../../{}", "{}\0", "{}\n", "..\\{}", "C:\\{}"),
    *("{}" * 400, "\u202e{}", "", ".", "..", "archive/../../../{}"),
)


@dataclass
class Record:
    """One entry of a zip file, and what its two headers claim of it."""

    name: str
    data: bytes
    compressed: bool = False
    claimed: int | None = None  # bytes unpacked, as the headers say
    encrypted: bool = False
    offset: int | None = None  # where the directory says that it lies

    def stored(self) -> bytes:
        if not self.compressed:
            return self.data
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        return packer.compress(self.data) + packer.flush()


def read(data: bytes) -> list[Record]:
    """Return the records of a healthy archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [Record(info.filename, archive.read(info)) for info in archive.infolist()]


def write(records: list[Record], counted: int | None = None, comment: bytes = b"") -> bytes:
    """Return a zip file of the records as they are, however little they fit together."""
    out, directory = io.BytesIO(), io.BytesIO()
    for record in records:
        name, stored = record.name.encode("utf-8", "surrogatepass")[:65535], record.stored()
        size = len(record.data) if record.claimed is None else record.claimed
        flags = 0x800 | record.encrypted
        method = 8 if record.compressed else 0
        sizes = (zlib.crc32(record.data), len(stored), size & 0xFFFFFFFF)
        offset = out.tell() if record.offset is None else record.offset
        pad = -(out.tell() + 30 + len(name) + 4) % 64
        extra = struct.pack("<2H", 0x4246, pad) + b"Z" * pad
        out.write(struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, flags, method, 0, 33, *sizes,
                              len(name), len(extra)))  # fmt: skip
        out.write(name + extra + stored)
        directory.write(struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, flags, method, 0, 33,
                                    *sizes, len(name), 0, 0, 0, 0, 0, offset))  # fmt: skip
        directory.write(name)
    listed, begin = directory.getvalue(), out.tell()
    number = len(records) if counted is None else counted
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, number & 0xFFFF, number & 0xFFFF, len(listed),
                      begin, len(comment))  # fmt: skip
    return out.getvalue() + listed + end + comment


def planted(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    """Return (kind, bytes) of an archive, or of what torch.load takes for one."""
    if not zipfile.is_zipfile(io.BytesIO(benign)):
        return pickles.planted(rng, outside, benign)
    kinds: dict[str, Any] = {
        "pickle": _pickle, "record": _record, "script": _script, "nested": _nested,
        "bomb": _bomb, "legacy": _legacy, "storage": _storage, "damaged": _damaged,
    }  # fmt: skip
    kind = rng.choices(sorted(kinds), [1, 2, 1, 1, 5, 3, 2, 3])[0]
    return kinds[kind](rng, outside, benign)


def _at(records: list[Record], ending: str) -> Record:
    return next((record for record in records if record.name.endswith(ending)), records[0])


def _pickle(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    """The pickle inside is a planted one."""
    records = read(benign)
    inner = _at(records, "data.pkl")
    kind, inner.data = pickles.planted(rng, outside, inner.data)
    return f"pickle: {kind}", write(records)


def _record(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    """A record is there twice, lies over another one, is missing, or has a name that leads out."""
    records = read(benign)
    one, data = rng.choice(records), _at(records, "data.pkl")
    _, evil = pickles.planted(rng, outside, data.data)
    kind = rng.choice(
        ("twice", "over another", "missing", "name", "count", "far", "locked", "many")
    )
    if kind == "twice":
        records.insert(rng.randrange(len(records) + 1), Record(data.name, evil))
    elif kind == "over another":
        for record in records:
            record.offset = 0
    elif kind == "missing":
        records.remove(one)
    elif kind == "name":
        one.name = rng.choice(NAMES).replace("{}", rng.choice((one.name, pickles.MARK)))
    elif kind == "count":
        return "record: count", write(records, counted=rng.choice((0, 1, 65535)))
    elif kind == "far":
        one.offset = rng.choice((1 << 31, (1 << 32) - 1, len(benign) - 1))
    elif kind == "locked":
        one.encrypted = True
    else:
        folder = one.name.partition("/")[0]
        records += [Record(f"{folder}/data/x{n}", b"") for n in range(2000)]
    return f"record: {kind}", write(records)


def _script(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    """Code of TorchScript: the whole archive, or put among the records of a healthy one."""
    script = script_module.records(str(outside / pickles.MARK))
    kind = rng.choice(("whole", "among", "constants", "code", "before", "behind", "renamed"))
    mine = [Record(name, data) for name, data in script.items()]
    if kind == "whole":
        return "script: whole", write(mine)
    if kind == "before":
        return "script: before", write(mine) + benign
    if kind == "behind":
        return "script: behind", benign + write(mine)
    records = read(benign)
    folder = records[0].name.partition("/")[0]
    for record in mine:
        below = record.name.partition("/")[2]
        wanted = {"constants": "constants.pkl", "code": "code/"}.get(kind, "")
        if below.startswith(wanted) and below not in ("version", "byteorder"):
            records.append(Record(f"{folder}/{below}", record.data))
    if kind == "renamed":
        return "script: renamed", write([Record(f"x/{r.name}", r.data) for r in mine])
    return f"script: {kind}", write(records)


def _nested(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    """An archive where a pickle or a storage should be."""
    records = read(benign)
    script = script_module.records(str(outside / pickles.MARK))
    inner = rng.choice((benign, write([Record(n, d) for n, d in script.items()])))
    for _ in range(rng.choice((0, 0, 1, 40))):
        inner = write([Record("archive/data.pkl", inner), Record("archive/version", b"3")])
    place = rng.choice(("data.pkl", "data/0", "version"))
    _at(records, place).data = inner
    return f"nested: {place}", write(records)


def _bomb(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    """Compressed records that become large, and headers that say so of small ones."""
    records = read(benign)
    one = _at(records, rng.choice(("data.pkl", "data/0", "version")))
    kind = rng.choice(("compressed", "compressed", "claims more", "claims less", "comment"))
    if kind == "compressed":
        one.data, one.compressed = one.data + bytes(rng.choice((1 << 16, 1 << 23))), True
        one.claimed = rng.choice((None, 10))
    elif kind.startswith("claims"):
        one.claimed = 0xFFFFFFFE if kind == "claims more" else 1
        one.compressed = rng.random() < 0.5
    else:
        return "bomb: comment", write(records, comment=b"PK\5\6" * 16000)
    return f"bomb: {kind}", write(records)


class _Call:
    def __init__(self, made: str) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return open, (self.made, "w")


def _legacy(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    """What torch.load takes beside zip files: several pickles in a row, and tar files."""
    evil = _Call(str(outside / pickles.MARK))
    kind = rng.choice(("pickles", "payload first", "tar", "one pickle", "planted"))
    buffer = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name in ("storages", "tensors", "pickle", f"../{pickles.MARK}"):
                data = pickle.dumps(evil)
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    elif kind == "one pickle":
        pickle.dump({"args": evil}, buffer)
    elif kind == "planted":
        return "legacy: planted", pickles.planted(rng, outside, pickle.dumps([1]))[1]
    else:
        torch.save({"args": evil, "x": torch.ones(2)}, buffer, _use_new_zipfile_serialization=False)
        if kind == "payload first":
            return f"legacy: {kind}", pickle.dumps(evil) + buffer.getvalue()
    return f"legacy: {kind}", buffer.getvalue()


def _storage(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    """A tensor that is larger than its storage, strided beyond it, or of an odd kind."""
    size = rng.choice(((1 << 60,), (1 << 40, 1 << 40), (-1, 4), (4,), (0,), ("4",), (1,) * 70))
    stride = rng.choice(((1,) * len(size), (-1,) * len(size), (1 << 62,) * len(size)))
    offset = rng.choice((0, -1, 1 << 62, 3))
    kind = rng.choice(
        ("FloatStorage", "ByteStorage", "QInt8Storage", "NoStorage", "UntypedStorage")
    )
    key = rng.choice(("0", "../../data/0", "/etc/hostname", "no", f"{pickles.MARK}\n", 0))
    count = rng.choice((4, 0, -1, 1 << 60, 1 << 20))
    pid = pickles.literal(
        ("storage", pickles.Ops(f"ctorch\n{kind}\n".encode()), key, rng.choice(("cpu", "cuda:0",
        "")),
         count)
    )  # fmt: skip
    rebuild = rng.choice(("_rebuild_tensor_v2", "_rebuild_tensor", "_rebuild_parameter",
                          "_rebuild_sparse_tensor", "_rebuild_qtensor"))  # fmt: skip
    tensor = (
        f"ctorch._utils\n{rebuild}\n(".encode() + pid + b"Q" + pickles.literal(offset)
        + pickles.literal(size) + pickles.literal(stride) + b"\x89}tR"
    )  # fmt: skip
    evil = rng.choice((tensor, pickles.literal({"args": pickles.Ops(tensor)})))
    records = read(benign)
    _at(records, "data.pkl").data = b"\x80\x02" + evil + b"."
    return f"storage: {kind}", write(records)


def _damaged(rng: random.Random, outside: Path, benign: bytes) -> tuple[str, bytes]:
    kind, data = pickles.damaged(rng, benign)
    return f"damaged: {kind}", data
