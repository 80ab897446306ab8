"""Operands of one linear map's three grouped products, and the products of this package."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ep_plugin import autotune
from ep_plugin.bench.case import SETS, Case
from ep_plugin.bench.floors import Direction, Precision
from ep_plugin.config import BackendUnavailable, ConfigError
from ep_plugin.e4m3 import BLOCK
from ep_plugin.kernels import select
from ep_plugin.registry import available, resolve


@dataclass(frozen=True)
class Problem:
    """rows [R, a], gradients [R, b] and weight [e, b, a] in bf16, expert-major."""

    linear: str
    rows: tuple[Tensor, ...]  # one of each set
    grads: tuple[Tensor, ...]
    weight: Tensor
    ends: tuple[Tensor, ...]  # [e] int32, row behind each expert's last


@dataclass(frozen=True)
class Product:
    """One of the three products, its operands ready."""

    backend: str
    precision: Precision
    direction: Direction
    run: Callable[[int], Tensor]  # index of a set -> [R, b], [R, a] or [e, b, a]


def make_problem(case: Case, linear: str) -> Problem:
    """Return random operands with this case's weight and counts."""
    inputs, outputs = case.shape.linears[linear]
    generator = torch.Generator(case.device).manual_seed(1)

    def normal(width: int) -> Tensor:
        values = torch.empty(case.shape.rows, width, dtype=torch.bfloat16, device=case.device)
        return values.normal_(generator=generator)

    return Problem(
        linear,
        tuple(normal(inputs) for _ in range(SETS)),
        tuple(normal(outputs) for _ in range(SETS)),
        getattr(case, linear),
        tuple(case.ends(index) for index in range(SETS)),
    )


Maker = Callable[[Problem], list[Product]]


def makers(precision: Precision) -> dict[str, Maker]:
    """Return what makes the products of each option of `ep_plugin/gemm`, or of `ep_plugin/fp8`.

    A maker raises BackendUnavailable where the option's package is missing.
    """
    if precision == "bf16":
        return {name: partial(_backend, name) for name in available("gemm")}
    return {name: RECIPES.get(name, partial(_unknown, name)) for name in available("fp8")}


def _unknown(name: str, problem: Problem) -> list[Product]:
    raise BackendUnavailable(f"fp8 {name} has no operands in ep_plugin/bench/products.py")


def _backend(name: str, problem: Problem) -> list[Product]:
    rows, grads, weight, ends = problem.rows, problem.grads, problem.weight, problem.ends
    _, outputs, inputs = weight.shape
    gemm: Any = resolve("gemm", name)(inputs, outputs, weight.dtype)
    runs: dict[Direction, Callable[[int], Tensor]] = {
        "forward": lambda i: gemm.forward(rows[i], weight, ends[i]),
        "dgrad": lambda i: gemm.dgrad(grads[i], weight, ends[i]),
        "wgrad": lambda i: gemm.wgrad(grads[i], rows[i], ends[i]),
    }
    return [Product(f"ep_plugin+{name}", "bf16", d, run) for d, run in runs.items()]


def _rowwise(problem: Problem) -> list[Product]:
    """Products of values with one power of two for each row; see `ep_plugin.fp8.rowwise`."""
    ops, ends = select(problem.weight), problem.ends
    straight, transposed = ops.quantize_weight(problem.weight)
    rows = [ops.quantize_rows(matrix) for matrix in problem.rows]
    grads = [ops.quantize_rows(matrix) for matrix in problem.grads]
    order = torch.arange(len(problem.rows[0]), dtype=torch.int32, device=ends[0].device)
    tiles = [ops.plan_tiles(len(order), end) for end in ends]
    left, right = (
        [ops.transpose_rows(m, *(tiles[i], order, ends[i], 0)) for i, m in enumerate(matrices)]
        for matrices in (grads, rows)
    )
    runs: dict[Direction, Callable[[int], Tensor]] = {
        "forward": lambda i: ops.multiply(rows[i], straight, ends[i], tiles[i]),
        "dgrad": lambda i: ops.multiply(grads[i], transposed, ends[i], tiles[i]),
        "wgrad": lambda i: ops.multiply_columns(left[i], right[i], tiles[i]),
    }
    return [Product("ep_plugin+rowwise", "fp8", d, run) for d, run in runs.items()]


def _blockwise(problem: Problem) -> list[Product]:
    """bf16 products of operands rounded by blocks; see `ep_plugin.fp8.blockwise`."""
    ops, ends, (_, outputs, inputs) = select(problem.weight), problem.ends, problem.weight.shape
    if inputs % BLOCK or outputs % BLOCK:
        raise ConfigError(f"fp8 blockwise needs multiples of {BLOCK}, not {inputs}, {outputs}")
    weight = ops.round_weight(problem.weight)
    rows, grads = (
        [ops.round_rows(matrix, ends[i]) for i, matrix in enumerate(matrices)]
        for matrices in (problem.rows, problem.grads)
    )
    order = torch.arange(len(problem.rows[0]), device=weight.device)
    tiles = [ops.plan_tiles(len(order), end) for end in ends]
    left, right = (
        [ops.round_columns(matrix, tiles[i], order, ends[i]) for i, matrix in enumerate(matrices)]
        for matrices in (problem.grads, problem.rows)
    )
    gemm = autotune.AutoGemm().pick(weight, len(rows[0]))
    runs: dict[Direction, Callable[[int], Tensor]] = {
        "forward": lambda i: gemm.forward(rows[i], weight, ends[i]),
        "dgrad": lambda i: gemm.dgrad(grads[i], weight, ends[i]),
        "wgrad": lambda i: gemm.wgrad(left[i], right[i], ends[i]),
    }
    return [Product("ep_plugin+blockwise", "fp8", d, run) for d, run in runs.items()]


RECIPES: dict[str, Maker] = {"rowwise": _rowwise, "blockwise": _blockwise}
