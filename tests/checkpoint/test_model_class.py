"""A GPT as a HybridModel and back: names by symbol, bits as they were, and what is refused.

That both train alike, moments along, is in `test_model_class_trains.py`.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ep_plugin.checkpoint.adapt import model_class
from ep_plugin.checkpoint.formats.megatron_dist import open_checkpoint
from ep_plugin.checkpoint.layer_pairs import Pairs, natural, parse
from ep_plugin.cli import main
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.flags_file import check
from tests.checkpoint.test_keep_layers import COUNTS, MOE, flag, pyramid
from tests.commands.test_convert import ITERATION, H, save_dense

PATTERN = "*-*E*E*E"  # of the pyramid
NORMS = ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
GROUPS = {"optimizer": {"param_groups": [{"step": 7}]}, "param_state_sharding_type": "x"}


def gpt(folder: Path, impl: str = "transformer_engine", **changes: Any) -> Path:
    """Save a GPT with 0, 2, 3 and 4 experts in its layers, as an implementation names its norms."""
    tensors = pyramid()
    for layer, experts in enumerate((0, *COUNTS)):
        norm = NORMS[bool(experts) and impl != "local"]
        tensors[f"decoder.layers.{layer}.{norm}"] = torch.full((H,), 1.0 + layer)
    save_dense(folder, tensors, **{**MOE, "transformer_impl": impl, **changes})
    return folder


def convert(source: Path, target: Path, *flags: str) -> int:
    return main(["convert", "--from", str(source), "--to", str(target), *flags])


def bits(folder: Path) -> dict[str, bytes]:
    source = open_checkpoint(folder)
    read = {n: source.read_tensor(n).contiguous() for n in source.tensors}
    return {name: bytes(value.view(torch.uint8).flatten().tolist()) for name, value in read.items()}


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_there_and_back_are_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], impl: str
) -> None:
    source = gpt(tmp_path / "gpt", impl)
    assert convert(source, tmp_path / "hybrid", "--model-class", "hybrid", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    before, hybrid = bits(source), bits(tmp_path / "hybrid")
    for layer, experts in enumerate((0, *COUNTS)):
        old, block = f"decoder.layers.{layer}.", f"decoder.layers.{2 * layer + 1}."
        attention = f"decoder.layers.{2 * layer}.self_attention.linear_qkv.weight"
        assert hybrid[attention] == before[old + "self_attention.linear_qkv.weight"]
        state = "optimizer.state.exp_avg."
        assert hybrid[state + attention] == before[f"{state}{old}self_attention.linear_qkv.weight"]
        fc1 = f"mlp.{'experts.experts.' if experts else ''}linear_fc1.weight"
        assert hybrid[block + fc1] == before[old + fc1]
        theirs = old + NORMS[bool(experts) and impl != "local"]
        assert hybrid[block + NORMS[bool(experts)]] == before[theirs]
    assert hybrid["decoder.final_norm.weight"] == before["decoder.final_layernorm.weight"]
    assert len(hybrid) == len(before)
    written = open_checkpoint(tmp_path / "hybrid")
    args = written.common["args"]
    assert (args.num_layers, args.moe_layer_freq) == (8, 1)
    assert (args.hybrid_layer_pattern, args.ep_experts_per_layer) == (PATTERN, COUNTS)
    assert written.common["iteration"] == ITERATION
    assert "output_layer._extra_state/shard_0_1" in written.objects

    flags = said["megatron_flags"]
    assert flag(flags, "--hybrid-layer-pattern") == said["hybrid_layer_pattern"] == PATTERN
    assert not {"--num-layers", "--moe-layer-freq", "--finetune"} & set(flags)
    words = (tmp_path / "hybrid" / "flags.txt").read_text().splitlines()
    assert flag(words, "--hybrid-layer-pattern") == PATTERN

    assert convert(tmp_path / "hybrid", tmp_path / "back", "--model-class", "gpt") == 0
    assert bits(tmp_path / "back") == before
    again = open_checkpoint(tmp_path / "back")
    assert "output_layer._extra_state/shard_0_1" not in again.objects
    assert again.common["args"].moe_layer_freq == MOE["moe_layer_freq"]
    assert (again.common["args"].num_layers, again.common["args"].hybrid_layer_pattern) == (4, None)
    assert main(["convert", "--check", "--to", str(tmp_path / "back")]) == 0


def test_without_the_optimizer_the_run_starts_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = gpt(tmp_path / "gpt")
    more = ("--hybrid-layer-pattern", "*-|*E*E|*E", "--drop-optimizer", "--json")
    assert convert(source, tmp_path / "hybrid", *more) == 0
    said = json.loads(capsys.readouterr().out)
    assert "--finetune" in said["megatron_flags"]
    assert said["dropped_entries"] == 5  # four moments, and random-number state
    assert not [name for name in bits(tmp_path / "hybrid") if name.startswith("optimizer.")]
    args = open_checkpoint(tmp_path / "hybrid").common["args"]
    assert (args.no_save_optim, args.num_layers) == (True, 8)


def test_a_bit_that_differs_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name that is spelled as another's: what is read back is not what belongs there."""
    source = gpt(tmp_path / "gpt")
    whole = model_class.content

    def swapped(made: Any) -> Any:
        entries = list(whole(made))
        first, second = (
            next(n for n, entry in enumerate(entries) if entry.name == f"decoder.layers.{k}.{name}")
            for k, name in ((1, NORMS[0]), (3, NORMS[1]))
        )
        object.__setattr__(entries[first], "regions", entries[second].regions)
        return tuple(entries)

    monkeypatch.setattr(model_class, "content", swapped)
    assert convert(source, tmp_path / "hybrid", "--model-class", "hybrid") == 1
    assert f"decoder.layers.1.{NORMS[0]} and 0 more tensors are not" in capsys.readouterr().err
    assert not (tmp_path / "hybrid").exists()


