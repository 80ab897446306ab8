"""Each memory-bound step of the experts alone, and the choice of experts, by their bytes.

Bytes are those of a step's inputs and results, each counted once. Its floor is what a copy of that
many bytes takes on this device, measured in the same run.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ep_plugin.commands.bench.case import SETS, Case, make_case
from ep_plugin.commands.bench.contest import OURS, Contest
from ep_plugin.commands.bench.figures import Row, make_row
from ep_plugin.commands.bench.measure import copy_bandwidth
from ep_plugin.commands.bench.shapes import Shape
from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.groups import ExpertGroups
from ep_plugin.moe.kernels import gate, select
from ep_plugin.moe.router.topk import TopKRouter
from ep_plugin.moe.routing_config import RoutingConfig

Arguments = tuple[Any, ...]
Step = tuple[Callable[..., Any], list[Arguments]]  # and its arguments, for each set
SWIGLU = "swiglu"


def measure(contest: Contest, shape: Shape, routing: str) -> list[Row]:
    """Return a row for each kernel that is not measured yet."""
    case = make_case(shape, routing, contest.protocol.device)
    precisions = [precision for _, precision in contest.entries((OURS,))]
    steps = {
        (op, precision): step
        for (op, precision), step in _steps(case).items()
        if precision in precisions
        and not contest.has(
            bench="kernels",
            shape=shape.name,
            op=op,
            routing=routing,
            backend=OURS,
            precision=precision,
        )
    }
    if not steps:
        return []
    bandwidth = copy_bandwidth(contest.protocol)
    times, gpu = contest.protocol.interleave(
        {" ".join(name): _call(step) for name, step in steps.items()},
        f"kernels {shape.name} {routing}",
    )
    rows = []
    for (op, precision), (function, arguments) in steps.items():
        moved = num_bytes(arguments[0]) + num_bytes(function(*arguments[0]))
        time = times[f"{op} {precision}"]
        row = make_row(case.device, time, bench="kernels", shape=shape.name, op=op)
        row |= {"backend": OURS, "precision": precision, "routing": routing, "gpu": gpu}
        row |= {"floor_ms": round(1e3 * moved / bandwidth, 6)}
        rows.append(row | {"gbps": round(moved / time.median / 1e6, 3)})
    return rows


def _call(step: Step) -> Callable[[int], object]:
    function, arguments = step
    return lambda index: function(*arguments[index])


def num_bytes(value: object) -> int:
    """Return the bytes of all tensors in `value`, a tensor, a record or a sequence of them."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, tuple | list):
        return sum(num_bytes(part) for part in value)
    if is_dataclass(value):
        return sum(num_bytes(getattr(value, field.name)) for field in fields(value))
    return 0


def _steps(case: Case) -> dict[tuple[str, str], Step]:
    """Return name and precision -> kernel and arguments."""
    sets = [_arguments(case, index) for index in range(SETS)]
    ops = select(case.router)
    functions = {
        "route": _route(case),
        "add_gate": gate.add_product if case.device.type == "cuda" else gate.add_product_torch,
        "sort": ops.sort_choices,
        "spread": ops.spread_rows,
        "spread rows8": ops.spread_rows8,
        "quantise": ops.quantize_rows,
        "activate": ops.activate,
        "activate_backward": ops.activate_backward,
        "transpose_rows": ops.transpose_rows,
        "sum_rows": ops.sum_rows,
        "quantize_weight": ops.quantize_weight,
        "quantize_blocks": ops.quantize_blocks,
        "transpose_blocks": ops.transpose_blocks,
        "quantize_weight_blocks": ops.quantize_weight_blocks,
    }
    return {
        (op, precision): (functions[op.partition(",")[0]], [s[op, precision] for s in sets])
        for op, precision in sets[0]
    }


