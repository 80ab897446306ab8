"""The teacher's own layout over the same ranks, and whose micro-batches each of its ranks runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import torch
import torch.distributed as dist

from ep_plugin.errors import ConfigError

_KEYS = ("tp", "ep", "etp", "pp", "cp")


@dataclass(frozen=True)
class Layout:
    """Parallel sizes of the teacher; one pipeline stage, no context parallelism."""

    tp: int
    ep: int
    etp: int

    def batches(self, rank: int, student_tp: int) -> list[int]:
        """Return, for a rank, which ranks' micro-batches its tensor-parallel group runs, in order.

        Ranks of one student tensor-parallel group have the same micro-batch; the first of them in
        the teacher's group stands for it.
        """
        first = rank // self.tp * self.tp
        members = range(first, first + self.tp)
        seen: dict[int, int] = {}
        for member in members:
            seen.setdefault(member // student_tp, member)
        return list(seen.values())


def parse_layout(text: str) -> dict[str, int]:
    """Return what `tp=2,ep=2` says; raises ValueError for anything else."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        if name not in _KEYS or not equals or not number.isdecimal() or name in found:
            raise ValueError(text)
        found[name] = int(number)
    if min(found.values()) < 1:
        raise ValueError(text)
    return found


def layout_of(args: Any) -> Layout:
    """Return the teacher's layout: what was typed, and the student's where nothing was.

    Raises ConfigError for one that the ranks cannot have.
    """
    typed = parse_layout(args.ep_teacher_layout) if args.ep_teacher_layout else {}
    word = f"--ep-teacher-layout ({args.ep_teacher_layout})"
    for name, flag in (("pp", "pipeline stages"), ("cp", "context-parallel ranks")):
        if typed.get(name, 1) != 1:
            raise ConfigError(
                f"{word} asks for {typed[name]} {flag}, and a teacher runs on one; use {name}=1, "
                "with a larger tp or ep"
            )
    tp = typed.get("tp", args.tensor_model_parallel_size)
    etp = typed.get("etp", tp if "tp" in typed else None)
    if etp is None:
        etp = args.expert_tensor_parallel_size or tp
    layout = Layout(tp, typed.get("ep", args.expert_model_parallel_size), etp)
    for what, size in (("tp", layout.tp), ("ep * etp", layout.ep * layout.etp)):
        if args.world_size % size:
            raise ConfigError(
                f"{word}: {what} ({size}) must divide the {args.world_size} ranks; use "
                "--ep-teacher-layout tp=1,ep=1"
            )
    if layout.tp % args.tensor_model_parallel_size and args.tensor_model_parallel_size % layout.tp:
        raise ConfigError(
            f"{word}: of tp ({layout.tp}) and --tensor-model-parallel-size "
            f"({args.tensor_model_parallel_size}) one must divide the other, so that whole "
            "micro-batches are exchanged; use "
            f"--ep-teacher-layout tp={args.tensor_model_parallel_size}"
        )
    return layout


class Groups:
    """Megatron's process groups of the teacher, made beside the student's.

    Megatron's modules look their groups up in `parallel_state`, in every release. A second copy of
    that module makes the teacher's; `inside` puts them where the modules look, while the teacher is
    built, loaded or run. Every group that is made meanwhile is the teacher's too.
    """

    def __init__(self, layout: Layout, minutes: int) -> None:
        """Make the groups; every rank must call it together."""
        from megatron.core import parallel_state

        spec = spec_from_file_location(
            f"{parallel_state.__name__}_of_teacher", parallel_state.__file__
        )
        assert spec is not None
        assert spec.loader is not None
        copy: Any = module_from_spec(spec)
        spec.loader.exec_module(copy)
        self._made: list[Any] = []  # in the order in which they were made, alike on all ranks
        with self._noted():
            copy.initialize_model_parallel(
                tensor_model_parallel_size=layout.tp,
                expert_model_parallel_size=layout.ep,
                expert_tensor_parallel_size=layout.etp,
                distributed_timeout_minutes=minutes,
                create_gloo_process_groups=False,
            )
        names = [name for name in vars(parallel_state) if name.startswith("_") and name.isupper()]
        self._values = {name: getattr(copy, name) for name in names}
        self.tp: Any = copy.get_tensor_model_parallel_group()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Let Megatron's modules find the teacher's groups."""
        from megatron.core import parallel_state

        before = {name: getattr(parallel_state, name) for name in self._values}
        vars(parallel_state).update(self._values)
        try:
            with self._noted():
                yield
        finally:
            self._values = {name: getattr(parallel_state, name) for name in self._values}
            vars(parallel_state).update(before)

    def destroy(self) -> None:
        """Destroy every group of the teacher; every rank must call it together, and none after it.

        No rank may be inside an exchange of the teacher's while another ends its communicator.
        """
        self._values.clear()
        torch.cuda.synchronize()
        dist.barrier()
        for group in self._made:
            dist.destroy_process_group(group)
        self._made.clear()

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Note the groups that are made inside."""
        known = set(_all_groups())
        try:
            yield
        finally:
            self._made += [group for group in _all_groups() if group not in known]


def _all_groups() -> list[Any]:
    """Return every process group of this process, in the order in which they were made."""
    return list(dist.distributed_c10d._world.pg_map)
