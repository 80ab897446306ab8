"""Rows that pad the vocabulary are cut, in every family and format, and the command says so; the
flags that it prints have a vocabulary that every tensor-parallel size divides."""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch

from ep_plugin.checkpoint.adapt.upcycle import EMBEDDING, OUTPUT
from ep_plugin.checkpoint.formats.dist_writer import write_checkpoint
from ep_plugin.checkpoint.formats.megatron_dist import open_checkpoint
from ep_plugin.checkpoint.tensors import NewObject, NewTensor, Region, TensorInfo
from ep_plugin.cli import main
from ep_plugin.megatron.arguments.spell_model import padded_vocabulary

Said = Callable[..., str]
WORDS = hf_models.VOCAB
EXPERTS = ("--num-experts", "4", "--topk", "2")


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str]) -> Said:
    """Convert without a comparison; return what was said, errors where it was refused."""

    def run(source: Path, target: Path, *flags: str, code: int = 0) -> str:
        words = ["--from", str(source), "--to", str(target), *flags, "--skip-parity"]
        assert main(["convert", *words]) == code
        said = capsys.readouterr()
        return said.err if code else said.out

    return run


def pad(source: Path, target: Path, rows: int, size: Any) -> Path:
    """Write a torch_dist checkpoint as a run with so many rows would, which may know the size."""
    old = open_checkpoint(source)
    changed = vars(old.common["args"]) | {"padded_vocab_size": rows, "ep_vocab_size": size}
    args = argparse.Namespace(**changed)
    content: list[NewTensor | NewObject] = []
    for name in old.tensors:
        values = old.read_tensor(name)
        if name in (EMBEDDING, OUTPUT):
            values = torch.cat([values, torch.ones(rows - len(values), *values.shape[1:])])
        region = Region((0,) * values.dim(), values)
        info = TensorInfo(tuple(values.shape), values.dtype)
        content.append(NewTensor(name, info, lambda region=region: iter([region])))  # type: ignore[misc]
    content += [NewObject(name, old.read_object(name)) for name in old.objects]
    write_checkpoint(target, old, {**old.common, "args": args}, content, lambda _: None)
    return target


@pytest.mark.parametrize("case", hf_models.CASES)
def test_an_export_has_the_rows_that_were_imported(
    case: str, tmp_path: Path, convert: Said
) -> None:
    """By what the checkpoint says of itself, or by --vocab-size where it says nothing."""
    source = hf_models.save(case, tmp_path / "hf")
    convert(source, tmp_path / "megatron")
    rows = WORDS + random.Random(case).randint(1, 60)
    for name, size, flag in (("said", WORDS, ()), ("typed", None, ("--vocab-size", str(WORDS)))):
        padded = pad(tmp_path / "megatron", tmp_path / name, rows, size)
        said = convert(padded, tmp_path / f"{name} back", "--format", "hf", *flag)
        assert f"{rows - WORDS} that only padded it are cut" in said
        before, after = (hf_models.tensors(f) for f in (source, tmp_path / f"{name} back"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        config = json.loads((tmp_path / f"{name} back" / "config.json").read_text())
        assert config["vocab_size"] == WORDS


@pytest.mark.parametrize("case", ["llama", "llama-tied"])
def test_every_other_way(case: str, tmp_path: Path, convert: Said) -> None:
    source = hf_models.save(case, tmp_path / "hf")
    convert(source, tmp_path / "megatron")
    padded = pad(tmp_path / "megatron", tmp_path / "padded", WORDS + 32, None)
    # nobody knows: they stay, and that is said
    said = convert(padded, tmp_path / "kept", "--format", "hf")
    assert f"all {WORDS + 32} rows are kept" in said
    # names stay, and so do rows: the size travels to the export
    said = convert(padded, tmp_path / "experts", *EXPERTS, "--vocab-size", str(WORDS))
    assert f"{WORDS} of {WORDS + 32} rows; the others pad it" in said
    assert open_checkpoint(tmp_path / "experts").tensors[EMBEDDING].shape[0] == WORDS + 32
    convert(tmp_path / "experts", tmp_path / "out", "--format", "hf")
    assert hf_models.tensors(tmp_path / "out")["model.embed_tokens.weight"].shape[0] == WORDS
    # from Hugging Face: to Megatron, and to experts
    for name, flags in (("cut", ()), ("cut experts", (*EXPERTS, "--format", "hf"))):
        said = convert(source, tmp_path / name, "--vocab-size", "90", *flags)
        assert f"{WORDS - 90} that only padded it are cut" in said
    cut = open_checkpoint(tmp_path / "cut")
    assert (cut.common["args"].padded_vocab_size, cut.tensors[EMBEDDING].shape[0]) == (90, 90)
    assert hf_models.tensors(tmp_path / "cut experts")["model.embed_tokens.weight"].shape[0] == 90
    said = json.loads(
        convert(padded, tmp_path / "j", "--format", "hf", "--vocab-size", "90", "--json")
    )
    assert (said["vocab_size"], said["cut_rows"]) == (90, WORDS + 32 - 90)


@pytest.mark.parametrize("size", [0, -3, WORDS + 1])
def test_a_size_that_cannot_be(size: int, tmp_path: Path, convert: Said) -> None:
    source = hf_models.save("llama", tmp_path / "hf")
    said = convert(source, tmp_path / "out", "--vocab-size", str(size), code=2)
    assert f"--vocab-size {WORDS}" in said or "at least 1" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [0.5, "x", -1, [96], 10**9])
def test_run_arguments_that_say_nonsense(size: Any, tmp_path: Path, convert: Said) -> None:
    source = hf_models.save("llama", tmp_path / "hf")
    convert(source, tmp_path / "megatron")
    padded = pad(tmp_path / "megatron", tmp_path / "padded", WORDS + 1, size)
    said = convert(padded, tmp_path / "out", "--format", "hf", code=2)
    if type(size) is int and size > 0:
        assert f"use --vocab-size {WORDS + 1}" in said
        convert(padded, tmp_path / "out", "--format", "hf", "--vocab-size", "90")
    else:
        assert "ep_vocab_size = " in said
        assert "where a whole number of at most" in said


def test_padding_is_the_least_that_every_size_divides() -> None:
    """For models drawn at random: sizes that heads, their groups and dense channels allow."""
    draw = random.Random(3)
    for _ in range(200):
        groups, per_group = draw.randint(1, 12), draw.randint(1, 8)
        heads, channels = groups * per_group, draw.choice((64, 96, 120, 18944))
        args = argparse.Namespace(
            num_layers=2,
            num_attention_heads=heads,
            group_query_attention=True,
            num_query_groups=groups,
            ffn_hidden_size=channels,
            padded_vocab_size=draw.randint(1, 5000),
        )
        fits = [
            tp
            for tp in range(1, heads + 1)
            if heads % tp == 0 and channels % tp == 0 and (groups % tp == 0 or tp % groups == 0)
        ]
        rows = padded_vocabulary(args)
        assert all(rows % tp == 0 for tp in fits)
        between = range(args.padded_vocab_size, rows)
        assert not any(all(n % tp == 0 for tp in fits) for n in between)
