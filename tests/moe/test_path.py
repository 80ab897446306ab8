"""The files that a token passes: few enough to be read in one sitting, and those the docs name."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from spawn import run_ranks

import ep_plugin
from ep_plugin import MoEConfig, MoELayer, ParallelConfig, RoutingConfig, create_expert_groups

ROOT = Path(ep_plugin.__file__).parent
TOOL = 3  # of sys.monitoring; nobody else's


@contextmanager
def entered(files: list[str]) -> Iterator[None]:
    """List the files of ep_plugin whose functions run, in the order in which they are entered."""
    monitoring: Any = sys.monitoring

    def start(code: CodeType, offset: int) -> Any:
        path = Path(code.co_filename)
        if path.is_relative_to(ROOT):
            name = path.relative_to(ROOT).as_posix()
            if name not in files:
                files.append(name)
        return monitoring.DISABLE

    monitoring.use_tool_id(TOOL, "test_path")
    monitoring.register_callback(TOOL, monitoring.events.PY_START, start)
    monitoring.set_events(TOOL, monitoring.events.PY_START)
    try:
        yield
    finally:
        monitoring.set_events(TOOL, 0)
        monitoring.free_tool_id(TOOL)


def walk(changes: dict[str, Any]) -> list[str]:
    """Return the files that a layer's second forward enters on this rank, but for kernels."""
    torch.manual_seed(0)
    groups = create_expert_groups(ParallelConfig(world_size=2, ep=2))
    config = MoEConfig(
        **{"hidden_size": 32, "ffn_hidden_size": 16, "num_experts": 4, "dispatcher": "alltoall"},
        **{"routing": RoutingConfig(topk=2, aux_loss_coeff=0.01), **changes},
    )
    layer = MoELayer(config, groups, dtype=torch.bfloat16)
    hidden = torch.randn(8, 32, dtype=torch.bfloat16, requires_grad=True)
    layer(hidden).sum().backward()  # settles what the first call settles
    files: list[str] = []
    with entered(files):
        output = layer(hidden)
    assert files
    output.sum().backward()
    return [name for name in files if not name.startswith("moe/kernels/")]


# Recomputing experts run on the CPU what others run on a GPU alone: `experts/fused.py`.
BF16 = {"save": "recompute", "gemm": "torch_grouped", "check_splits": "off"}
FP8 = {"fp8": "rowwise", "dispatch_dedup": True, "check_splits": "off"}
ADAPTER = "megatron/block/adapter.py"  # before the layer, where Megatron runs it


@pytest.mark.parametrize(("changes", "budget"), [(BF16, 13), (FP8, 16)])
def test_a_token_passes_few_files(changes: dict[str, Any], budget: int) -> None:
    first, second = run_ranks(2, walk, changes)
    assert first == second
    assert len({ADAPTER, *first}) <= budget


DOCUMENT = ROOT.parent / "docs" / "architecture.md"
MARK = "<!-- walk: token -->"


def documented() -> list[str]:
    """Return the files that the fenced block behind `MARK` lists, one a line, first word."""
    _, mark, behind = DOCUMENT.read_text().partition(MARK)
    assert mark, f"{DOCUMENT.name} must list the token's files in a fenced block behind {MARK}"
    lines = behind.split("```")[1].splitlines()[1:]
    return [line.split()[0].removeprefix("ep_plugin/") for line in lines if line.strip()]


@pytest.mark.skipif(not DOCUMENT.exists(), reason="no docs/architecture.md")
def test_the_docs_name_the_files_of_a_token_in_order() -> None:
    assert documented() == [ADAPTER, *run_ranks(2, walk, BF16)[0]]
