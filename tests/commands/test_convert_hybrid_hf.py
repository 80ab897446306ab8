"""Hugging Face straight to and from a HybridModel: the bits of the way through a GPT."""

import json
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch

from ep_plugin.checkpoint.formats.megatron_dist import open_checkpoint
from ep_plugin.cli import main

PATTERNS = {  # case -> what its layers are
    "llama-tied": "*-*-",
    "qwen2": "*-*-",
    "mistral": "*-*-",
    "mixtral": "*E*E",
    "qwen2_moe": "*-*E",
}
REFUSED = {
    "llama": "use_rope_scaling = True",
    "qwen3_moe": "qk_layernorm = True",
    "deepseek_v3": "qk_layernorm = True",
}
EXPERTS = ("--num-experts", "4", "--topk", "2", "--seed", "3")


def convert(source: Path, target: Path, *flags: str) -> int:
    return main(["convert", "--from", str(source), "--to", str(target), *flags])


def held(folder: Path) -> tuple[dict[str, bytes], dict[str, Any], set[str]]:
    """Return what a Megatron checkpoint holds: bits, run arguments, objects."""
    source = open_checkpoint(folder)
    values = {n: source.read_tensor(n).contiguous() for n in source.tensors}
    bits = {n: bytes(v.view(torch.uint8).flatten().tolist()) for n, v in values.items()}
    args = vars(source.common["args"])
    return bits, {n: v for n, v in args.items() if not n.startswith("no_save")}, {*source.objects}


def hf(folder: Path) -> tuple[dict[str, torch.Tensor], Any]:
    return hf_models.tensors(folder), json.loads((folder / "config.json").read_text())


def same(one: Path, other: Path) -> None:
    (values, config), (others, other_config) = hf(one), hf(other)
    assert config == other_config
    assert values.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in values.items())


@pytest.mark.parametrize("case", PATTERNS)
def test_it_is_the_way_through_a_gpt(tmp_path: Path, case: str) -> None:
    pattern, off = PATTERNS[case], "--skip-parity"
    source = hf_models.save(case, tmp_path / "hf")
    experts = EXPERTS if "E" not in pattern else ()
    ways: dict[str, tuple[str, ...]] = {"as it is": (), **({"with": experts} if experts else {})}
    for name, more in ways.items():
        gpt, through, direct = (tmp_path / f"{name}-{to}" for to in ("gpt", "through", "direct"))
        assert convert(source, gpt, off, *more) == 0
        assert convert(gpt, through, "--model-class", "hybrid", off) == 0
        cut = pattern.replace("-", "E") if more else pattern
        cut = f"{cut[:2]}|{cut[2:]}"
        assert convert(source, direct, "--hybrid-layer-pattern", cut, off, *more) == 0
        expected, found = held(through), held(direct)
        assert found[1].pop("hybrid_layer_pattern") == cut
        assert expected[1].pop("hybrid_layer_pattern") == cut.replace("|", "")
        assert found == expected
        if more and case == "qwen2":
            continue  # no family has its experts
        family = () if more else ("--family", hf(source)[1]["model_type"])
        for begin, back in ((gpt, "a"), (direct, "b")):
            into = tmp_path / f"{name}-{back}"
            assert convert(begin, into, "--format", "hf", *family, off) == 0
        same(tmp_path / f"{name}-a", tmp_path / f"{name}-b")
        if not more:
            values, back = hf(source)[0], hf(tmp_path / f"{name}-b")[0]
            assert values.keys() == back.keys()
            assert all(torch.equal(value, back[name]) for name, value in values.items())


@pytest.mark.megatron
def test_the_models_compute_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dense model gets experts on its way to a HybridModel, which goes back; both are run."""
    source = hf_models.save("llama-tied", tmp_path / "hf")
    hybrid = tmp_path / "hybrid"
    assert convert(source, hybrid, "--model-class", "hybrid", *EXPERTS, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["hybrid_layer_pattern"], said["num_layers"]) == ("*E*E", 2)
    assert said["parity"]["passed"]
    flags = said["megatron_flags"]
    assert flags[flags.index("--hybrid-layer-pattern") + 1] == "*E*E"
    assert not {"--num-layers", "--moe-layer-freq"} & {*flags}
    assert convert(hybrid, tmp_path / "back", "--format", "hf", "--json") == 0
    assert json.loads(capsys.readouterr().out)["parity"]["passed"]


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_hybrid_cannot_have_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    source = hf_models.save(case, tmp_path / "hf")
    assert convert(source, tmp_path / "out", "--model-class", "hybrid", "--skip-parity") == 2
    assert f"was trained with {REFUSED[case]}: the other class has no" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_flags_that_contradict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = hf_models.save("mixtral", tmp_path / "hf")
    for flags, said in (
        ("--model-class gpt", "this source is a GPT; leave --model-class out"),
        ("--hybrid-layer-pattern *-*E", "has other attention or blocks than"),
        ("--hybrid-layer-pattern *E", "has 1 pairs of layers"),
        ("--model-class hybrid --format hf", "a Hugging Face model has no such class"),
    ):
        assert convert(source, tmp_path / "out", *flags.split(), "--skip-parity") == 2, flags
        assert said in capsys.readouterr().err.replace("\n", " "), flags
