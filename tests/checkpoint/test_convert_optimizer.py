"""Optimizer state through a conversion: by parameter it goes along, by bucket it cannot."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ep_plugin.checkpoint.adapt.optimizer_state import new_groups
from ep_plugin.cli import main
from tests.commands.test_convert import (
    ITERATION,
    E,
    H,
    dense_tensors,
    load_all,
    per_layer,
    save_dense,
)

MOMENTS = ("exp_avg", "exp_avg_sq")
GROUPS = {
    "optimizer": {
        "state": {"common_step": torch.tensor(30.0)},
        "param_groups": [
            {"is_expert_parallel": False, "wd_mult": 1.0, "lr_mult": 1.0, "lr": 0.5},
            {"is_expert_parallel": False, "wd_mult": 0.0, "lr_mult": 1.0, "lr": 0.5},
        ],
    },
    "grad_scaler": {"scale": 4.0},
}


def parameters() -> dict[str, Tensor]:
    """The dense tensors without the one lone state."""
    return {name: v for name, v in dense_tensors().items() if not name.startswith("optimizer.")}


def states(master: str) -> dict[str, Tensor]:
    """Two moments and a master copy of every parameter, all different."""
    generator = torch.Generator().manual_seed(8)
    made = {
        f"optimizer.state.{kind}.{name}": torch.rand(values.shape, generator=generator)
        for kind in MOMENTS
        for name, values in parameters().items()
    }
    copies = {f"optimizer.state.{master}.{name}": v for name, v in parameters().items()}
    return made | copies


def save(
    root: Path,
    tensors: dict[str, Tensor],
    groups: Any = GROUPS,
    stacked: bool = True,
    **changes: Any,
) -> None:
    """A dense checkpoint with optimizer state; weights in bf16."""
    weights = {
        name: values if name.startswith("optimizer.") else values.bfloat16()
        for name, values in tensors.items()
    }
    path = save_dense(root, weights, stacked, True, **changes) / "common.pt"
    common = torch.load(path, weights_only=False)
    torch.save({**common, "optimizer": groups}, path)


def unstacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and their states with the layer in the name."""
    found = {}
    for name, values in tensors.items():
        state = re.match(r"optimizer\.state\.\w+\.", name)
        prefix = state[0] if state else ""
        found |= {prefix + k: v for k, v in per_layer({name.removeprefix(prefix): values}).items()}
    return found


def convert(root: Path, *flags: str) -> int:
    paths = ["--from", str(root / "dense"), "--to", str(root / "moe"), "--skip-parity"]
    return main(["convert", *paths, "--num-experts", str(E), "--topk", "2", *flags])


@pytest.mark.parametrize("master", ["param", "fp32_param"])
def test_state_goes_to_every_expert(tmp_path: Path, master: str) -> None:
    """Moments as they are, for each expert; a router's moments zero, its master copy its value."""
    save(tmp_path / "dense", parameters() | states(master))
    assert convert(tmp_path, "--layers", "every:2") == 0
    new, old = load_all(tmp_path / "moe"), unstacked(parameters() | states(master))
    kinds = (*MOMENTS, master)
    seen = 0
    for name, values in new.items():
        if not name.startswith("optimizer."):
            continue
        _, _, kind, parameter = name.split(".", 3)
        assert kind in kinds
        assert values.dtype == torch.float32
        assert values.shape == new[parameter].shape
        seen += 1
        if ".router." in name:
            wanted = torch.zeros(values.shape) if kind in MOMENTS else new[parameter].float()
            assert torch.equal(values, wanted)
        elif ".experts." in name:
            assert torch.equal(values, torch.stack([old[name.replace("experts.experts.", "")]] * E))
        else:
            assert torch.equal(values, old[name])
    assert seen == 3 * sum(not name.startswith("optimizer.") for name in new if "/" not in name)
    folder = tmp_path / "moe" / f"iter_{ITERATION:07d}"
    common = torch.load(folder / "common.pt", weights_only=False)
    assert common["args"].no_save_optim is False
    assert common["opt_param_scheduler"] == {"max_lr": 1.0}
    assert set(common["optimizer"]) == {0, 1}


