"""torch's grouped products as they are, in all three directions: bf16, and e4m3 by rows on a GPU.

The e4m3 operands are those of this package's `rowwise`, so that the products alone are compared.
"""

import torch

from ep_plugin.commands.bench.case import require_cuda
from ep_plugin.commands.bench.floors import Precision
from ep_plugin.commands.bench.peers._scaled import scaled_product
from ep_plugin.commands.bench.products import Problem, Product, by_rows
from ep_plugin.moe.kernels.types import TILE


def build(problem: Problem, precision: Precision) -> list[Product]:
    """Return the products; raises BackendUnavailable for fp8 without a GPU."""
    if precision == "fp8":
        return _scaled(problem)
    rows, grads, weight, ends = problem.rows, problem.grads, problem.weight, problem.ends
    return [
        Product(
            *("torch", precision, "forward"),
            lambda i: torch._grouped_mm(rows[i], weight.transpose(1, 2), offs=ends[i]),
        ),
        Product(
            *("torch", precision, "dgrad"),
            lambda i: torch._grouped_mm(grads[i], weight, offs=ends[i]),
        ),
        Product(
            *("torch", precision, "wgrad"),
            lambda i: torch._grouped_mm(grads[i].T, rows[i], offs=ends[i]),
        ),
    ]


def _scaled(problem: Problem) -> list[Product]:
    require_cuda("torch fp8", problem.weight.device)
    ends, of = problem.ends, by_rows(problem)
    column_ends = [tiles.ends * TILE for tiles in of.tiles]
    # torch wants a scale for each row of each expert's matrix, in one line.
    lines = [
        [m.scale.repeat_interleave(len(m.data)) for m in columns] for columns in (of.left, of.right)
    ]
    return [
        Product(
            *("torch", "fp8", "forward"),
            lambda i: scaled_product(
                *(of.rows[i].data, of.straight.data.transpose(1, 2)),
                *(of.rows[i].scale, of.straight.scale, ends[i]),
            ),
        ),
        Product(
            *("torch", "fp8", "dgrad"),
            lambda i: scaled_product(
                *(of.grads[i].data, of.turned.data.transpose(1, 2)),
                *(of.grads[i].scale, of.turned.scale, ends[i]),
            ),
        ),
        Product(
            *("torch", "fp8", "wgrad"),
            lambda i: scaled_product(
                *(of.left[i].data, of.right[i].data.T, lines[0][i], lines[1][i], column_ends[i]),
            ),
        ),
    ]
