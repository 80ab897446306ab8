"""`ep-plugin audit`: each fault that is planted in a checkpoint is found, and nothing else."""

import json
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import (
    FC1,
    FC2,
    ITERATION,
    NORM,
    ROUTER,
    SHAPES,
    STATES,
    Content,
    E,
    F,
    H,
    L,
    healthy,
    write,
)

from ep_plugin.checkpoint.formats.megatron_dist import open_stored
from ep_plugin.checkpoint.tensors import Region, Stored
from ep_plugin.cli import main


def audit(root: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = main(["audit", str(root), "--json"])
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, report


def found(report: dict[str, Any], level: str = "error") -> list[tuple[str, str, str]]:
    return [
        (f["check"], f["where"], f["message"]) for f in report["findings"] if f["level"] == level
    ]


def without(key: str, layer: int, expert: int) -> Callable[[Content], None]:
    def spoil(content: Content) -> None:
        content.regions[key] = [r for r in content.regions[key] if r.offsets[:2] != (layer, expert)]

    return spoil


def twice(content: Content) -> None:
    content.regions[FC2].append(content.regions[FC2][5])


def same_experts(content: Content) -> None:
    for state in STATES[:2]:
        regions = content.regions[state + FC1]
        regions[E + 3] = Region(regions[E + 3].offsets, regions[E].values)


def other_dtype(content: Content) -> None:
    regions = content.regions[FC2]
    regions[2] = Region(regions[2].offsets, regions[2].values.bfloat16())


def per_layer(content: Content) -> None:
    """Give layers names of their own."""
    for key in [key for key in content.regions if "decoder.layers." in key]:
        parts = [region.values[0, 0] for region in content.regions[key]]
        whole = torch.stack(parts).view(content.shapes[key])
        content.drop(key)
        for layer in range(L):
            content.add(key.replace("layers.", f"layers.{layer}."), whole[layer], 1)


def layer_in_other_dtype(content: Content) -> None:
    per_layer(content)
    whole = torch.cat([region.values for region in content.regions[LAYER1]])
    content.add(LAYER1, whole.half(), 1)


def layer_of_other_shape(content: Content) -> None:
    per_layer(content)
    content.add(LAYER1, torch.randn(E, H, F - 1), 1)


def nan(content: Content) -> None:
    values = content.regions[STATES[2] + FC1][E + 1].values.clone()
    values[0, 0, 3, :2] = torch.tensor([torch.nan, -torch.inf])
    content.regions[STATES[2] + FC1][E + 1] = Region((1, 1, 0, 0), values)


def no_moments(content: Content) -> None:
    content.drop(STATES[3] + ROUTER)


def one_key_per_expert(content: Content) -> None:
    """Megatron's `singleton_local_shards`; expert 2 of layer 0 is not there."""
    for key in [key for key in content.regions if ".experts." in key]:
        whole = torch.stack([r.values[0, 0] for r in content.regions[key]]).view(
            content.shapes[key]
        )
        content.drop(key)
        for layer in range(L):
            for expert in range(E):
                name = key.replace("layers.", f"layers.{layer}.")
                name = name.replace("experts.linear", f"experts.{expert}.linear")
                if (layer, expert) != (0, 2):
                    content.add(name, whole[layer, expert])


def outside(content: Content) -> None:
    region = content.regions[NORM][0]
    content.regions[NORM][0] = Region((2,), region.values)


LAYER1_FC1 = FC1.replace("layers.", "layers.1.")
LAYER1 = FC2.replace("layers.", "layers.1.")
OTHERS = f"where other experts' is [{H}, {F}]"
SAME = "linear_fc1.weight of experts 0, 3 is the same"
FEWER = [f"linear_fc{number}.weight of expert 4 is missing; there must be 5" for number in (1, 2)]
BLOCK = "decoder.layers.{}.mlp"
FAULTS: dict[str, tuple[Callable[[Content], None], list[tuple[str, str, str]]]] = {
    "a missing expert": (
        without(FC2, 1, 3),
        [("coverage", f"{LAYER1}, expert 3", f"{H * F} elements are in no file")],
    ),
    "a chunk that is there twice": (
        twice,
        [("coverage", f"{LAYER1}, expert 1", f"{H * F} elements are there twice")],
    ),
    "two equal experts after training": (
        same_experts,
        [("experts", BLOCK.format(1), f"{SAME}, and training has moved them")],
    ),
    "a part of another dtype": (
        other_dtype,
        [("dtype", FC2, "a part of it is torch.bfloat16, where .metadata says torch.float32")],
    ),
    "a layer of another dtype": (
        layer_in_other_dtype,
        [("dtype", LAYER1, "is float16, where the same of others is float32")],
    ),
    "a layer of another shape": (
        layer_of_other_shape,
        [
            ("shape", BLOCK.format(1), f"linear_fc2.weight has shape [{H}, {F - 1}], {OTHERS}"),
            *(
                ("shape", LAYER1, f"its {state} has shape [{E}, {H}, {F}], not [{E}, {H}, {F - 1}]")
                for state in ("param", "exp_avg", "exp_avg_sq")
            ),
        ],
    ),
    "nan and inf in a moment": (
        nan,
        [("values", f"{STATES[2]}{LAYER1_FC1}, expert 1", "2 values are nan or inf")],
    ),
    "missing moments": (
        no_moments,
        [("optimizer", ROUTER, "the optimizer lacks its exp_avg_sq")],
    ),
    "missing settings of the optimizer": (
        lambda content: content.common.pop("optimizer"),
        [
            (
                "optimizer",
                "",
                "its settings are missing (param_groups, with the step), and its states are there",
            )
        ],
    ),
    "a missing expert, one key for each": (
        one_key_per_expert,
        [
            ("experts", BLOCK.format(0), f"{name} of expert 2 is missing; there must be 4")
            for name in ("linear_fc1.weight", "linear_fc2.weight")
        ],
    ),
    "no MoE layer where one must be": (
        lambda content: setattr(content.common["args"], "num_layers", 3),
        [
            ("experts", BLOCK.format(2), "all 4 experts are missing"),
            ("experts", BLOCK.format(2), "router.weight is missing"),
        ],
    ),
    "fewer experts than the run had": (
        lambda content: setattr(content.common["args"], "num_experts", 5),
        [
            ("experts", BLOCK.format(layer), text)
            for layer in range(L)
            for text in [*FEWER, "router.weight is for 4 experts, and there must be 5"]
        ],
    ),
    "a chunk outside": (
        outside,
        [
            ("coverage", NORM, f"{H} elements lie outside its shape [{H}]"),
            ("coverage", NORM, f"{H} elements are in no file"),
        ],
    ),
}  # fmt: skip


def test_a_healthy_checkpoint_is_fine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = audit(write(healthy(), tmp_path), capsys)
    assert (code, report["passed"], report["findings"]) == (0, True, [])
    assert report["optimizer"] == "by parameter"
    assert [
        (layer["block"], layer["experts"], layer["distinct"], layer["moments"])
        for layer in report["layers"]
    ] == [(BLOCK.format(layer), E, E, "exp_avg exp_avg_sq") for layer in range(L)]
    assert main(["audit", str(tmp_path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    row = f"{BLOCK.format(0)} 4 of 4 4 float32 12x8, 8x6 exp_avg exp_avg_sq"
    assert " ".join(shown[1].split()) == row
    assert shown[-1].endswith("optimizer by parameter: fine")


def test_a_state_of_the_engine_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What convert refuses to copy, audit names; an own run with FP8 does not fail for it."""
    held = {
        "decoder.layers.0.a._extra_state/shard_0_1": [torch.ones(9, dtype=torch.int8)],
        "decoder.layers.0.b._extra_state/shard_0_1": [None],
        "decoder.layers.0.c._extra_state/shard_0_1": [torch.ones(9, dtype=torch.uint8)],
    }

    def open_with_states(path: Path) -> Stored:
        stored = open_stored(path)
        return replace(stored, objects=frozenset(held), read_object=held.__getitem__)

    monkeypatch.setattr("ep_plugin.commands.audit.open_stored", open_with_states, raising=False)
    monkeypatch.setattr("ep_plugin.checkpoint.audit.open_stored", open_with_states)
    code, report = audit(write(healthy(), tmp_path), capsys)
    assert (code, found(report)) == (0, [])
    ((_, where, text),) = found(report, "warning")
    assert where == next(iter(held))
    assert text.startswith("and 1 more are states that only Transformer Engine reads, a pickle")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, expected = FAULTS[fault]
    content = healthy()
    spoil(content)
    code, report = audit(write(content, tmp_path), capsys)
    assert code == 1
    assert sorted(found(report)) == sorted(expected)


@pytest.mark.parametrize("start", ["no optimizer", "no step yet", "no token reached them"])
def test_equal_experts_of_a_start_are_a_warning(
    start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = healthy()
    same_experts(content)
    if start == "no optimizer":
        for key in [key for key in content.regions if key.startswith("optimizer")]:
            content.drop(key)
        del content.common["optimizer"]
    elif start == "no step yet":
        content.common["iteration"] = 1
    else:
        for state in STATES[2:]:
            for at in (E, E + 3):
                region = content.regions[state + FC1][at]
                content.regions[state + FC1][at] = Region(region.offsets, region.values * 0)
    code, report = audit(write(content, tmp_path), capsys)
    assert (code, found(report)) == (0, [])
    text = f"{SAME}; that is how an upcycled model starts"
    assert found(report, "warning") == [("experts", BLOCK.format(1), text)]


def as_converted(content: Content, granularity: int) -> None:
    """Experts and their moments as `convert` makes them of a dense run's."""
    for key in (state + fc for state in STATES for fc in (FC1, FC2)):
        regions = content.regions[key]
        for at, region in enumerate(regions):
            first = at - at % E + at % E % granularity
            regions[at] = Region(region.offsets, regions[first].values)
    args = content.common["args"]
    args.ffn_hidden_size, args.moe_ffn_hidden_size = granularity * F, F


@pytest.mark.parametrize("granularity", [1, 2])
def test_a_conversion_with_its_moments_has_not_been_trained(
    granularity: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = healthy()
    as_converted(content, granularity)
    code, report = audit(write(content, tmp_path), capsys)
    assert (code, found(report)) == (0, [])
    assert len(found(report, "warning")) == L * 2 * granularity  # of each weight, each shard


@pytest.mark.parametrize("granularity", [1, 2])
def test_one_moment_that_differs_is_a_step_of_training(
    granularity: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = healthy()
    as_converted(content, granularity)
    region = content.regions[STATES[2] + FC1][E + 3]  # of layer 1
    content.regions[STATES[2] + FC1][E + 3] = Region(region.offsets, region.values * 1.5)
    code, report = audit(write(content, tmp_path), capsys)
    assert code == 1
    assert {(check, where) for check, where, _ in found(report)} == {("experts", BLOCK.format(1))}
    assert len(found(report)) == granularity
    assert all("training has moved them" in message for _, _, message in found(report))


def test_two_ranks_that_saved_the_same_experts_are_no_conversion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = healthy()
    as_converted(content, 2)
    content.common["args"].ffn_hidden_size = F  # no dense FFN was cut
    code, report = audit(write(content, tmp_path), capsys)
    assert code == 1
    assert len(found(report)) == L * 2 * 2


def test_buckets_must_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """State by buckets of a layout: of its padding nothing is asked, of its sizes all there is."""
    content = healthy()
    for key in [key for key in content.regions if key.startswith("optimizer")]:
        content.drop(key)
    size = sum(map(prod, SHAPES.values()))
    bucket = "chained_0.optimizer.distributed.dp_group_idx_0.gbuf_idx_0.bucket_idx_0"
    for state in ("param", "exp_avg", "exp_avg_sq"):
        content.add(f"{bucket}.{state}", torch.full((size,), torch.nan))
    code, report = audit(write(content, tmp_path / "whole"), capsys)
    assert (code, report["optimizer"], found(report)) == (0, "dp_reshardable", [])
    content.drop(f"{bucket}.exp_avg")
    content.add(f"{bucket}.param", torch.zeros(size - 1))
    code, report = audit(write(content, tmp_path / "cut"), capsys)
    assert code == 1
    sizes = {"exp_avg_sq": size, "param": size - 1}
    assert sorted(found(report)) == [
        ("optimizer", "", f"buckets hold {size - 1} master values, and the model has {size}"),
        ("optimizer", bucket, "lacks exp_avg"),
        ("shape", bucket, f"states differ in size: {sizes}"),
    ]


def test_files_that_are_gone_or_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(healthy(), tmp_path) / f"iter_{ITERATION:07d}"
    (data,) = folder.glob("*.distcp")
    whole = data.read_bytes()
    first = whole[: whole.index(b"PK", 4096)]
    data.write_bytes(whole[: len(first)])
    code, report = audit(tmp_path, capsys)
    assert code == 1
    assert {check for check, _, _ in found(report)} == {"files"}
    (folder / ".metadata").unlink()
    code, report = audit(tmp_path, capsys)
    ((check, _, message),) = found(report)
    assert (code, check) == (1, "files")
    assert "has no .metadata: its save did not finish" in message
