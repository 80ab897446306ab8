"""Rows moved by the kernels' twins have the bits of the plain formula, in every dtype."""

import pytest
import torch
from torch import Tensor

from ep_plugin.moe.rows import count_choices, permute, rows_of, unpermute

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(7, 1, 16, 4), (9, 3, 17, 3), (31, 8, 33, 8), (50, 2, 300, 5), (0, 2, 8, 4), (5, 0, 8, 4)]


def choices(tokens: int, topk: int, experts: int) -> Tensor:
    ids = torch.rand(tokens, max(experts, topk)).topk(topk, dim=1).indices % experts
    return ids.masked_fill(torch.rand(ids.shape) < 0.3, -1)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(
        found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("tokens", "topk", "width", "experts"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_have_the_bits_of_the_plain_formula(
    dtype: torch.dtype, tokens: int, topk: int, width: int, experts: int, exact: bool
) -> None:
    torch.manual_seed(tokens + topk)
    ids = choices(tokens, topk, experts)
    present = int((ids >= 0).sum())
    where = rows_of(ids, count_choices(ids, experts), present if exact else None)
    num_rows = len(where.order)
    assert num_rows == (present if exact else ids.numel())
    flat = ids.flatten().where(ids.flatten() >= 0, experts)
    order = flat.argsort(stable=True)
    assert torch.equal(where.order.long(), order[:num_rows])

    hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
    expected = hidden.detach()[order // max(topk, 1)]
    expected[present:] = 0
    rows = permute(hidden, where)
    assert same_bits(rows.detach(), expected[:num_rows])

    values = (torch.randn(num_rows, width) * torch.randn(num_rows, 1).mul(3).exp()).to(dtype)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    there = (ids >= 0).unsqueeze(-1)
    padded = torch.cat([values, values.new_zeros(1, width)])
    at = place.view_as(ids).where(ids >= 0, num_rows)
    added = padded[at].masked_fill(~there, 0).sum(dim=1)
    values.requires_grad_()
    summed = unpermute(values, where)
    assert same_bits(summed.detach(), added)

    (d_hidden,) = torch.autograd.grad(rows, hidden, values.detach())
    assert same_bits(d_hidden, added)
    (d_values,) = torch.autograd.grad(summed, values, hidden.detach())
    assert same_bits(d_values, expected[:num_rows])
