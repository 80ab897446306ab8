"""Per-rank files that do not belong together: each is whole, and all have the right size."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ep_plugin.checkpoint.formats import megatron_dist
from ep_plugin.cli import main
from tests.checkpoint.test_convert_legacy import save, whole_model

Edit = Callable[[random.Random, dict[str, Any]], None]


def _iteration(rng: random.Random, content: dict[str, Any]) -> None:
    content["iteration"] += rng.choice((-3, -1, 1, 500))


def _argument(rng: random.Random, content: dict[str, Any]) -> None:
    name, value = rng.choice((
        ("num_experts", 8), ("swiglu", False), ("moe_layer_freq", [1, 0, 1, 1]), ("kv_channels", 2),
        ("init_method_std", 0.5), ("transformer_impl", "local"), ("pipeline_model_parallel_size", 4)
    ))  # fmt: skip
    setattr(content["args"], name, value)


def _each(content: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    states = [state for key, state in content.items() if key.startswith("model")]
    return [(state, name) for state in states for name, value in state.items()
            if isinstance(value, Tensor)]  # fmt: skip


def _dtype(rng: random.Random, content: dict[str, Any]) -> None:
    """Of one tensor that other ranks have a part or a copy of."""
    state, name = rng.choice(_each(content))
    state[name] = state[name].to(rng.choice((torch.bfloat16, torch.float16, torch.float64)))


def _copies(content: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    return [(state, name) for state, name in _each(content) if ".experts." not in name]


def _values(rng: random.Random, content: dict[str, Any]) -> None:
    state, name = rng.choice(_copies(content))
    values = state[name]
    state[name] = rng.choice((values * 0, values + 1, -values, values.flip(0), values * 1.1))


def _dropped(rng: random.Random, content: dict[str, Any]) -> None:
    state, name = rng.choice(_each(content))
    del state[name]


def _added(rng: random.Random, content: dict[str, Any]) -> None:
    state, name = rng.choice(_copies(content))
    state[f"{name}_{rng.randrange(9)}"] = state[name]


EDITS: dict[str, Edit] = {
    "iteration": _iteration, "argument": _argument, "dtype": _dtype, "values": _values,
    "dropped": _dropped, "added": _added,
}  # fmt: skip


def _convert(root: Path, to: Path) -> int:
    return main(["convert", "--from", str(root), "--to", str(to), "--skip-parity"])


def _files(root: Path) -> list[Path]:
    return sorted(root.glob("iter_*/*/model_optim_rng.pt"))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run saves: each file has the rank that saved it."""
    root = save(tmp_path_factory.mktemp("ranks") / "healthy", "stacked")
    for rank, path in enumerate(_files(root)):
        content = torch.load(path, weights_only=False)
        content["args"].rank = rank
        torch.save(content, path)
    return root


@pytest.mark.parametrize("kind", sorted(EDITS))
@pytest.mark.parametrize("seed", range(4))
def test_what_one_rank_has_otherwise_is_named(
    kind: str, seed: int, healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(f"{kind}/{seed}")
    root = shutil.copytree(healthy, tmp_path / "ranks")
    path = rng.choice(_files(root))
    content = torch.load(path, weights_only=False)
    EDITS[kind](rng, content)
    torch.save(content, path)
    assert _convert(root, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "again" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", range(6))
def test_the_file_of_another_rank_is_no_rank_s(
    seed: int, healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(healthy, tmp_path / "ranks")
    source, target = random.Random(seed).sample(_files(root), 2)
    shutil.copy(source, target)
    assert _convert(root, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "one is a copy of the other" in said
    assert all(str(path.relative_to(root)) in said for path in (source, target))


def test_files_that_one_process_wrote_and_copies_that_drifted_are_fine(
    healthy: Path, tmp_path: Path
) -> None:
    """Tools are rank 0 in every file; sums that are made in another order differ in last bits."""
    root = shutil.copytree(healthy, tmp_path / "ranks")
    first = _files(root)[0]
    for path in _files(root):
        content = torch.load(path, weights_only=False)
        content["args"].rank = 0
        for state, name in _copies(content) if path != first else ():
            state[name] = state[name] * (1 + 1e-5)
        torch.save(content, path)
    assert _convert(root, tmp_path / "out") == 0
    made = megatron_dist.open_checkpoint(tmp_path / "out")
    for name, values in whole_model().items():
        assert torch.allclose(made.read_tensor(name), values, rtol=1e-4), name
