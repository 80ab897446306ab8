"""Kernels that hold rows in shared memory ask for no more than an SM has; compiled, never run."""

import pytest
import torch

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ep_plugin.moe.kernels import peers

HOPPER, SHARED_MEMORY = GPUTarget("cuda", 90, 32), 232448  # bytes of a block
TYPES = {torch.int64: "i64", torch.uint8: "u8", torch.bfloat16: "bf16", torch.float32: "fp32"}


@pytest.mark.parametrize(
    ("kernel", "dtype", "ranks", "width"),
    [
        ("push", torch.int64, 2, 7168 // 4),  # tokens of the largest model
        ("push", torch.int64, 8, 1),  # probabilities of a token with one expert
        ("push", torch.uint8, 8, 1),
        ("sum", torch.bfloat16, 2, 7168),
        ("sum", torch.bfloat16, 8, 1),
        ("sum", torch.float32, 16, 2048),
    ],
)
def test_shared_memory_suffices(kernel: str, dtype: torch.dtype, ranks: int, width: int) -> None:
    rows = torch.empty(1, width, dtype=dtype)
    function, tile = {
        "push": (peers._push_kernel, peers.push_tile(rows, ranks)),
        "sum": (peers._sum_home_kernel, peers.sum_tile(rows, ranks)),
    }[kernel]
    arguments = (f"*{TYPES[dtype]}", "*i64", "i32", "*i32", "i32", "i32")
    constants = (ranks, tile.rows, tile.block, peers.STAGES)
    names = function.kernel.arg_names
    source = ASTSource(
        fn=function.kernel,
        signature=dict(zip(names, (*arguments, *["constexpr"] * len(constants)), strict=True)),
        constexprs={(len(arguments) + i,): value for i, value in enumerate(constants)},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(arguments))},
    )
    compiled = triton.compile(source, target=HOPPER, options={"num_warps": peers.WARPS})
    assert 0 < compiled.metadata.shared <= SHARED_MEMORY