REFUSED = {  # what is typed -> what is said
    "*-*E*E": "has 3 pairs of layers, and",
    "*E*E*E*E": f"use --hybrid-layer-pattern '{PATTERN}'",
    "+-+E+E+E": "has other attention or blocks than",
    "*-*E*E*E/*-": "has multi-token prediction behind its /",
    "M*-*E*E*E": "has 'M' as layer 1, a Mamba layer",
    "*-*E*EG*E": "has 'G' as layer 7, a gated delta net",
    "D-*E*E*E": "has 'D' as layer 1, DeepSeek's sparse attention",
    "*-*E*EX": "has 'X' as layer 7, which is no symbol",
    "-*E*E*E*": "has -* where layer 0 of a GPT is",
    "**-E*E*E": "has ** where layer 0 of a GPT is",
    "*-*E*E*": "has * where layer 3 of a GPT is",
    "*-+E*E*E": "has both * and +",
    "": "has no layers",
    "|": "has no layers",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_patterns_without_a_counterpart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], typed: str
) -> None:
    source = gpt(tmp_path / "gpt")
    assert convert(source, tmp_path / "out", f"--hybrid-layer-pattern={typed}") == 2
    said = capsys.readouterr().err
    assert REFUSED[typed] in said
    assert f"use --hybrid-layer-pattern '{PATTERN}'" in said
    assert not (tmp_path / "out").exists()


SETTINGS = {
    "mtp_num_layers": 1,
    "spec": ["my_package.my_layers", "spec"],
    "no_rope_freq": [0, 1, 0, 1],
    "experimental_attention_variant": "gated_delta_net",
    "qk_layernorm": True,
    "use_rope_scaling": True,
    "use_mup": True,
    "position_embedding_type": "yarn",
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_without_a_counterpart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    source = gpt(tmp_path / "gpt", **{name: SETTINGS[name]})
    assert convert(source, tmp_path / "out", "--model-class", "hybrid") == 2
    assert f"which was trained with {name} = " in capsys.readouterr().err


HYBRIDS = {  # a pattern of a checkpoint -> what is said
    "M*-*E*E*": "has 'M' as layer 1",
    "*-*E*E*E/*-": "has multi-token prediction",
    "*-*E*E": "has a pattern of 6 layers, and num_layers = 8",
    "*-*-*-*-": "which contradicts its pattern",
    "**--*E*E": "has ** where layer 0",
}


@pytest.mark.parametrize("pattern", HYBRIDS)
def test_hybrid_models_without_a_counterpart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pattern: str
) -> None:
    tensors = {f"decoder.layers.{n}.mlp.router.weight": torch.ones(2, H) for n in range(8)}
    tensors |= {name: whole for name, whole in pyramid().items() if ".layers." not in name}
    changes = {"num_layers": 8, "moe_layer_freq": 1, "ep_experts_per_layer": None}
    made = {**MOE, **changes, "hybrid_layer_pattern": pattern}
    save_dense(tmp_path / "hybrid", tensors, **made)
    assert convert(tmp_path / "hybrid", tmp_path / "out", "--model-class", "gpt") == 2
    assert HYBRIDS[pattern] in capsys.readouterr().err


def test_a_tensor_that_no_other_class_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors: dict[str, Tensor] = pyramid()
    for layer in {name.split(".")[2] for name in tensors if name.startswith("decoder.layers.")}:
        tensors[f"decoder.layers.{layer}.cross_attention.linear_q.weight"] = torch.ones(H, H)
    save_dense(tmp_path / "gpt", tensors, **MOE)
    assert convert(tmp_path / "gpt", tmp_path / "out", "--model-class", "hybrid") == 2
    said = capsys.readouterr().err
    assert "cross_attention.linear_q.weight' in " in said
    assert "has no counterpart in a model of the other class" in said


