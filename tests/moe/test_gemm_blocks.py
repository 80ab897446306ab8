"""Padded blocks: each begins at a multiple of BLOCK, no two rows share a place."""

import pytest
import torch

from ep_plugin.moe.experts.gemm._blocks import BLOCK, place_rows, spread
from tests.moe.test_gemm import COUNTS

CASES = {
    **COUNTS,
    "around a block": [BLOCK, BLOCK - 1, 0, BLOCK + 1],
    "the most padding there is": [1, 1, 1, 1],
}


@pytest.mark.parametrize("absent", [0, 5])
@pytest.mark.parametrize("counts", CASES.values(), ids=CASES)
def test_blocks_begin_at_multiples_and_hold_their_rows(counts: list[int], absent: int) -> None:
    num_rows = sum(counts)
    rows = torch.arange(1, num_rows + absent + 1, dtype=torch.float64).unsqueeze(1)
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    places = place_rows(ends, len(rows))
    padded = spread(rows, places, 0)
    assert padded.shape == (places.size, 1)
    assert places.row.unique().numel() == len(rows)
    start = 0
    for expert, block in enumerate(rows[:num_rows].split(counts)):
        assert start % BLOCK == 0
        end = start + len(block)
        assert places.ends[expert] == end
        assert torch.equal(padded[start:end], block)
        start += -(-len(block) // BLOCK) * BLOCK
        assert not padded[end:start].any()
    assert start <= places.size
    assert padded[:start].count_nonzero() == num_rows
    assert torch.equal(padded[places.row], rows)
