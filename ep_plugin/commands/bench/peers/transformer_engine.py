"""Transformer Engine's grouped products in bf16, alone, as its GroupedLinear calls them.

Row counts are on the host before the clock starts: a layer of Megatron's has them there already.
With NVTE_USE_CUTLASS_GROUPED_GEMM=1 in the environment from the start it is one CUTLASS kernel;
that is read by its library, so both ways need a process each.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ep_plugin.commands.bench.case import require_cuda
from ep_plugin.commands.bench.floors import Direction, Precision
from ep_plugin.commands.bench.peers import _te_switches
from ep_plugin.commands.bench.products import Problem, Product
from ep_plugin.moe.experts.gemm import te


def build(problem: Problem, precision: Precision) -> list[Product]:
    """Return the products, and the weight gradient that is added to fp32; only bf16 is a peer."""
    require_cuda("transformer_engine", problem.weight.device)
    if precision != "bf16":
        return []
    rows, grads, weight = problem.rows, problem.grads, problem.weight
    counts = [te.counts_of(ends) for ends in problem.ends]
    total = torch.zeros_like(weight, dtype=torch.float32)

    def add(index: int) -> Tensor:
        te.by_columns(grads[index], rows[index], counts[index], total)
        return total

    runs: dict[Direction, Callable[[int], Tensor]] = {
        "forward": lambda i: te.by_rows(rows[i], weight, counts[i], weight.shape[1], "TN"),
        "dgrad": lambda i: te.by_rows(grads[i], weight, counts[i], weight.shape[2], "NN"),
        "wgrad": lambda i: te.by_columns(grads[i], rows[i], counts[i]),
    }
    backend, switches = _te_switches.named("transformer_engine"), _te_switches.told()
    made = [Product(backend, precision, d, run, switches=switches) for d, run in runs.items()]
    return [*made, Product(backend, precision, "wgrad", add, total, switches)]
