"""Every grouped GEMM backend equals a float64 product per expert, forward and both gradients."""

import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from ep_plugin import ConfigError
from ep_plugin.registry import available, resolve

COUNTS = {
    "ragged": [5, 1, 7, 3],
    "an empty expert": [4, 0, 6, 2],
    "first and last empty": [0, 3, 5, 0],
    "all rows in one": [0, 0, 9, 0],
    "no rows": [0, 0, 0, 0],
}


ABSENT = 3  # rows behind the last expert's, which nobody may read


def oracle(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    blocks = rows[: sum(counts)].double().split(counts)
    return torch.cat([block @ w.T for block, w in zip(blocks, weight.double(), strict=True)])


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", available("gemm"))
def test_backend_equals_the_oracle(name: str, dtype: torch.dtype, counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    num_rows = sum(counts)
    rows, weight = random(num_rows + ABSENT, 16), random(4, 24, 16)
    gradient = random(num_rows + ABSENT, 24).detach()
    expected = oracle(rows, weight, counts)
    exact = torch.autograd.grad(expected, (rows, weight), gradient[:num_rows].double())
    with torch.no_grad():
        rows[num_rows:], gradient[num_rows:] = torch.nan, torch.nan
        ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
        gemm = resolve("gemm", name)(16, 24, dtype)
        product = gemm.forward(rows, weight, ends)
        row_gradient = gemm.dgrad(gradient, weight, ends)
        weight_gradient = gemm.wgrad(gradient, rows, ends)
    assert product.dtype == row_gradient.dtype == weight_gradient.dtype == dtype
    assert_close(product[:num_rows], expected, dtype, "product")
    assert_close(row_gradient[:num_rows], exact[0][:num_rows], dtype, "row gradient")
    assert_close(weight_gradient, exact[1], dtype, "weight gradient")


def test_torch_grouped_refuses_what_it_cannot_align() -> None:
    with pytest.raises(ConfigError, match=r"in_features \(12\) to be a multiple of 8"):
        resolve("gemm", "torch_grouped")(12, 16, torch.bfloat16)
    with pytest.raises(ConfigError, match="gemm 'loop' would do"):
        resolve("gemm", "torch_grouped")(16, 16, torch.float64)