def test_what_is_of_that_class_already_and_two_conversions_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = gpt(tmp_path / "gpt")
    hybrid = tmp_path / "hybrid"
    assert convert(source, hybrid, "--model-class", "hybrid") == 0
    for flags, said in (
        ("--model-class gpt", f"{source}/iter_{ITERATION:07d} holds a GPT already"),
        ("--model-class gpt --hybrid-layer-pattern *-*E*E*E", "--model-class is gpt"),
        ("--model-class hybrid --keep-layers 1", "are two conversions"),
        ("--model-class hybrid --num-experts 4 --topk 2", "is a Mixture-of-Experts already"),
        ("--model-class hybrid --ep 2", "--ep is about an optimizer that gets experts"),
        ("--model-class hybrid --format hf", "a Hugging Face model has no such class"),
        ("--model-class hybrid --seed 3", "this makes none"),
        ("--model-class hybrid --parity-tolerance 1", "the bits of the kept layers are compared"),
    ):
        assert convert(source, tmp_path / "out", *flags.split()) == 2, flags
        assert said in capsys.readouterr().err.replace("\n", " "), flags
    assert convert(hybrid, tmp_path / "out", "--model-class", "hybrid") == 2
    assert f"holds a HybridModel already ({PATTERN!r}); use --model-class gpt" in (
        capsys.readouterr().err
    )
    for flags in ("--keep-layers 1",):
        assert convert(hybrid, tmp_path / "out", *flags.split()) == 2, flags
        assert f"--to {hybrid}-gpt --model-class gpt" in capsys.readouterr().err


layers = st.builds(
    lambda latent, is_moe: Pairs(latent, tuple(is_moe)),
    st.booleans(),
    st.lists(st.booleans(), min_size=1, max_size=8),
)


@given(layers, st.lists(st.integers(0, 16), max_size=5))
@settings(max_examples=200, deadline=None)
def test_a_pattern_says_its_layers_wherever_it_is_cut(pairs: Pairs, cuts: list[int]) -> None:
    text = list(natural(pairs))
    for place in cuts:
        text.insert(min(place, len(text)), "|")
    assert parse("".join(text), "it", "stop") == pairs
    check(["schedule=own", "--hybrid-layer-pattern", "".join(text)], "model", Path("flags.txt"))


@given(st.text("*+-E|MGD/ \n$", max_size=9))
@settings(max_examples=400, deadline=None)
def test_any_text_is_pairs_or_refused(text: str) -> None:
    good = re.fullmatch(r"(\*[-E])+|(\+[-E])+", text.replace("|", ""))
    if good:
        assert natural(parse(text, "it", "stop")) == text.replace("|", "")
    else:
        with pytest.raises(ConfigError):
            parse(text, "it", "stop")
    legal = re.fullmatch(r"([*+][-E])+", text.replace("|", ""))
    line = ["schedule=own", "--hybrid-layer-pattern", text]
    if legal:
        check(line, "model", Path("flags.txt"))
    else:
        with pytest.raises(ConfigError):
            check(line, "model", Path("flags.txt"))


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_experts_and_the_class_come_in_either_order(tmp_path: Path, impl: str) -> None:
    """A dense model of either class gets experts in either: the same bits."""
    save_dense(tmp_path / "gpt", stacked=False, transformer_impl=impl)
    hybrid = ("--model-class", "hybrid")
    assert convert(tmp_path / "gpt", tmp_path / "hybrid", *hybrid, "--drop-optimizer") == 0
    experts = (*("--num-experts", "4", "--topk", "2", "--layers", "[0,1,0,1]"), "--skip-parity")
    more = (*experts, "--drop-optimizer", "--seed", "5")
    for name, source, flags in (
        ("a", "gpt", (*more, *hybrid)),
        ("b", "hybrid", more),
        ("c", "hybrid", (*more, "--model-class", "gpt")),
        ("d", "gpt", more),
        ("e", "hybrid", (*more, "--hybrid-layer-pattern", "*-*E|*-*E")),
    ):
        assert convert(tmp_path / source, tmp_path / name, *flags) == 0, name
    assert convert(tmp_path / "d", tmp_path / "d2", *hybrid) == 0
    as_hybrid = bits(tmp_path / "d2")
    assert bits(tmp_path / "a") == bits(tmp_path / "b") == bits(tmp_path / "e") == as_hybrid
    assert bits(tmp_path / "c") == bits(tmp_path / "d")
    for name, pattern in (("a", "*-*E*-*E"), ("e", "*-*E|*-*E"), ("c", None)):
        written = open_checkpoint(tmp_path / name)
        assert written.common["args"].hybrid_layer_pattern == pattern
        ours = "output_layer._extra_state/shard_0_1" in written.objects
        assert ours is (pattern is not None)
    assert main(["convert", "--check", "--to", str(tmp_path / "b")]) == 0
