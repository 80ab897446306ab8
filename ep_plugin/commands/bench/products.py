"""Operands of one linear map's three grouped products, and the products of this package."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ep_plugin.commands.bench.case import SETS, Case
from ep_plugin.commands.bench.floors import Direction, Gradients, Precision
from ep_plugin.errors import BackendUnavailable, ConfigError
from ep_plugin.moe.kernels import select
from ep_plugin.moe.kernels.types import Tiles
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
    """One of the three products, its operands ready; a weight gradient may be added to `total`."""

    backend: str
    precision: Precision
    direction: Direction
    run: Callable[[int], Tensor]  # index of a set -> [R, b], [R, a] or [e, b, a]
    total: Tensor | None = None  # [e, b, a] fp32, which `run` adds to and returns
    switches: str = ""  # what is not as the backend's users get it

    @property
    def gradients(self) -> Gradients:
        return "anew" if self.total is None else "added"


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
    """Return what makes the products of each option of `moe/experts/gemm`, or of `moe/experts/fp8`.

    A maker raises BackendUnavailable where the option's package is missing.
    """
    if precision == "bf16":
        return {
            **{name: partial(_backend, name) for name in available("gemm")},
            "add_wgrad": _add_wgrad,
        }
    return {name: RECIPES.get(name, partial(_unknown, name)) for name in available("fp8")}


def _unknown(name: str, problem: Problem) -> list[Product]:
    raise BackendUnavailable(f"fp8 {name} has no operands in ep_plugin/commands/bench/products.py")


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


def _add_wgrad(problem: Problem) -> list[Product]:
    """Return the weight gradient of a layer that adds to `main_grad`, whatever its other products.

    Raises ConfigError where it has no kernel: then a layer makes the gradient and adds it.
    """
    _, outputs, inputs = problem.weight.shape
    if inputs % 8 or outputs % 8:
        raise ConfigError(f"add_wgrad needs multiples of 8, not {inputs}, {outputs}")
    ops, total = select(problem.weight), _new_total(problem)

    def run(index: int) -> Tensor:
        ops.add_wgrad(total, problem.grads[index], problem.rows[index], problem.ends[index])
        return total

    return [Product("ep_plugin+add_wgrad", "bf16", "wgrad", run, total)]


def _new_total(problem: Problem) -> Tensor:
    return torch.zeros_like(problem.weight, dtype=torch.float32)


@dataclass(frozen=True)
class Operands8:
    """Those of a problem in e4m3; all but the weight for each set."""

    straight: Any  # weight
    turned: Any  # transposed
    rows: list[Any]
    grads: list[Any]
    tiles: list[Tiles]
    left: list[Any]  # gradients, transposed
    right: list[Any]  # rows, transposed


def _operands8(
    problem: Problem,
    quantize_weight: Callable[..., Any],
    quantize: Callable[..., Any],
    transpose: Callable[..., Any],
) -> Operands8:
    """Return the operands as these kernels quantise them."""
    ops, ends = select(problem.weight), problem.ends
    rows, grads = ([quantize(m) for m in matrices] for matrices in (problem.rows, problem.grads))
    order = torch.arange(len(problem.rows[0]), dtype=torch.int32, device=ends[0].device)
    tiles = [ops.plan_tiles(len(order), end) for end in ends]
    left, right = (
        [transpose(m, tiles[i], order, ends[i], 0) for i, m in enumerate(matrices)]
        for matrices in (grads, rows)
    )
    straight, turned = quantize_weight(problem.weight)
    return Operands8(straight, turned, rows, grads, tiles, left, right)


def by_rows(problem: Problem) -> Operands8:
    """Return operands with one power of two for each row; see `moe/experts/fp8/rowwise.py`."""
    ops = select(problem.weight)
    return _operands8(problem, ops.quantize_weight, ops.quantize_rows, ops.transpose_rows)


def by_blocks(problem: Problem) -> Operands8:
    """Return operands with one for each 128 of a sum; see `ep_plugin.moe.experts.fp8.blockwise`."""
    ops = select(problem.weight)
    return _operands8(
        problem, ops.quantize_weight_blocks, ops.quantize_blocks, ops.transpose_blocks
    )


def _rowwise(problem: Problem) -> list[Product]:
    ops = select(problem.weight)
    kernels = ops.multiply, ops.multiply_columns, ops.add_wgrad8
    return _recipe("rowwise", problem, by_rows(problem), *kernels)


def _blockwise(problem: Problem) -> list[Product]:
    ops = select(problem.weight)
    _, outputs, inputs = problem.weight.shape
    operands = by_blocks(problem)
    operands = replace(  # results without what is padding
        operands,
        straight=replace(operands.straight, width=outputs),
        turned=replace(operands.turned, width=inputs),
    )
    wgrad = partial(ops.multiply_column_blocks, size=(outputs, inputs))
    return _recipe("blockwise", problem, operands, ops.multiply_blocks, wgrad, ops.add_wgrad_blocks)


def _recipe(
    name: str,
    problem: Problem,
    of: Operands8,
    multiply: Callable[..., Tensor],
    multiply_columns: Callable[..., Tensor],
    add_columns: Callable[..., None],
) -> list[Product]:
    ends, tiles, total = problem.ends, of.tiles, _new_total(problem)

    def add(index: int) -> Tensor:
        add_columns(total, of.left[index], of.right[index], tiles[index])
        return total

    runs: dict[Direction, Callable[[int], Tensor]] = {
        "forward": lambda i: multiply(of.rows[i], of.straight, ends[i], tiles[i]),
        "dgrad": lambda i: multiply(of.grads[i], of.turned, ends[i], tiles[i]),
        "wgrad": lambda i: multiply_columns(of.left[i], of.right[i], tiles[i]),
    }
    backend = f"ep_plugin+{name}"
    made = [Product(backend, "fp8", d, run) for d, run in runs.items()]
    return [*made, Product(backend, "fp8", "wgrad", add, total)]


RECIPES: dict[str, Maker] = {"rowwise": _rowwise, "blockwise": _blockwise}
