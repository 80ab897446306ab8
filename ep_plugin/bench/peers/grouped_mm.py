"""torch._grouped_mm as it is, bf16, in all three directions."""

import torch

from ep_plugin.bench.floors import Precision
from ep_plugin.bench.products import Problem, Product


def build(problem: Problem, precision: Precision) -> list[Product]:
    """Return the products; they have no fp8."""
    if precision != "bf16":
        return []
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
