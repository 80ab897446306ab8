"""A student of a teacher's layers: every bit is the teacher's, and the flags are the student's."""

import argparse
import io
import json
import shlex
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ep_plugin.checkpoint.adapt.keep_layers import keep_layers, parse_kept
from ep_plugin.checkpoint.formats._iteration import load_common
from ep_plugin.checkpoint.formats.megatron_dist import open_checkpoint
from ep_plugin.checkpoint.open import open_source
from ep_plugin.cli import main
from ep_plugin.errors import ConfigError
from tests.checkpoint import test_convert_legacy
from tests.commands.test_convert import F, H, L, V, dense_tensors, load_all, save_dense

COUNTS = (2, 3, 4)  # experts of the layers 1, 2 and 3; layer 0 is dense
MOE: dict[str, Any] = {
    "num_experts": 4,
    "moe_layer_freq": [0, 1, 1, 1],
    "ep_experts_per_layer": COUNTS,
    "moe_router_topk": 1,
    "swiglu": True,
    "add_bias_linear": False,
    "padded_vocab_size": V,
    "seq_length": 8,
    "max_position_embeddings": 8,
}
# What a model cannot have, with a value that it could.
BY_NUMBER: dict[str, Any] = {
    "mtp_num_layers": 1,
    "no_rope_freq": [0, 1, 0, 1],
    "linear_attention_freq": torch.ones(2),
}


def pyramid() -> dict[str, Tensor]:
    """A model whose layers have 0, 2, 3 and 4 experts, under Megatron's own names."""
    generator = torch.Generator().manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (V, H),
        "decoder.final_layernorm.weight": (H,),
    }
    for layer, experts in enumerate((0, *COUNTS)):
        below = f"decoder.layers.{layer}."
        shapes[below + "self_attention.linear_qkv.weight"] = (3 * H, H)
        shapes[below + "self_attention.linear_proj.weight"] = (H, H)
        mlp = below + ("mlp.experts.experts." if experts else "mlp.")
        lead = (experts,) if experts else ()
        shapes[mlp + "linear_fc1.weight"] = (*lead, 2 * F, H)
        shapes[mlp + "linear_fc2.weight"] = (*lead, H, F)
        if experts:
            shapes[below + "mlp.router.weight"] = (experts, H)
        shapes[f"optimizer.state.exp_avg.{below}self_attention.linear_qkv.weight"] = (3 * H, H)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    return save_dense(folder, pyramid(), **MOE).parent


def convert(source: Path, target: Path, layers: str, *extra: str) -> int:
    return main(
        ["convert", "--from", str(source), "--to", str(target), "--keep-layers", layers, *extra]
    )


