"""What all ranks compare before Megatron makes its groups, and the verdict."""

import os
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from ep_plugin.megatron.arguments.digest import TOGETHER, alike, hash_of, text_of
from ep_plugin.megatron.ranks import environment, versions
from ep_plugin.megatron.ranks.answers import Answer, Subject
from ep_plugin.megatron.ranks.contents import contents
from ep_plugin.megatron.ranks.sentence import Flags, differences, sentence
from ep_plugin.megatron.ranks.switches import switch_facts

Facts = dict[str, str]  # "kind:name" -> text


@dataclass(frozen=True)
class Compared:
    """What one rank has: `must` on all ranks alike, `together` on those of a host, `warn` only."""

    must: Facts
    together: Facts = field(default_factory=dict)
    warn: Facts = field(default_factory=dict)
    typed: Mapping[str, str] = field(default_factory=dict)  # argument -> the flag that was typed
    host: str = ""

    def record(self) -> dict[str, str]:
        """Return the hashes that are compared first."""
        parts = {name: getattr(self, name) for name in ("must", "together", "warn")}
        return {name: hash_of(part) for name, part in parts.items()} | {"host": self.host}

    def whole(self) -> dict[str, Any]:
        """Return what is sent where hashes differ."""
        return {name: dict(getattr(self, name)) for name in ("must", "together", "warn", "typed")}


def of_arguments(args: Any, typed: Mapping[str, str], own: Collection[str], size: int) -> Compared:
    """Return what a rank has whose arguments Megatron parsed and validated.

    `own` are arguments that the script added for itself: what they mean to it nobody knows, so a
    difference in them is only said.
    """
    found = alike(args)
    return _with_software(
        must={f"argument:{name}": text for name, text in found.items() if name not in own}
        | {f"content:{name}": text for name, text in contents(args).items()},
        together={
            f"together:{name}": os.path.realpath(str(getattr(args, name)))
            for name in TOGETHER
            if getattr(args, name, None)
        },
        warn={f"argument:{name}": found[name] for name in own if name in found},
        typed={dest: flag for flag, dest in typed.items()},
        size=size,
    )


def of_settings(settings: Any, groups: Mapping[str, Any], size: int) -> Compared:
    """Return what a rank has whose loop parses no arguments: settings, and sizes of groups."""
    return _with_software(
        must={f"setting:{name}": text for name, text in _fields(settings).items()}
        | {f"group:{name}": text_of(value) for name, value in groups.items()},
        size=size,
    )


def subject(name: str, flags: Flags) -> Subject:
    """Return the comparison as what a meeting is about."""

    def decide(records: Sequence[Any], wholes: dict[int, Any]) -> Answer:
        return _decide(records, wholes, flags)

    return Subject(name, _representatives, decide)


def host() -> str:
    """Return what tells this machine from others."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname() + (boot.read_text()[:8] if boot.is_file() else "")


def _with_software(size: int, must: Facts, **more: Any) -> Compared:
    must |= {f"variable:{name}": value for name, value in environment.must().items()}
    must |= switch_facts()
    must |= {f"version:{name}": value for name, value in versions.versions().items()}
    must |= {f"files:{name}": value for name, value in versions.sources().items()}
    must["size:the number of ranks"] = str(size)
    together = more.pop("together", {})
    together |= {f"variable:{name}": value for name, value in environment.together().items()}
    warn = more.pop("warn", {})
    warn |= {f"variable:{name}": value for name, value in environment.warned().items()}
    warn |= {"files:the script": versions.script(), "version:the GPU": versions.device()}
    return Compared(must, together, warn, host=host(), **more)


def _fields(settings: Any) -> Facts:
    if not is_dataclass(settings):
        return {}
    found: Facts = {}
    for one in fields(settings):
        value = getattr(settings, one.name)
        if isinstance(value, Mapping):
            found |= {f"{one.name}[{key!r}]": text_of(part) for key, part in value.items()}
        else:
            found[one.name] = text_of(value)
    return found


def _kind(record: Any) -> tuple[str, str, str]:
    return record["must"], record["together"], record["warn"]


def _representatives(records: Sequence[Any]) -> list[int]:
    """Return one rank of each kind; none where all are alike."""
    first: dict[tuple[str, str, str], int] = {}
    hosts: dict[str, set[str]] = {}
    for rank, record in enumerate(records):
        first.setdefault(_kind(record), rank)
        hosts.setdefault(record["host"], set()).add(record["together"])
    equal = len({(must, warn) for must, _, warn in first}) == 1
    if equal and all(len(found) == 1 for found in hosts.values()):
        return []
    return list(first.values())


def _decide(records: Sequence[Any], wholes: dict[int, Any], flags: Flags) -> Answer:
    of_kind = {_kind(records[rank]): whole for rank, whole in wholes.items()}
    ranks: dict[tuple[str, str, str], list[int]] = {}
    by_host: dict[str, dict[tuple[str, str, str], list[int]]] = {}
    for rank, record in enumerate(records):
        ranks.setdefault(_kind(record), []).append(rank)
        by_host.setdefault(record["host"], {}).setdefault(_kind(record), []).append(rank)
    typed: dict[str, str] = {}
    for whole in wholes.values():
        typed = whole["typed"] | typed
    found = differences((ranks[kind], whole["must"]) for kind, whole in of_kind.items())
    for kinds in by_host.values():
        found += differences((there, of_kind[kind]["together"]) for kind, there in kinds.items())
    if found:
        return Answer(False, sentence(found, flags, typed))
    warned = differences((ranks[kind], whole["warn"]) for kind, whole in of_kind.items())
    if not warned:
        return Answer(True)
    text = sentence(warned, flags, typed).removeprefix("the ranks must be alike in ")
    return Answer(True, f"warning: the ranks differ in {text}")
