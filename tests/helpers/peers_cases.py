"""Kernels on several ranks' buffers beside their twins, the buffers all of this process.

Run with TRITON_INTERPRET=1 on the CPU. Rows hold small integers, whose sums no dtype rounds.
"""

import itertools
import sys

import torch
from torch import Tensor

from ep_plugin.moe.kernels import peers as kernels
from ep_plugin.moe.kernels import peers_torch as twins
from ep_plugin.moe.kernels.peers_torch import Peers

OFFSET = 256  # bytes before the rows, which nothing may touch
FILL = 7


def make_peers(ranks: int, num_bytes: int, device: str) -> Peers:
    buffers = [torch.full((num_bytes,), FILL, dtype=torch.uint8, device=device)]
    buffers += [buffers[0].clone() for _ in range(ranks - 1)]
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers], device=device)
    return Peers(tuple(buffers), addresses)


def random_places(tokens: int, ranks: int, device: str) -> Tensor:
    """A third of the tokens are not sent to a rank; the others' rows are in a random order."""
    place = torch.stack([torch.randperm(tokens, device=device) for _ in range(ranks)], dim=1)
    return place.masked_fill(torch.rand(tokens, ranks, device=device) < 0.3, -1).to(torch.int32)


def check(tokens: int, ranks: int, width: int, dtype: torch.dtype, device: str) -> None:
    """What is pushed to the buffers, and what is summed from them, are the twins' to the bit."""
    what = f"tokens {tokens}, ranks {ranks}, width {width}, {dtype}"
    rows = torch.randint(-20, 20, (tokens, width), device=device).to(dtype)
    place = random_places(tokens, ranks, device)
    num_bytes = OFFSET + rows.numel() * rows.element_size() + 64
    found, expected = (make_peers(ranks, num_bytes, device) for _ in range(2))
    for programs in (1, 3):
        kernels.push_rows(rows, found, OFFSET, place, programs)
        twins.push_rows(rows, expected, OFFSET, place, programs)
        for got, wanted in zip(found.buffers, expected.buffers, strict=True):
            assert torch.equal(got, wanted), f"push: {what}"
        if dtype.is_floating_point:
            got = kernels.sum_rows(rows, found, OFFSET, place, programs)
            wanted = twins.sum_rows(rows, expected, OFFSET, place, programs)
            assert torch.equal(got, wanted), f"sum: {what}"
            times = (place >= 0).sum(1, keepdim=True)
            assert torch.equal(got, (rows * times).to(dtype)), f"there and back: {what}"


def check_all(
    device: str,
    tokens: tuple[int, ...] = (0, 1, 37),
    ranks: tuple[int, ...] = (1, 2, 3, 8),
    widths: tuple[int, ...] = (1, 4, 24),
) -> None:
    torch.manual_seed(0)
    dtypes = (torch.bfloat16, torch.float32, torch.int64)
    for case in itertools.product(tokens, ranks, widths, dtypes):
        check(*case, device)
    check(5, 2, 1100, torch.bfloat16, device)


if __name__ == "__main__":
    check_all(sys.argv[1])