def flag(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


@pytest.mark.parametrize(
    ("layers", "kept"), [("0-1,3", (0, 1, 3)), ("3", (3,)), ("2,0", (2, 0)), ("1 , 2-3", (1, 2, 3))]
)
def test_every_bit_is_the_teacher_s(
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    layers: str,
    kept: tuple[int, ...],
) -> None:
    target = tmp_path / "student"
    assert convert(teacher, target, layers, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    found, expected = load_all(target), pyramid()
    names = {name for name in found if isinstance(found[name], Tensor)}
    for name in names:
        _, dot, rest = name.partition("decoder.layers.")
        number, _, below = rest.partition(".")
        old = f"decoder.layers.{kept[int(number)]}.{below}" if dot else name
        assert torch.equal(found[name], expected[old]), name
        del expected[old]
    left = {name.split(".")[2] for name in expected if name.startswith("decoder.layers.")}
    assert not {str(layer) for layer in kept} & left
    assert [
        name for name in expected if not name.startswith(("decoder.layers.", "optimizer."))
    ] == []

    flags = said["megatron_flags"]
    experts = [(0, *COUNTS)[layer] for layer in kept]
    assert flag(flags, "--num-layers") == str(len(kept))
    assert flag(flags, "--moe-layer-freq") == str([int(n > 0) for n in experts]).replace(" ", "")
    assert flag(flags, "--ep-experts-per-layer") == ",".join(str(n) for n in experts if n)
    assert flag(flags, "--num-experts") == str(max(experts))
    assert (said["kept_layers"], "--finetune" in flags) == (list(kept), True)
    assert said["parity"] | {"kept_layers": list(kept), "differ": []} == said["parity"]
    assert said["parity"]["tensors"] == len(names)
    assert said["parity"]["passed"]
    words = (target / "flags.txt").read_text().split("\n")
    assert flag(words, "--ep-experts-per-layer") == flag(flags, "--ep-experts-per-layer")
    assert main(["convert", "--check", "--to", str(target)]) == 0
    assert open_checkpoint(target).common["args"].num_layers == len(kept)


def test_objects_of_layers_move_with_them(tmp_path: Path) -> None:
    """A dense model, stacked, with an extra state in each layer; the ended run's state is gone."""
    save_dense(tmp_path / "dense", encoder_num_layers=L)
    assert convert(tmp_path / "dense", tmp_path / "student", "3,1") == 0
    found = load_all(tmp_path / "student")
    key = "decoder.layers.{}.mlp.linear_fc1._extra_state/shard_0_1"
    for new, old in enumerate((3, 1)):
        stored = open_checkpoint(tmp_path / "student").read_object(key.format(new))
        assert torch.load(io.BytesIO(stored), weights_only=False) == [None] * (2 + 3 * old)
        name = "mlp.linear_fc2.weight"
        expected = dense_tensors()[f"decoder.layers.{name}"][old]
        assert torch.equal(found[f"decoder.layers.{new}.{name}"], expected)
    assert not [name for name in found if name.startswith(("rng_state", "optimizer"))]
    args = open_checkpoint(tmp_path / "student").common["args"]
    assert (args.num_layers, args.encoder_num_layers) == (2, 2)


def test_per_rank_files(tmp_path: Path) -> None:
    test_convert_legacy.save(tmp_path / "ranks", "stacked", add_bias_linear=False)
    more = ("--transformer-impl", "local")
    assert convert(tmp_path / "ranks", tmp_path / "student", "1", *more) == 0
    report = json.loads((tmp_path / "student" / "parity.json").read_text())
    assert report["passed"]
    assert report["tensors"] > 5


def test_a_bit_that_differs_is_found(
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The lowest bit of one value, in what is read back."""

    def spoiled(folder: Path) -> Any:
        source = open_checkpoint(folder)
        read = source.read_tensor

        def flip(name: str) -> Tensor:
            values = read(name).clone()
            if name == "decoder.final_layernorm.weight":
                values.view(torch.uint8)[0] ^= 1
            return values

        object.__setattr__(source, "read_tensor", flip)
        return source

    module = import_module("ep_plugin.commands.convert.compare_kept")
    monkeypatch.setattr(module, "open_checkpoint", spoiled)
    assert convert(teacher, tmp_path / "student", "1") == 1
    assert "decoder.final_layernorm.weight and 0 more tensors are not" in capsys.readouterr().err
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    ("layers", "extra", "said"),
    [
        ("0-4", "", "names layer 4, and"),
        ("9", "", "has the layers 0 to 3"),
        ("0,1,0", "", "names layer 0 twice"),
        ("0-2,2-3", "", "names layer 2 twice"),
        ("3-1", "", "3-1 ends before it begins; use 1-3"),
        ("", "", "cannot be read; use numbers from 0"),
        ("0,,1", "", "cannot be read"),
        ("-1", "", "cannot be read"),
        ("0-999999", "", "names more than 100000 layers"),
        ("0", "", "keeps none of the layers"),
        ("1", "--num-experts 8 --topk 2", "--num-experts gives a dense model experts"),
        ("1", "--format hf", "--keep-layers makes a Megatron checkpoint"),
        ("1", "--drop-optimizer", "--keep-layers leaves out"),
        ("1", "--ep 2", "--keep-layers leaves out"),
        ("1", "--seed 3", "this makes none"),
        ("1", "--parity-tolerance 1", "the bits of the kept layers are compared"),
    ],
)
def test_refusals(
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    layers: str,
    extra: str,
    said: str,
) -> None:
    assert convert(teacher, tmp_path / "out", f"{layers}", *shlex.split(extra)) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", BY_NUMBER)
def test_layers_that_are_counted_from_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    save_dense(tmp_path / "dense", **{name: BY_NUMBER[name]})
    assert convert(tmp_path / "dense", tmp_path / "out", "1-2") == 2
    assert f"was trained with {name} = " in capsys.readouterr().err


ODD = tuple(f"decoder.layers.{number}.x" for number in ("00", "7", "\u0661"))


@pytest.mark.parametrize("name", ODD)
def test_tensors_of_no_layer_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Renumbered, one of them would take another's place, or be lost without a word."""
    args = MOE | {"num_layers": 5, "moe_layer_freq": [0, 1, 1, 1, 0]}
    save_dense(tmp_path / "dense", pyramid() | {name: torch.ones(2)}, **args)
    assert convert(tmp_path / "dense", tmp_path / "out", "0-3") == 2
    assert "say num_layers = 5, and a tensor is of layer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_object_of_no_layer_is_refused(teacher: Path) -> None:
    opened = open_source(teacher, "megatron")
    odd = frozenset({"decoder.layers.01.x/shard_0_1"})
    opened = replace(opened, source=replace(opened.source, objects=odd))
    with pytest.raises(ConfigError, match=r"cannot renumber .*01.* which is of no layer"):
        keep_layers(opened, (1,))


@pytest.mark.parametrize("metadata", [[], "x", torch.ones(2)])
def test_content_metadata_of_another_type(metadata: Any) -> None:
    stream = io.BytesIO()
    torch.save({"content_metadata": metadata}, stream)
    with pytest.raises(ConfigError, match="its content_metadata is no dictionary"):
        load_common(stream.getvalue(), Path("folder"))


def test_many_layers_are_counted_at_once() -> None:
    assert len(parse_kept("0-99999")) == 100_000


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5)), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_any_list_is_read_as_it_says_or_refused(parts: list[tuple[int, int]]) -> None:
    text = ",".join(str(a) if not more else f"{a}-{a + more}" for a, more in parts)
    expected = [layer for a, more in parts for layer in range(a, a + more + 1)]
    if len(set(expected)) == len(expected):
        assert parse_kept(text) == tuple(expected)
    else:
        with pytest.raises(ConfigError, match="twice"):
            parse_kept(text)


def test_arguments_of_the_teacher_stay(teacher: Path, tmp_path: Path) -> None:
    assert convert(teacher, tmp_path / "out", "1-3", "--skip-parity") == 0
    args = open_checkpoint(tmp_path / "out").common["args"]
    assert isinstance(args, argparse.Namespace)
    assert (args.lr, args.hidden_size, args.no_save_optim) == (0.125, H, True)
    assert not (tmp_path / "out" / "parity.json").exists()
