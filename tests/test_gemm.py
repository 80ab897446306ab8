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


def oracle(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    rows, weight = rows.double(), weight.double()
    blocks = rows.split(counts)
    return torch.cat([block @ w.T for block, w in zip(blocks, weight, strict=True)])


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", available("gemm"))
def test_backend_equals_the_oracle(name: str, dtype: torch.dtype, counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    rows, weight = random(sum(counts), 16), random(4, 24, 16)
    gradient = random(sum(counts), 24).detach()
    product = resolve("gemm", name)(16, 24, dtype)(rows, weight, torch.tensor(counts))
    product.backward(gradient)
    expected = oracle(rows, weight, counts)
    exact = torch.autograd.grad(expected, (rows, weight), gradient.double())
    assert product.dtype == dtype
    assert rows.grad is not None
    assert weight.grad is not None
    assert_close(product, expected, dtype, "product")
    assert_close(rows.grad, exact[0], dtype, "row gradient")
    assert_close(weight.grad, exact[1], dtype, "weight gradient")


def test_torch_grouped_refuses_what_it_cannot_align() -> None:
    with pytest.raises(ConfigError, match=r"in_features \(12\) to be a multiple of 8"):
        resolve("gemm", "torch_grouped")(12, 16, torch.bfloat16)
    with pytest.raises(ConfigError, match="gemm 'loop' would do"):
        resolve("gemm", "torch_grouped")(16, 16, torch.float64)
