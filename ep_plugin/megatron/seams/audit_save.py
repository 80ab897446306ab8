"""`--ep-audit-save`: every checkpoint is read back once it is on disk, by all ranks together.

Megatron's training module has `save_checkpoint` and `maybe_finalize_async_save` bound under its own
name and looks both up when it calls them. An asynchronous save is read when its queue is empty.
With every save goes the size of the vocabulary, for an export to cut the rows that pad it.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ep_plugin.checkpoint.audit import Report, damaged, judge, open_stored, read_facts
from ep_plugin.checkpoint.audit.facts import Facts
from ep_plugin.checkpoint.tensors import Damaged, Stored
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.resume import note_vocabulary
from ep_plugin.megatron.seams.patches import Patches

TRAINING = "megatron.training.training"


def changes(patches: Patches) -> None:
    """Audit saves, where `--ep-audit-save` is given."""
    training = importlib.import_module(TRAINING)
    pending: list[Path] = []  # saves under way

    def with_save(
        original: Callable[..., Any], iteration: int, *rest: Any, **settings: Any
    ) -> None:
        args = training.get_args()
        note_vocabulary(args)
        original(iteration, *rest, **settings)
        if args.ep_audit_save and not settings.get("non_persistent_ckpt", False):
            pending.append(Path(args.save) / f"iter_{iteration:07d}")
            if not args.async_save:
                _audit_all(pending)

    def with_finalize(original: Callable[..., Any], *rest: Any, **settings: Any) -> None:
        original(*rest, **settings)
        queue = importlib.import_module("megatron.training.async_utils")
        if pending and queue.is_empty_async_queue():
            _audit_all(pending)

    patches.wrap(
        f"{TRAINING}:save_checkpoint",
        with_save,
        "each save goes through it: the vocabulary's size goes along, --ep-audit-save reads back",
    )
    patches.wrap(
        f"{TRAINING}:maybe_finalize_async_save",
        with_finalize,
        "only after it is an asynchronous save on disk, where --ep-audit-save can read it",
    )


def _audit_all(pending: list[Path]) -> None:
    """Audit each folder; at the first that is not whole every rank exits with code 1."""
    while pending:
        folder = pending.pop(0)
        report = audit_together(folder)
        if dist.get_rank() == 0:
            _say(report)
        if not report.passed:
            dist.barrier()  # rank 0 has spoken
            sys.exit(1)


def audit_together(folder: Path) -> Report:
    """Return the report, the same on every rank; each reads its share of the tensors."""
    stored: Stored | Damaged
    try:
        stored = open_stored(folder)
    except ConfigError as error:  # also where a rank's host does not see the folder
        stored = Damaged(str(error))
    facts: dict[str, Facts] = {}
    if isinstance(stored, Stored):
        names = sorted(stored.tensors)[dist.get_rank() :: dist.get_world_size()]
        facts = {name: read_facts(stored, name) for name in names}
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, facts if isinstance(stored, Stored) else stored)
    for share in shares:
        if isinstance(share, Damaged):
            return damaged(folder, share)
    assert isinstance(stored, Stored)
    return judge(stored, {name: fact for share in shares for name, fact in share.items()})


def _say(report: Report) -> None:
    for finding in report.findings:
        if finding.level == "warning":
            print(f"ep_plugin: audit: {finding.where}: {finding.message}", flush=True)
    if report.passed:
        print(f"ep_plugin: audit: {report.summary()}", flush=True)
        return
    first, others = report.errors[0], len(report.errors) - 1
    print(
        f"ep_plugin: error: the checkpoint just saved, {report.checkpoint}, is not whole: "
        f"{first.where}: {first.message}{f' (and {others} more)' if others else ''}; "
        f"`ep-plugin audit {report.checkpoint}` lists them; resume from an earlier one with "
        "--ckpt-step",
        file=sys.stderr,
        flush=True,
    )
