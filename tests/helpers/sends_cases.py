"""Kernels that plan what ranks send each other beside their twins, on any device.

All ranks of a group are of this process. Integers and moved numbers: all is equal to the bit.
"""

import itertools
import os
from typing import Any

import torch
from torch import Tensor

from ep_plugin.moe.kernels import sends as kernels
from ep_plugin.moe.kernels import sends_torch as twins

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Experts of a rank, ep, etp: 1 to 8 ranks, and more.
HOSTS = (
    *((4, 1, 1), (1, 2, 1), (3, 3, 1), (2, 2, 2), (5, 5, 1), (2, 3, 2), (1, 7, 1), (4, 8, 1)),
    *((3, 2, 4), (1, 1, 3), (2, 16, 1), (2, 4, 4), (1, 17, 1)),
)
TOKENS = (37, 0, 1, 64, 65, 200)  # of the first rank
CHOICES = (3, 1, 6, 2)


def assert_bits(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: str) -> None:
    for index, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert (x.dtype, x.shape) == (y.dtype, y.shape), f"{what}, {index}"
        bits = [z.clone(memory_format=torch.contiguous_format).view(torch.uint8) for z in (x, y)]
        assert torch.equal(*bits), f"{what}, {index}"


def random_ids(tokens: int, choices: int, experts: int, case: str, device: str) -> Tensor:
    """Expert ids [T, K]; a token may name an expert twice, as no router does."""
    ids = torch.randint(0, experts, (tokens, choices), device=device)
    if case == "dropped":
        return ids.masked_fill(torch.rand(ids.shape, device=device) < 0.4, -1)
    return torch.full_like(ids, experts - 1 if case == "one expert" else -1)


def check_sends(tokens: int, choices: int, hosts: tuple[int, int, int], device: str) -> None:
    """Counts, places and numbers of every rank; each rank's rows are written once."""
    experts, ep, etp = hosts
    ranks = ep * etp
    for case in ("dropped", "one expert", "absent")[: 1 if INTERPRETED and ranks > 8 else None]:
        what = f"{case}, tokens {tokens}, choices {choices}, hosts {hosts}"
        sizes = [(tokens, 0, 1, tokens // 2 + 7)[rank % 4] for rank in range(ranks)]
        ids = [random_ids(size, choices, experts * ep, case, device) for size in sizes]
        if choices > 1:  # as they lie in memory elsewhere
            ids[0] = ids[0].T.contiguous().T
        found, expected = ([m.count_sends(x, *hosts) for x in ids] for m in (kernels, twins))
        for (own, _), (twin, _) in zip(found, expected, strict=True):
            assert_bits((own,), (twin,), f"count_sends, {what}")
        table = torch.stack([own for own, _ in expected])
        places: list[Tensor] = []
        for rank, (x, (_, before), (_, sent)) in enumerate(zip(ids, found, expected, strict=True)):
            result = kernels.place_sends(x, before, table, rank, *hosts)
            twin_result = twins.place_sends(x, sent, table, rank, *hosts)
            assert_bits(result, twin_result, f"place_sends, rank {rank}, {what}")
            places.append(result[0])
        for rank, column in enumerate(torch.cat(places).unbind(1)):
            rows = torch.arange(int(table[:, 0, rank].sum()), device=device)
            assert torch.equal(column[column >= 0].long(), rows), f"rows of {rank}, {what}"


def check_own(rows: int, choices: int, experts: int, first: int, device: str) -> None:
    """Ids, probabilities and counts of those here, whatever rows that nobody wrote hold."""
    last = first + experts
    edges = [-1, first - 1, first, last - 1, last, 2**31, -(2**63), 2**63 - 1]
    near = torch.randint(-1, last + experts, (rows, choices), device=device)
    wild = torch.tensor(edges, device=device)[torch.randint(0, 8, near.shape, device=device)]
    probs = torch.rand(rows, choices, device=device)
    probs[torch.rand(probs.shape, device=device) < 0.2] = torch.nan
    bounds = [None, *(torch.tensor(n, device=device) for n in {0, rows // 2, rows})]
    for came, ids in itertools.product(bounds, (near, wild.T.contiguous().T)):
        what = f"rows {rows}, choices {choices}, experts {experts} from {first}, came {came}"
        for dtype in (torch.float32, torch.bfloat16):
            given: Any = (ids, probs.to(dtype), came, first, experts)
            found, expected = kernels.take_own(*given), twins.take_own(*given)
            assert_bits(found, expected, f"take_own, {dtype}, {what}")
            grads = given[1].T.contiguous().T
            kept = [module.zero_absent(grads, expected[0]) for module in (kernels, twins)]
            assert_bits((kept[0],), (kept[1],), f"zero_absent, {dtype}, {what}")


def check_all(device: str) -> None:
    torch.manual_seed(0)
    for index, hosts in enumerate(HOSTS):
        check_sends(TOKENS[index % len(TOKENS)], CHOICES[index % len(CHOICES)], hosts, device)
    for tokens, choices in itertools.product(TOKENS, CHOICES[: 2 if INTERPRETED else None]):
        check_sends(tokens, choices, (2, 2, 2), device)
    for tokens in () if INTERPRETED else (7000, 100000):
        check_sends(tokens, 8, (32, 8, 1), device)
    some, more = ((0, 1, 37), (1, 3), (1, 3)), ((300, 5000), (3, 8), (1, 32))
    for sizes in (some,) if INTERPRETED else (some, more):
        for rows, topk, experts in itertools.product(*sizes):
            check_own(rows, topk, experts, 2 * experts, device)
    check_own(37, 6, 16, 0, device)
    check_own(3, 2, 200, 400, device)
