"""Every grouped GEMM backend equals a float64 product per expert, forward and both gradients."""

import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from ep_plugin import ConfigError
from ep_plugin.moe.interfaces import GroupedGemm
from ep_plugin.registry import available, resolve

COUNTS = {
    "ragged": [5, 1, 7, 3],
    "an empty expert": [4, 0, 6, 2],
    "first and last empty": [0, 3, 5, 0],
    "all rows in one": [0, 0, 9, 0],
    "no rows": [0, 0, 0, 0],
}
LARGE_COUNTS = {"blocks of more and less than 128 rows": [300, 0, 129, 128]}
ON_CPU = ("loop", "torch_grouped")
ON_CUDA = available("gemm")
FOR_HOPPER = ("deepgemm", "triton")
ABSENT = 3  # rows behind the last expert's, which nobody may read


def oracle(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    blocks = rows[: sum(counts)].double().split(counts)
    return torch.cat([block @ w.T for block, w in zip(blocks, weight.double(), strict=True)])


def check(gemm: GroupedGemm, counts: list[int], sizes: tuple[int, int], like: Tensor) -> None:
    """Compare all three directions; `like` has the device and dtype."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(like).requires_grad_()

    num_rows, dtype, (a, b) = sum(counts), like.dtype, sizes
    rows, weight = random(num_rows + ABSENT, a), random(len(counts), b, a)
    gradient = random(num_rows + ABSENT, b).detach()
    expected = oracle(rows, weight, counts)
    exact = torch.autograd.grad(expected, (rows, weight), gradient[:num_rows].double())
    with torch.no_grad():
        rows[num_rows:], gradient[num_rows:] = torch.nan, torch.nan
        ends = torch.tensor(counts, device=like.device).cumsum(0, dtype=torch.int32)
        product = gemm.forward(rows, weight, ends)
        row_gradient = gemm.dgrad(gradient, weight, ends)
        weight_gradient = gemm.wgrad(gradient, rows, ends)
    assert product.dtype == row_gradient.dtype == weight_gradient.dtype == dtype
    assert product.shape == gradient.shape
    assert row_gradient.shape == rows.shape
    assert_close(product[:num_rows], expected, dtype, "product")
    assert_close(row_gradient[:num_rows], exact[0][:num_rows], dtype, "row gradient")
    assert_close(weight_gradient, exact[1], dtype, "weight gradient")


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ON_CPU)
def test_backend_equals_the_oracle(name: str, dtype: torch.dtype, counts: list[int]) -> None:
    check(resolve("gemm", name)(16, 24, dtype), counts, (16, 24), torch.empty(0, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "counts", [*COUNTS.values(), *LARGE_COUNTS.values()], ids=[*COUNTS, *LARGE_COUNTS]
)
@pytest.mark.parametrize("name", ON_CUDA)
def test_backend_equals_the_oracle_on_a_gpu(name: str, counts: list[int]) -> None:
    try:
        build = resolve("gemm", name)
    except ConfigError as error:
        pytest.skip(str(error))
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if name in FOR_HOPPER and torch.cuda.get_device_capability()[0] != 9:
        with pytest.raises(ConfigError, match="needs a Hopper GPU"):
            build(128, 192, torch.bfloat16)
        return
    like = torch.empty(0, device="cuda", dtype=torch.bfloat16)
    check(build(128, 192, torch.bfloat16), counts, (128, 192), like)


def test_torch_grouped_refuses_what_it_cannot_align() -> None:
    with pytest.raises(ConfigError, match=r"in_features \(12\) to be a multiple of 8"):
        resolve("gemm", "torch_grouped")(12, 16, torch.bfloat16)
    with pytest.raises(ConfigError, match="use gemm='loop'"):
        resolve("gemm", "torch_grouped")(16, 16, torch.float64)
