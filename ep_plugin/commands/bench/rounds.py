"""Contenders of a layer bench, made and checked: as many at a time as the GPU's memory holds."""

import gc
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from ep_plugin.commands.bench import ours
from ep_plugin.commands.bench.accumulate import WeightGradients, train_step
from ep_plugin.commands.bench.case import Case, Contender, Makers, reference, relative_error
from ep_plugin.commands.bench.contest import DROPPING, OURS, Contest, peer
from ep_plugin.commands.bench.floors import Gradients, Precision
from ep_plugin.commands.bench.measure import to_capture

# No host sync in steps; of Megatron with drop-and-pad alone.
CAPTURABLE = (OURS, "torch", "megatron", "torchtitan")
CROWDED = 0.45  # of the memory; as much again is left for gradients, their sums and a step
SLOW = 5.0  # seconds of a first step that are said
WRONG = 0.2  # relative error of another layer than the wanted one; e4m3 stays below 0.1


def rounds(contest: Contest, case: Case, names: tuple[str, ...]) -> Iterator[list[Contender]]:
    """Yield all that can run and have no row yet; why another cannot is noted.

    They are one round, timed in turn, where memory holds their weights. A list is emptied when the
    next is asked for.
    """
    found: list[Contender] = []
    wanted: tuple[Tensor, Tensor] | None = None
    for precision, makers in _backends(contest, case, names):
        wanted = reference(case) if wanted is None else wanted
        for name, maker in makers.items():
            found += ready(contest, case, precision, {name: maker}, wanted)
            if found and _crowded(case.device):
                yield found
                found.clear()
                _free(case.device)
    if found:
        yield found


def _backends(
    contest: Contest, case: Case, names: tuple[str, ...]
) -> Iterator[tuple[Precision, Makers]]:
    """Yield what makes the layers of each backend that are not measured yet."""
    for name, precision in contest.entries(names):
        makers: Makers = {}
        with contest.attempt(name, precision):
            build = ours.build if name == OURS else peer(name)
            makers = build(case, precision)
            if not makers:
                contest.note(name, precision, f"it has no {precision}")
        yield (
            precision,
            {n: make for n, make in makers.items() if missing(contest, case, n, precision)},
        )


def ready(
    contest: Contest,
    case: Case,
    precision: Precision,
    makers: Makers,
    wanted: tuple[Tensor, Tensor] | None = None,
) -> list[Contender]:
    """Return those of a backend's recipes that can take the case, after a step each.

    With `wanted`, of `reference`, one that computes another layer is left out, and noted.
    """
    found = []
    for backend, make in makers.items():
        began = time.perf_counter()
        with contest.attempt(backend, precision):
            with to_capture(contest.cuda_graph and can_capture(backend)):
                contender = make()
                train_step(case, contender)(0)  # kernels are compiled
                if wanted is not None and DROPPING not in backend:
                    _check(errors(case, contender, wanted))
            found.append(contender)
        seconds = time.perf_counter() - began
        if seconds > SLOW:
            print(f"{case.shape.name}: {backend} took {seconds:.0f} s to compile", file=sys.stderr)
    return found


def _check(found: dict[str, float]) -> None:
    """Raise ValueError for a layer that is not the wanted one."""
    for what, error in found.items():
        if not error < WRONG:
            raise ValueError(f"it computes another layer: its {what} is {error:.3g}")


def can_capture(backend: str) -> bool:
    """Whether a step of this backend goes into a CUDA graph: nothing in it waits for the host."""
    name, *ways = backend.split("+")
    return name in CAPTURABLE and (name != "megatron" or DROPPING in ways)


def missing(contest: Contest, case: Case, backend: str, precision: Precision) -> list[Gradients]:
    """Return the kinds of gradients of which a backend has no row yet."""
    return [
        gradients
        for gradients in contest.gradients
        if not contest.has(
            bench="layer",
            shape=case.shape.name,
            routing=case.routing,
            backend=backend,
            precision=precision,
            graph=contest.cuda_graph and can_capture(backend),
            gradients=gradients,
        )
    ]


def errors(case: Case, contender: Contender, wanted: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Return the relative errors of output and input gradient against fp32, on some tokens."""
    tokens = case.tokens[0]
    WeightGradients(case, contender, "anew").start()
    output = contender.forward(tokens)
    (grad,) = torch.autograd.grad(output, tokens, case.grads[0])
    return {
        "error": _relative(output, wanted[0]),
        "grad_error": _relative(grad, wanted[1]),
    }


def _relative(value: Tensor, wanted: Tensor) -> float:
    return relative_error(value.detach()[: len(wanted)], wanted)


def _crowded(device: torch.device) -> bool:
    """Whether what is made so far takes so much memory that it is timed before more is made."""
    if device.type != "cuda":
        return False
    total = torch.cuda.get_device_properties(device).total_memory
    return torch.cuda.memory_allocated(device) > CROWDED * total


def _free(device: torch.device) -> None:
    gc.collect()  # layers of peers refer to themselves
    if device.type == "cuda":
        torch.cuda.empty_cache()
