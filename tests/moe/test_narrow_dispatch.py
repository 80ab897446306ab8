"""Tokens that travel in e4m3: the same results, fewer bytes."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from overlap_cases import BASE, SOME, routings, run, sized
from spawn import run_ranks
from torch import Tensor

from ep_plugin import ConfigError, ParallelConfig, create_expert_groups
from ep_plugin.moe.config import MoEConfig
from ep_plugin.registry import resolve

WAYS: list[dict[str, Any]] = [
    *({"dispatch_dedup": dedup} for dedup in (False, True)),
    *({"dispatch_dedup": dedup, "overlap": "chunked"} for dedup in (False, True)),
    {"dispatcher": "hierarchical"},
]


def check(ranks: int) -> int:
    """What arrives is what the recipe would have made of it on arrival, in either schedule."""
    parallel = ParallelConfig(world_size=ranks, ep=ranks)
    groups = create_expert_groups(parallel, ranks_per_node=ranks // 2)
    checked = 0
    for case in (*SOME, "all tokens to one expert"):
        for fp8 in ("rowwise", "blockwise"):
            for way in WAYS:
                # In chunks a product over fewer rows may round differently, but not whole numbers.
                whole = way.get("overlap") == "chunked"
                config = sized(BASE, fp8=fp8, **way)
                ids = routings()[case]
                wide = run(config, groups, ids, whole=whole)
                found = run(replace(config, dispatch_dtype="fp8"), groups, ids, whole=whole)
                for name, value in wide.items():
                    assert torch.equal(found[name], value), f"{case}, {fp8}, {way}: {name}"
                checked += 1
    return checked


@pytest.mark.parametrize("ranks", [2, 4])
def test_narrow_tokens_change_nothing(ranks: int) -> None:
    assert run_ranks(ranks, check, ranks) == [8 * len(WAYS)] * ranks


def sent_on_the_way_out(fp8: str, dtype: str, dispatcher: str) -> list[tuple[str, int, int]]:
    """Return dtype, rows and bytes of a row of all that has a feature dimension, or a scale."""
    groups = create_expert_groups(ParallelConfig(world_size=2, ep=2), ranks_per_node=1)
    config = sized(BASE, fp8=fp8, dispatch_dtype=dtype, dispatcher=dispatcher)
    sent: list[tuple[str, int, int]] = []
    real = dist.all_to_all_single

    def recording(out: Tensor, rows: Tensor, *splits: Any, **more: Any) -> Any:
        if splits:
            width = rows[:1].numel() * rows.element_size() if len(rows) else 0
            sent.append((str(rows.dtype), len(rows), width))
        return real(out, rows, *splits, **more)

    with patch.object(dist, "all_to_all_single", recording):
        run(config, groups, routings()["different counts"], whole=False)
    return sent


@pytest.mark.parametrize(
    ("fp8", "hidden", "values", "scales", "dispatcher", "legs"),
    [
        ("rowwise", 16, 16, 4, "alltoall", 1),
        ("blockwise", 200, 256, 8, "alltoall", 1),  # padded to two blocks
        ("rowwise", 16, 16, 4, "hierarchical", 2),
    ],
)
def test_bytes_of_a_token_are_one_a_value_and_its_scales(
    fp8: str, hidden: int, values: int, scales: int, dispatcher: str, legs: int
) -> None:
    for wide, narrow in zip(
        run_ranks(2, sent_on_the_way_out, fp8, "bf16", dispatcher),
        run_ranks(2, sent_on_the_way_out, fp8, "fp8", dispatcher),
        strict=True,
    ):
        moved = [count for _, count, width in wide if width == 2 * hidden][:legs]
        assert [item for item in narrow if item[0] == "torch.uint8"] == [
            ("torch.uint8", rows, values) for rows in moved
        ]
        assert all(("torch.float32", rows, scales) in narrow for rows in moved)
        tokens = [item for item in narrow if item[0] == "torch.bfloat16"]
        assert len(tokens) == 3 * legs  # combine, and both ways of the backward
        assert len([item for item in wide if item[0] == "torch.bfloat16"]) == 4 * legs


def test_it_needs_products_that_read_e4m3() -> None:
    for changes in ({}, {"fp8": "rowwise", "fp8_wgrad": "bf16"}):
        with pytest.raises(ConfigError, match="fp8='rowwise' with fp8_wgrad='fp8'"):
            sized(BASE, dispatch_dtype="fp8", **changes)


def refused() -> str:
    groups = create_expert_groups(ParallelConfig(world_size=2, ep=2))
    config: MoEConfig = sized(BASE, fp8="rowwise", dispatch_dtype="fp8")
    with pytest.raises(ConfigError, match="dispatcher='alltoall'") as caught:
        resolve("dispatcher", "symm_mem")(config, groups)
    return str(caught.value)


def test_symm_mem_refuses_it() -> None:
    assert len(set(run_ranks(2, refused))) == 1
