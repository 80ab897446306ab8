"""`--ep-check-save`: what holds nan or inf is not saved, so it is never the newest checkpoint.

Before a save, of any kind, each rank reads its own tensors once, and all learn in one small
collective whether every value of every rank is finite. Where one is not, nothing is written, saves
that are under way are finished, rank 0 says whose tensor it is, and every rank exits with code 3.
A buffer that holds inf or nan when training begins does so by design, as a mask does: it may.
"""

import importlib
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ep_plugin.checkpoint.finite import any_nonfinite, nonfinite
from ep_plugin.megatron.arguments import not_saved
from ep_plugin.megatron.seams.patches import Patches
from ep_plugin.megatron.seams.rank_state import Held, Names, buffers, held

TRAINING = "megatron.training.training"
NOT_FINITE = 3  # the exit code


def changes(patches: Patches) -> None:
    """Check what is saved, unless `--ep-check-save off` is given."""
    training = importlib.import_module(TRAINING)
    by_design: set[str] = set()  # buffers
    pending: list[Path] = []  # where asynchronous saves are under way

    def with_start(
        original: Callable[..., Any], step: Any, model: Any, *rest: Any, **settings: Any
    ) -> Any:
        if training.get_args().ep_check_save == "on" and training.get_args().save:
            by_design.update(_by_design(training.unwrap_model(model)))
        return original(step, model, *rest, **settings)

    def with_check(
        original: Callable[..., Any], iteration: int, *rest: Any, **settings: Any
    ) -> None:
        args = training.get_args()
        if args.ep_check_save == "on":
            given = dict(zip(("model", "optimizer"), rest, strict=False)) | settings
            optimizer = None if args.no_save_optim else given.get("optimizer")
            found = find(training.unwrap_model(given["model"]), optimizer, by_design)
            if found is not None:
                training.maybe_finalize_async_save(blocking=True)
                _end(Path(args.save), iteration, found)
        original(iteration, *rest, **settings)
        pending.append(Path(args.save))
        if not args.async_save:
            _written(pending)

    def with_finalize(original: Callable[..., Any], *rest: Any, **settings: Any) -> None:
        original(*rest, **settings)
        queue = importlib.import_module("megatron.training.async_utils")
        if pending and queue.is_empty_async_queue():
            _written(pending)

    patches.wrap(
        f"{TRAINING}:save_checkpoint",
        with_check,
        "every save goes through it, before anything is gathered or written; --ep-check-save",
    )
    patches.wrap(
        f"{TRAINING}:maybe_finalize_async_save",
        with_finalize,
        "only after it is an asynchronous save on disk: the note of one that was not goes",
    )
    patches.wrap(
        f"{TRAINING}:train", with_start, "buffers that hold inf before a step do so by design"
    )


def _written(saves: list[Path]) -> None:
    """Take the note away that an earlier run left: something later is saved."""
    if os.environ.get("RANK", "0") == "0":
        for folder in saves:
            not_saved.remove(folder)
    saves.clear()


def _by_design(model: list[Any]) -> list[str]:
    """Return the buffers that hold nan or inf, and say which this rank's checks leave out."""
    found = nonfinite(buffers(model))
    if found:
        named = ", ".join(f"{name.partition(':')[2]} ({kind})" for name, kind in found.items())
        print(
            "ep_plugin: --ep-check-save leaves out buffers that are not finite when training "
            f"begins: {named}",
            flush=True,
        )
    return list(found)


def find(model: list[Any], optimizer: Any, by_design: Collection[str] = ()) -> str | None:
    """Return which tensors of which ranks hold nan or inf, the same on every rank; None: none do.

    `model` is this rank's chunks without wrappers; buffers in `by_design` may hold them. Every rank
    must call it.
    """
    parts = held(model, optimizer, by_design)
    device = torch.device("cuda", torch.cuda.current_device())
    flag = any_nonfinite([part.tensor for part in parts], device).view(1)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    if not flag.item():  # the host sync
        return None
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, _named(model, parts))
    ranks = [rank for rank, found in enumerate(everyone) if found]
    more = sum(map(len, everyone)) - 1
    said = f"rank {ranks[0]} holds {everyone[ranks[0]][0]}"
    if more:
        of = "it" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        said += f", and {more} more tensor{'s' if more > 1 else ''} of {of} hold nan or inf"
    return said


def _named(model: list[Any], parts: list[Held]) -> list[str]:
    """Return `nan in NAME (layer N)` for each tensor of this rank that holds one."""
    wrong = nonfinite({str(number): part.tensor for number, part in enumerate(parts)})
    if not wrong:
        return []
    names = Names(model)
    return [f"{kind} in {''.join(names.of(parts[int(n)]))}" for n, kind in wrong.items()]


def _end(folder: Path, iteration: int, found: str) -> None:
    if dist.get_rank() == 0:
        start = not_saved.newest(folder)
        whole = (
            f"{folder}/iter_{int(start):07d}" if start and start.isdecimal() else "still to come"
        )
        print(
            f"ep_plugin: error: iteration {iteration} is not saved: {found}; the newest whole "
            f"checkpoint is {whole}; look at losses and gradient norms since then, and go on from "
            "it with another --lr or other data, or from an earlier one with --ckpt-step "
            "(--ep-check-save off saves whatever there is)",
            file=sys.stderr,
            flush=True,
        )
        not_saved.leave(folder, iteration, found)
    dist.barrier()  # rank 0 has spoken
    sys.exit(NOT_FINITE)
