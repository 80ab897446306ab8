"""Is a Megatron checkpoint whole, and is every expert in it once? `audit` is the interface.

Facts are read tensor by tensor (`facts.py`), which ranks may share; what they mean is judged once
they are all there: parts (`coverage.py`), experts (`each_expert.py`), optimizer (`moments.py`).
What lies beside the tensors must not run anything (`named.py`).
"""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ep_plugin.checkpoint.audit import coverage, each_expert, moments, named
from ep_plugin.checkpoint.audit.facts import Facts, read_facts
from ep_plugin.checkpoint.audit.verdict import Finding, Report
from ep_plugin.checkpoint.formats.megatron_dist import open_stored
from ep_plugin.checkpoint.manifest import MANIFEST, manifest_problems
from ep_plugin.checkpoint.moe_layers import hybrid_pattern
from ep_plugin.checkpoint.run_args import check_counters, checked
from ep_plugin.checkpoint.tensors import Damaged, Stored
from ep_plugin.checkpoint.whole import misnamed
from ep_plugin.errors import ConfigError

__all__ = ["Report", "audit", "damaged", "judge", "open_stored", "read_facts"]


Progress = Callable[[int], AbstractContextManager[Callable[[int], object]]]


def audit(path: Path, progress: Progress) -> Report:
    """Read the whole checkpoint at `path` and return what is wrong with it.

    `progress` opens a bar for so many bytes and yields what is called with those just read. One
    chunk is in memory at a time. Raises ConfigError when `path` is no checkpoint of Megatron's.
    """
    try:
        stored = open_stored(path)
        _check_common(stored)
    except Damaged as error:
        return damaged(path, error)
    facts = {}
    with progress(sum(info.num_bytes for info in stored.tensors.values())) as on_bytes:
        for name, info in stored.tensors.items():
            facts[name] = read_facts(stored, name)
            on_bytes(info.num_bytes)
    beside = named.Named(stored)
    report = judge(stored, facts, beside.look)
    found = [*beside.findings(), *_unlike_manifest(stored.folder), *report.findings]
    return replace(report, findings=found)


def _unlike_manifest(folder: Path) -> list[Finding]:
    """Return which files of an iteration that `convert` wrote are not as it wrote them."""
    try:
        problems = manifest_problems(folder.parent, below=folder.name)
    except ConfigError as error:
        return [Finding("error", "files", MANIFEST, str(error))]
    return [Finding("error", "files", MANIFEST, text) for text in problems]


def _check_common(stored: Stored) -> None:
    """Raise Damaged unless the run arguments and the counters beside them are such."""
    args = stored.common.get("args")
    if not isinstance(args, argparse.Namespace):
        raise Damaged(f"{stored.folder} holds no run arguments; give another checkpoint")
    try:
        check_counters(stored.common, stored.folder)
        checked(args, stored.folder)
    except ConfigError as error:
        raise Damaged(str(error)) from error
    shapes = {name: info.shape for name, info in stored.tensors.items()}
    for wrong in misnamed(shapes, stored.objects):
        raise Damaged(f"{wrong}, in {stored.folder}; give another checkpoint")


def judge(
    stored: Stored,
    facts: dict[str, Facts],
    look: Callable[[str, Any], None] = lambda name, value: None,
) -> Report:
    """Return the report on a checkpoint of whose every tensor the facts are known.

    `look` is shown each object.
    """
    broken, about_tensors = coverage.check(stored, facts, look)
    layers, about_experts = each_expert.check(stored, facts, broken)
    state, about_optimizer = moments.check(stored, facts)
    pattern = hybrid_pattern(stored.common.get("args"))
    return Report(
        checkpoint=str(stored.folder),
        iteration=stored.common.get("iteration"),
        num_tensors=len(stored.tensors),
        num_bytes=sum(info.num_bytes for info in stored.tensors.values()),
        layers=layers,
        optimizer=state,
        findings=[*about_tensors, *about_experts, *about_optimizer],
        without_checksums=len(stored.unsummed()),
        pattern=pattern if isinstance(pattern, str) else None,
    )


def damaged(path: Path, error: Damaged) -> Report:
    """Return the report on a checkpoint that does not even say what it holds."""
    return Report(str(path), None, 0, 0, [], "unknown", [Finding("error", "files", "", str(error))])
