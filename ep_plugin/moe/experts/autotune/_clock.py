"""How long a grouped GEMM takes on a GPU, by CUDA events."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ep_plugin.moe.interfaces import GroupedGemm

REPEATS = 5


def time_on_gpu(gemm: GroupedGemm, weight: Tensor, rows: int) -> float:
    """Return the median milliseconds of forward, dgrad and wgrad for `weight` [e, out, in].

    Each of `rows` random rows goes to an expert at random, so that experts' rows end where they do
    in training. The host launches them while earlier ones are computed: its time counts where it is
    longer. If a backend makes the host wait, the time in which the GPU then idles counts too.
    """
    experts, out_features, in_features = weight.shape
    # An own generator, so that measuring does not change the random numbers of the run.
    generator = torch.Generator(weight.device).manual_seed(0)
    inputs = weight.new_empty(rows, in_features).normal_(generator=generator)
    grads = weight.new_empty(rows, out_features).normal_(generator=generator)
    counted = random_ends(experts, rows, generator)

    def products() -> None:
        ends = counted.view(-1)  # a tensor of its own, as each step's: what is kept for one is not
        gemm.forward(inputs, weight, ends)
        gemm.dgrad(grads, weight, ends)
        gemm.wgrad(grads, inputs, ends)

    with torch.no_grad():
        products()  # compiles and warms up
        return median(_milliseconds(products) for _ in range(REPEATS))


def random_ends(experts: int, rows: int, generator: torch.Generator) -> Tensor:
    """Return the row after each expert's last, [e] int32, where each row's expert is random."""
    chosen = torch.rand(rows, device=generator.device, generator=generator) * experts
    return torch.bincount(chosen.long(), minlength=experts).cumsum(0).to(torch.int32)


def _milliseconds(work: Callable[[], None]) -> float:
    event: Any = torch.cuda.Event
    start, stop = event(enable_timing=True), event(enable_timing=True)
    work()
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))