def _arguments(case: Case, index: int) -> dict[tuple[str, str], Arguments]:
    """Return the arguments of each kernel on one set, as a step of the layer has them."""
    shape, ops, choices, counts = (
        case.shape,
        select(case.router),
        case.choices[index],
        case.counts(index),
    )
    order, place, ends = ops.sort_choices(choices, counts)
    tokens, hidden = case.tokens[index].detach(), _normal(case, index, 2 * shape.ffn)
    probs = torch.rand(choices.shape, device=case.device)
    grads, tokens8 = _normal(case, index, shape.ffn), ops.quantize_rows(tokens)
    hidden8, tiles = ops.quantize_rows(hidden), ops.plan_tiles(shape.rows, ends)
    tokens_blocks, hidden_blocks = ops.quantize_blocks(tokens), ops.quantize_blocks(hidden)
    logits = tokens.float() @ case.router.float().T
    d_logits, router = logits.to(tokens.dtype).repeat(1, 2), case.router.to(tokens.dtype)
    rows = (probs, order, ends, SWIGLU)
    return {
        ("route", "bf16"): (logits,),
        ("add_gate", "bf16"): (tokens, d_logits, router),
        ("sort", "bf16"): (choices, counts),
        ("spread", "bf16"): (tokens, place, ends),
        ("spread rows8", "fp8"): (tokens8, place, ends),
        ("quantise, tokens", "fp8"): (tokens,),
        ("quantise, pre-activations", "fp8"): (hidden,),
        ("activate", "bf16"): (hidden, *rows),
        ("activate", "fp8"): (hidden, *rows, "rows"),
        ("activate_backward", "bf16"): (grads, hidden, *rows),
        ("activate_backward", "fp8"): (grads, hidden, *rows, "rows"),
        ("activate_backward, kept in fp8", "fp8"): (grads, hidden8, *rows, "rows"),
        ("transpose_rows, tokens", "fp8"): (tokens8, tiles, order, ends, shape.topk),
        ("transpose_rows, pre-activations", "fp8"): (hidden8, tiles, order, ends, 0),
        ("sum_rows", "bf16"): (_normal(case, index, shape.hidden), place, ends),
        ("quantize_weight, fc1", "fp8"): (case.fc1,),
        ("quantize_weight, fc2", "fp8"): (case.fc2,),
        ("spread rows8, by blocks", "fp8"): (tokens_blocks, place, ends),
        ("quantize_blocks, tokens", "fp8"): (tokens,),
        ("activate, by blocks", "fp8"): (hidden, *rows, "blocks"),
        ("activate_backward, by blocks", "fp8"): (grads, hidden, *rows, "blocks"),
        ("transpose_blocks, tokens", "fp8"): (tokens_blocks, tiles, order, ends, shape.topk),
        ("transpose_blocks, pre-activations", "fp8"): (hidden_blocks, tiles, order, ends, 0),
        ("quantize_weight_blocks, fc1", "fp8"): (case.fc1,),
        ("quantize_weight_blocks, fc2", "fp8"): (case.fc2,),
    }


def _normal(case: Case, index: int, width: int) -> Tensor:
    generator = torch.Generator(case.device).manual_seed(index)
    values = torch.empty(case.shape.rows, width, dtype=torch.bfloat16, device=case.device)
    return values.normal_(generator=generator)


class _FromLogits(TopKRouter):
    """A router whose input are the logits, so that the gate's product is not timed."""

    def logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, hidden


def _route(case: Case) -> Callable[[Tensor], Tensor]:
    """Return the choice of experts, from logits [T, e] to probabilities [T, K], with balancing."""
    experts = case.shape.experts
    config = MoEConfig(
        hidden_size=experts,
        ffn_hidden_size=1,
        num_experts=experts,
        routing=RoutingConfig(topk=case.shape.topk, aux_loss_coeff=0.01),
    )
    router = _FromLogits(config, ExpertGroups(), device=case.device)

    @torch.no_grad()
    def route(logits: Tensor) -> Tensor:
        probs: Tensor = router(logits).probs
        return probs

    return route