def test_groups_of_the_experts() -> None:
    """Marked as expert-parallel; without biases the experts have no group without decay."""
    before = copy.deepcopy(GROUPS)
    for with_bias, decays in ((True, [1.0, 0.0]), (False, [1.0])):
        groups = new_groups(GROUPS, with_bias)
        assert groups[0] == before
        made = groups[1]["optimizer"]["param_groups"]
        assert [group["wd_mult"] for group in made] == decays
        assert all(group["is_expert_parallel"] for group in made)
        assert groups[1]["grad_scaler"] == {"scale": 4.0}
        assert groups[1]["optimizer"]["state"] == {"common_step": torch.tensor(30.0)}


def test_granular_cuts_the_moments_and_scales_only_the_copy(tmp_path: Path) -> None:
    save(tmp_path / "dense", parameters() | states("param"))
    mode = ["--mode", "granular", "--granularity", "2", "--shared-expert", "learned"]
    assert convert(tmp_path, *mode) == 0
    new, old = load_all(tmp_path / "moe"), unstacked(parameters() | states("param"))
    mlp = "decoder.layers.1.mlp."
    for kind, gain in (("exp_avg", 1), ("exp_avg_sq", 1), ("param", 2)):
        prefix = f"optimizer.state.{kind}.{mlp}"
        dense = old[f"{prefix}linear_fc2.weight"]
        experts = new[f"{prefix}experts.experts.linear_fc2.weight"]
        for expert in range(E):
            half = dense.chunk(2, dim=1)[expert % 2]
            assert torch.equal(experts[expert], half * gain)
        assert torch.equal(new[f"{prefix}shared_experts.linear_fc2.weight"], dense)
        assert torch.equal(new[f"{prefix}coefficient.weight"], torch.zeros(2, H))
    weight = new[f"{mlp}experts.experts.linear_fc2.weight"]
    assert torch.equal(
        new[f"optimizer.state.param.{mlp}experts.experts.linear_fc2.weight"].bfloat16(), weight
    )


def test_left_out_when_told(tmp_path: Path) -> None:
    save(tmp_path / "dense", parameters() | states("param"))
    assert convert(tmp_path, "--drop-optimizer") == 0
    assert not any(name.startswith("optimizer.") for name in load_all(tmp_path / "moe"))
    folder = tmp_path / "moe" / f"iter_{ITERATION:07d}"
    common = torch.load(folder / "common.pt", weights_only=False)
    assert common["args"].no_save_optim is True
    assert not {"optimizer", "opt_param_scheduler"} & set(common)


BUCKET = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_x.bucket_idx_0.exp_avg"
INSTEAD = "--dist-ckpt-optim-fully-reshardable .*--drop-optimizer"


@pytest.mark.parametrize(
    ("extra", "groups", "message"),
    [
        ({BUCKET: torch.zeros(9)}, GROUPS, rf"is not kept by parameter \({BUCKET} and 0 more\)"),
        (
            {"chained_0.optimizer.state.exp_avg.output_layer.weight": torch.zeros(9)},
            GROUPS,
            r"is not kept by parameter \(chained_0",
        ),
        (
            {"optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(H - 1)},
            GROUPS,
            r"is not kept by parameter",
        ),
        ({}, {0: GROUPS, 1: GROUPS}, r"but not the groups of one optimizer"),
    ],
    ids=["buckets", "chained", "another shape", "several optimizers"],
)
def test_state_that_cannot_go_along(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    extra: dict[str, Tensor],
    groups: Any,
    message: str,
) -> None:
    """One sentence with both ways out, and nothing written; told to leave it out, it converts."""
    save(tmp_path / "dense", parameters() | states("param") | extra, groups)
    assert convert(tmp_path) == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert re.search(INSTEAD, said)
    assert list(tmp_path.iterdir()) == [tmp_path / "dense"]
    assert convert(tmp_path, "--drop-optimizer") == 0


def test_no_optimizer_is_fine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint saved without one converts, and the summary says so."""
    save_dense(tmp_path / "dense", parameters())
    assert convert(tmp_path) == 0
    assert "the optimizer starts afresh" in capsys.readouterr().out
