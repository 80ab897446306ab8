"""The whole layer, router to combine, forward and backward: this package and its peers in turn.

The weights are quantised once in eight steps, as in an optimizer step of eight micro-batches: a
step is timed with the weights kept, their quantisation by itself, and `ms` has an eighth of it.
"""

from collections.abc import Iterator
from typing import Any

import torch

from ep_plugin.commands.bench.accumulate import train_step
from ep_plugin.commands.bench.case import Case, Contender, make_case, reference
from ep_plugin.commands.bench.contest import OURS, Contest
from ep_plugin.commands.bench.figures import Row, make_row
from ep_plugin.commands.bench.floors import (
    STEPS_PER_WEIGHT,
    Gradients,
    Work,
    floor_ms,
    layer_flops,
)
from ep_plugin.commands.bench.measure import Step, Timing, captured, to_capture
from ep_plugin.commands.bench.rounds import can_capture, errors, missing, rounds
from ep_plugin.commands.bench.shapes import Shape

PEERS = ("torch", "megatron", "sonicmoe", "liger", "veomni", "torchtitan", "deepspeed")


def measure(contest: Contest, shape: Shape, routing: str) -> Iterator[Row]:
    """Yield a row for each contender, and each kind of gradients, that is not measured yet."""
    case = make_case(shape, routing, contest.protocol.device)
    for contenders in rounds(contest, case, (OURS, *PEERS)):
        yield from _measure_round(contest, case, contenders)


def _measure_round(contest: Contest, case: Case, contenders: list[Contender]) -> list[Row]:
    """Return the rows of contenders that are timed in turn."""
    kinds = {c.backend: missing(contest, case, c.backend, c.precision) for c in contenders}
    pool = torch.cuda.graph_pool_handle() if contest.cuda_graph else None
    steps: dict[str, Step] = {}
    for contender in contenders:
        with contest.attempt(contender.backend, contender.precision):
            made = _steps(case, contender, kinds[contender.backend], pool)
            steps |= {f"{contender.backend}/{part}": step for part, step in made.items()}
    if not steps:
        return []
    times, gpu = contest.protocol.interleave(steps, f"layer {case.shape.name} {case.routing}")
    rows, wanted = [], reference(case)
    for contender in contenders:
        prefix = f"{contender.backend}/"
        own = {n.removeprefix(prefix): t for n, t in times.items() if n.startswith(prefix)}
        if not own:
            continue
        graph = contest.cuda_graph and can_capture(contender.backend)
        found = errors(case, contender, wanted)
        for gradients in kinds[contender.backend]:
            row = _row(contest, case, contender, own, gradients)
            rows.append(row | {"graph": graph, "gpu": gpu} | found)
    return rows


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
    capture = pool is not None and can_capture(contender.backend)
    with to_capture(capture):
        for step in train.values():
            step(0)
    steps = {**train, "forward": _forward(case, contender)}
    weights = weight_step(contender, train[f"step {kinds[0]}"])
    if capture:
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
    return Timing(step.median + share, step.p10 + share, step.p90 + share, step.host)


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
        host_ms=whole.host,
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
