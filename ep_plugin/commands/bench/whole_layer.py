"""The whole layer, router to combine, forward and backward: this package and its peers in turn.

The weights are quantised once in eight steps, as in an optimizer step of eight micro-batches: a
step is timed with the weights kept, their quantisation by itself, and `ms` has an eighth of it.
"""

from typing import Any

import torch
from torch import Tensor

from ep_plugin.commands.bench import ours
from ep_plugin.commands.bench.accumulate import WeightGradients
from ep_plugin.commands.bench.case import (
    Case,
    Contender,
    Makers,
    make_case,
    reference,
    relative_error,
)
from ep_plugin.commands.bench.contest import OURS, Contest, peer
from ep_plugin.commands.bench.figures import Row, make_row
from ep_plugin.commands.bench.floors import (
    STEPS_PER_WEIGHT,
    Gradients,
    Precision,
    Work,
    floor_ms,
    layer_flops,
)
from ep_plugin.commands.bench.measure import Step, Timing, captured
from ep_plugin.commands.bench.shapes import Shape

PEERS = ("torch", "megatron", "sonicmoe", "liger")
CAPTURABLE = (OURS, "torch", "megatron")  # no host sync in steps, of Megatron with drop-and-pad


def measure(contest: Contest, shape: Shape, routing: str) -> list[Row]:
    """Return a row for each contender, and each kind of gradients, that is not measured yet."""
    case = make_case(shape, routing, contest.protocol.device)
    found = _contenders(contest, case)
    missing = {c.backend: _missing(contest, case, c) for c in found}
    pool = torch.cuda.graph_pool_handle() if contest.cuda_graph else None
    steps: dict[str, Step] = {}
    for contender in found:
        with contest.attempt(contender.backend, contender.precision):
            made = _steps(case, contender, missing[contender.backend], pool)
            steps |= {f"{contender.backend}/{part}": step for part, step in made.items()}
    if not steps:
        return []
    times, gpu = contest.protocol.interleave(steps, f"layer {shape.name} {routing}")
    rows, wanted = [], reference(case)
    for contender in found:
        prefix = f"{contender.backend}/"
        own = {n.removeprefix(prefix): t for n, t in times.items() if n.startswith(prefix)}
        if not own:
            continue
        graph = contest.cuda_graph and contender.capturable
        errors = _errors(case, contender, wanted)
        for gradients in missing[contender.backend]:
            row = _row(contest, case, contender, own, gradients)
            rows.append(row | {"graph": graph, "gpu": gpu} | errors)
    return rows


def _missing(contest: Contest, case: Case, contender: Contender) -> list[Gradients]:
    """Return the kinds of gradients of which a contender has no row yet."""
    return [
        gradients
        for gradients in contest.gradients
        if not contest.has(
            bench="layer",
            shape=case.shape.name,
            routing=case.routing,
            backend=contender.backend,
            precision=contender.precision,
            graph=contest.cuda_graph and contender.capturable,
            gradients=gradients,
        )
    ]


def _contenders(contest: Contest, case: Case) -> list[Contender]:
    """Return all that can run, after a step each: kernels are compiled, failures are noted."""
    found: list[Contender] = []
    for name, precision in contest.entries((OURS, *PEERS)):
        with contest.attempt(name, precision):
            build = ours.build if name == OURS else peer(name)
            makers: Makers = build(case, precision)
            if not makers:
                contest.note(name, precision, f"it has no {precision}")
            found += ready(contest, case, precision, makers)
    return found


def ready(contest: Contest, case: Case, precision: Precision, makers: Makers) -> list[Contender]:
    """Return those of a backend's recipes that can take the case, after a step each."""
    found = []
    for backend, make in makers.items():
        with contest.attempt(backend, precision):
            contender = make()
            train_step(case, contender)(0)
            found.append(contender)
    return found


def train_step(case: Case, contender: Contender, gradients: Gradients = "anew") -> Step:
    """Return one step, forward and backward."""
    weights = WeightGradients(case, contender, gradients)

    def step(index: int) -> None:
        tokens = case.tokens[index]
        weights.start()
        torch.autograd.backward(contender.forward(tokens), case.grads[index])
        weights.finish(tokens)

    return step


def _forward(case: Case, contender: Contender) -> Step:
    @torch.no_grad()
    def step(index: int) -> None:
        contender.forward(case.tokens[index])

    return step


def _steps(case: Case, contender: Contender, kinds: list[Gradients], pool: Any) -> dict[str, Step]:
    """Return what is timed of one contender: a step for each kind of gradients, and its parts."""
    if not kinds:
        return {}
    train = {f"step {kind}": train_step(case, contender, kind) for kind in kinds}
    for step in train.values():
        step(0)
    steps = {**train, "forward": _forward(case, contender)}
    weights = weight_step(contender, train[f"step {kinds[0]}"])
    if pool is not None and contender.capturable:
        if contender.quantize is not None:
            weights = {"weights": captured(weights["weights"], pool)}
            contender.quantize()  # what the graphs quantise lies in memory that all of them share
        steps = {name: captured(step, pool) for name, step in steps.items()}
    return steps | weights


def weight_step(contender: Contender, train: Step) -> dict[str, Step]:
    """Return what tells how long quantising the weights takes; nothing where none are."""
    quantize, renew = contender.quantize, contender.renew
    if quantize is not None:
        return {"weights": lambda _: quantize()}
    if renew is None:
        return {}

    def renewed(index: int) -> None:
        renew()
        train(index)

    return {"renewed": renewed}


def weight_ms(times: dict[str, Timing]) -> float:
    """Return the milliseconds of quantising the weights, of times by name.

    Those of "renewed" are over the first of the names that begin with "step".
    """
    if "weights" in times:
        return times["weights"].median
    if "renewed" in times:
        step = next(time for name, time in times.items() if name.startswith("step"))
        return max(0.0, times["renewed"].median - step.median)
    return 0.0


def with_weights(step: Timing, weights: float) -> Timing:
    """Return a step's milliseconds with its share of quantising the weights."""
    share = weights / STEPS_PER_WEIGHT
    return Timing(step.median + share, step.p10 + share, step.p90 + share)


def _row(
    contest: Contest,
    case: Case,
    contender: Contender,
    times: dict[str, Timing],
    gradients: Gradients,
) -> Row:
    shape, weights = case.shape, weight_ms(times)
    whole = with_weights(times[f"step {gradients}"], weights)
    return make_row(
        case.device,
        whole,
        bench="layer",
        shape=shape.name,
        routing=case.routing,
        largest_share=case.largest_share(),
        backend=contender.backend,
        precision=contender.precision,
        gradients=gradients,
        switches=contender.switches,
        fwd_ms=times["forward"].median,
        weight_quant_ms=weights,
        floor_ms=floor_ms(Work(shape, contender.precision, gradients), contest.rates),
        rates=contest.rates.facts(),
        tflops=layer_flops(shape) / whole.median / 1e9,
        saved_mib=saved_mib(case, contender),
    )


def saved_mib(case: Case, contender: Contender) -> float | None:
    """Return what a forward leaves allocated beside its output; unknown on the CPU."""
    if case.device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    output = contender.forward(case.tokens[0])
    saved = torch.cuda.memory_allocated() - before - output.nbytes
    return saved / 2**20


def _errors(case: Case, contender: Contender, wanted: tuple[Tensor, Tensor]) -> dict[str, float]:
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
