"""Archives of `torch.save`, read by their records: a zip file whose records are stored as they are.

    archive/data.pkl     the pickle; tensors are references to records
    archive/data/N       the values of one storage
    archive/byteorder    little

Only what torch writes is read: no compression, no record twice, none over another or outside of the
file. TorchScript (`constants.pkl`, `code/`) is a program and is refused.
"""

import itertools
import re
import struct
import zlib
from dataclasses import dataclass
from typing import Any

from ep_plugin.checkpoint.inert import Unreadable
from ep_plugin.untrusted import cut

Buffer = Any  # bytes, or a map of a file

_END = struct.Struct("<4sHHHHIIH")  # end of the central directory
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR64 = struct.Struct("<4sIQI")
_ENTRY = struct.Struct("<4sHHHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_MANY = 0xFFFFFFFF
_DESCRIPTOR, _UTF8 = 0x8, 0x800  # flags that torch sets
_BESIDE = re.compile(r"version|byteorder|\.[\w.]+(/[\w.]+)*")
_STORAGE = re.compile(r"data/\d{1,19}")
_PROGRAM = re.compile(r"constants\.pkl|code(/.*)?|.*\.debug_pkl|constants(/.*)?")


@dataclass(frozen=True)
class Record:
    """Where a record's bytes lie."""

    start: int
    size: int
    crc: int  # 0: not taken


@dataclass(frozen=True)
class Archive:
    """The records of one archive, by their name without the archive's own."""

    data: Buffer
    records: dict[str, Record]

    def pickle(self, limit: int) -> bytes:
        """Return the pickle; raises Unreadable when it is longer than `limit`, or damaged."""
        record = self.records["data.pkl"]
        if record.size > limit:
            raise Unreadable(f"its data.pkl has {record.size} bytes, more than {limit}")
        self.check("data.pkl")
        return bytes(self.data[record.start : record.start + record.size])

    def check(self, name: str) -> None:
        """Raise Unreadable where a record has other bytes than were written; makes no copy."""
        record = self.records[name]
        with memoryview(self.data) as view, view[record.start : record.start + record.size] as part:
            if record.crc and zlib.crc32(part) != record.crc:
                raise Unreadable(f"its record {cut(name)} has other bytes than were written")

    @property
    def has_sums(self) -> bool:
        """Whether the bytes of every record have a checksum; of none there is none to take."""
        return all(record.crc or not record.size for record in self.records.values())

    def storage(self, key: str) -> Record:
        """Return where a storage's values lie; raises Unreadable when they do not."""
        if (found := self.records.get(f"data/{key}")) is None:
            raise Unreadable(f"it lacks data/{cut(key)}")
        return found


def open_archive(data: Buffer, begin: int = 0, end: int | None = None) -> Archive:
    """Return the archive in `data[begin:end]`; raises Unreadable.

    Of `data` only the directory and the records' headers are read.
    """
    end = len(data) if end is None else end
    if not 0 <= begin <= end <= len(data):
        raise Unreadable(f"it is said to end at byte {end} of {len(data)}")
    if bytes(data[begin : begin + 4]) != b"PK\x03\x04":
        raise Unreadable(
            "it is no archive of torch.save: neither what torch before 1.6 wrote nor another kind "
            "of file is read"
        )
    try:
        first, after, count = _directory(data, begin, end)
        records = _entries(data, begin, first, after, count)
    except struct.error as error:
        raise Unreadable("its directory of records is cut off") from error
    _check_apart(records, first)
    named = _without_prefix(records)
    _check_names(named)
    order = named.get("byteorder")
    if order is not None:
        said = bytes(data[order.start : order.start + min(order.size, 16)])
        if said != b"little":
            raise Unreadable(f"its byte order is {said!r}; only little is read")
    return Archive(data, named)


def _directory(data: Buffer, begin: int, end: int) -> tuple[int, int, int]:
    """Return where the directory begins and ends, and its number of entries."""
    at = end - _END.size
    if at < begin:
        raise Unreadable("it is cut off")
    signature, disk, disk2, here, count, size, offset, comment = _END.unpack_from(data, at)
    if signature != b"PK\x05\x06" or comment or disk or disk2 or here != count:
        raise Unreadable("it is cut off, or bytes follow after its end")
    locator = at - _LOCATOR64.size
    if locator >= begin and bytes(data[locator : locator + 4]) == b"PK\x06\x07":
        _, disk, place, disks = _LOCATOR64.unpack_from(data, locator)
        at = locator - _END64.size
        if at < begin or begin + place != at or disk or disks != 1:
            raise Unreadable("its directory is not where it says")
        signature, length, _, _, disk, disk2, here, count, size, offset = _END64.unpack_from(
            data, at
        )
        if signature != b"PK\x06\x06" or length != _END64.size - 12 or disk or disk2:
            raise Unreadable("its directory is not where it says")
        if here != count:
            raise Unreadable("it is one of several parts")
    if begin + offset + size != at or count * _ENTRY.size > size:
        raise Unreadable("its directory is not where it says")
    return begin + offset, at, count


def _entries(
    data: Buffer, begin: int, at: int, after: int, count: int
) -> dict[str, tuple[int, Record]]:
    """Return for each name where its header begins, and its record."""
    found: dict[str, tuple[int, Record]] = {}
    first = at
    for _ in range(count):
        if at + _ENTRY.size > after:
            raise Unreadable("its directory of records is cut off")
        (signature, _, _, flags, method, _, _, crc, packed, size, name_size, extra_size, comment,
         disk, _, _, header) = _ENTRY.unpack_from(data, at)  # fmt: skip
        at += _ENTRY.size
        if signature != b"PK\x01\x02" or at + name_size + extra_size + comment > after:
            raise Unreadable("its directory of records is damaged")
        raw = bytes(data[at : at + name_size])
        extra = bytes(data[at + name_size : at + name_size + extra_size])
        at += name_size + extra_size + comment
        name = _text(raw)
        if _PROGRAM.fullmatch(name.partition("/")[2]):
            raise Unreadable(
                f"it is TorchScript (it holds {cut(name)}), which is a program; only what "
                "torch.save writes is read"
            )
        if method or flags & ~(_DESCRIPTOR | _UTF8) or disk or comment:
            raise Unreadable(f"its record {cut(name)} is compressed, encrypted or elsewhere")
        size, packed, header = _wide(extra, size, packed, header)
        if size != packed:
            raise Unreadable(f"its record {cut(name)} is compressed")
        if name in found:
            raise Unreadable(f"it holds {cut(name)} twice")
        header += begin
        found[name] = header, Record(_start(data, header, first, raw), size, crc)
    if at != after:
        raise Unreadable("its directory of records has another length than it says")
    return found


def _start(data: Buffer, header: int, first: int, name: bytes) -> int:
    """Return where a record's bytes begin: after its own header, which must be of that name."""
    if header + _LOCAL.size > first:
        raise Unreadable(f"its record {cut(_text(name))} lies outside of it")
    signature, _, flags, method, *_, name_size, extra = _LOCAL.unpack_from(data, header)
    there = bytes(data[header + _LOCAL.size : header + _LOCAL.size + name_size])
    if signature != b"PK\x03\x04" or method or flags & ~(_DESCRIPTOR | _UTF8) or there != name:
        raise Unreadable(f"its record {cut(_text(name))} is another than its directory says")
    start: int = header + _LOCAL.size + name_size + extra
    return start


def _wide(extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
    """Return sizes and place, from the extra field where they do not fit into 4 bytes."""
    values = [size, packed, header]
    if _MANY not in values:
        return size, packed, header
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        at += 4
        if kind == 1:
            numbers = [n for (n,) in struct.iter_unpack("<Q", extra[at : at + length // 8 * 8])]
            for place, value in enumerate(values):
                if value == _MANY:
                    if not numbers:
                        break
                    values[place] = numbers.pop(0)
            return values[0], values[1], values[2]
        at += length
    return size, packed, header


def _text(raw: bytes) -> str:
    try:
        return raw.decode("ascii")
    except UnicodeDecodeError as error:
        raise Unreadable(f"a record is named {cut(repr(raw))}") from error


def _check_apart(records: dict[str, tuple[int, Record]], end: int) -> None:
    """Raise Unreadable where records lie over each other or over the directory."""
    places = sorted((header, record.start + record.size) for header, record in records.values())
    for (_, before), (header, _) in itertools.pairwise(places):
        if before > header:
            raise Unreadable("its records lie over each other")
    if places and places[-1][1] > end:
        raise Unreadable("its records reach beyond its end")


def _without_prefix(records: dict[str, tuple[int, Record]]) -> dict[str, Record]:
    prefixes = {name.partition("/")[0] for name in records}
    if len(prefixes) != 1:
        raise Unreadable("its records have not one folder in common, so torch.save did not make it")
    return {name.partition("/")[2]: record for name, (_, record) in records.items()}


def _check_names(records: dict[str, Record]) -> None:
    for name in records:
        if name != "data.pkl" and not _BESIDE.fullmatch(name) and not _STORAGE.fullmatch(name):
            raise Unreadable(f"it holds {cut(name)}, which torch.save does not write")
    if "data.pkl" not in records:
        raise Unreadable("it lacks data.pkl")
