"""Formats against Megatron's own loop: what it saves in both of its own, and what it loads of a
Hugging Face model."""

import json
import os
import random
import subprocess
import sys
from math import lcm
from pathlib import Path

import hf_models
import pytest
import torch
from loop import MOE, OURS, ROOT, RUN, STOCK, launch, launch_with

from ep_plugin.checkpoint.adapt.hugging_face import arguments
from ep_plugin.checkpoint.family import load
from ep_plugin.checkpoint.formats import megatron_dist
from ep_plugin.cli import main
from ep_plugin.megatron.arguments.spell_model import run_flags

pytestmark = pytest.mark.megatron
pytest.importorskip("megatron.training", reason="needs megatron-core with megatron.training")

FLAGS = (
    *("--normalization", "RMSNorm", "--group-query-attention", "--num-query-groups", "2"),
    *("--num-attention-heads", "4", *MOE, "--tensor-model-parallel-size", "2"),
    "--sequence-parallel",
)
WORDS = 97


def test_the_same_tensors_and_objects(tmp_path: Path) -> None:
    """Both of Megatron's formats after one step of the same run: every value to the bit.

    Megatron's own experts, cut over two ranks as everything else is.
    """
    for name in ("torch", "torch_dist"):
        save = ("--save", str(tmp_path / name), "--save-interval", "1", "--train-iters", "1")
        done = launch(2, STOCK, *save, *FLAGS, "--ckpt-format", name)
        assert done.returncode == 0, done.stderr[-3000:]
    source, target = str(tmp_path / "torch"), str(tmp_path / "converted")
    assert main(["convert", "--from", source, "--to", target, "--skip-parity"]) == 0
    ours = megatron_dist.open_checkpoint(tmp_path / "converted")
    theirs = megatron_dist.open_checkpoint(tmp_path / "torch_dist")
    names = {name for name in theirs.tensors if not name.startswith(("optimizer", "chained"))}
    assert set(ours.tensors) == names
    for name in names:
        assert torch.equal(ours.read_tensor(name), theirs.read_tensor(name)), name
    assert ours.objects == {name for name in theirs.objects if "_extra_state" in name}
    assert ours.folder.name == theirs.folder.name == "iter_0000001"
    assert ours.common["iteration"] == theirs.common["iteration"] == 1


@pytest.mark.parametrize("case", ["qwen3_moe", "gemma"])
def test_through_the_loop_and_back(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Hugging Face model, loaded with the flags that the command prints on two expert-parallel
    ranks, one of them tensor-parallel too, a step at learning rate 0, saved, and back: no name is
    missing or left over, and every bit is the same as without the loop. No size divides the
    vocabulary, and the rows that pad it do not come back."""
    source = hf_models.save(case, tmp_path / "hf", vocab_size=WORDS)
    experts = ["--num-experts", "4", "--topk", "2"] if case == "gemma" else []
    paths = ["--from", str(source), "--to", str(tmp_path / "megatron"), *experts]
    names = ["--transformer-impl", "local"]
    assert main(["convert", *paths, *names, "--skip-parity", "--json"]) == 0
    flags = json.loads(capsys.readouterr().out)["megatron_flags"]
    if experts:
        paths = ["--from", str(source), "--to", str(tmp_path / "direct"), *experts]
        assert main(["convert", *paths, "--format", "hf", "--skip-parity"]) == 0
        source = tmp_path / "direct"
    data = ["--seq-length", "32", "--vocab-size", str(WORDS - 1)]
    if case == "qwen3_moe":
        data += ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
        data += ["--expert-tensor-parallel-size", "1"]
    load = ("--load", str(tmp_path / "megatron"), "--finetune", "--exit-on-missing-checkpoint")
    strict = ("--dist-ckpt-strictness", "raise_all", "--expert-model-parallel-size", "2")
    step = ("--train-iters", "1", "--lr", "0", "--min-lr", "0")
    save = ("--save", str(tmp_path / "saved"), "--save-interval", "1")
    done = launch_with(2, OURS, *flags, *data, *load, *strict, *step, *save)
    assert done.returncode == 0, done.stderr[-3000:]
    paths = ["--from", str(tmp_path / "saved"), "--to", str(tmp_path / "back")]
    assert main(["convert", *paths, "--format", "hf", "--skip-parity"]) == 0
    before, after = hf_models.tensors(source), hf_models.tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.newest
def test_the_printed_flags_fit_every_tensor_parallel_size() -> None:
    """For models of sizes drawn at random, Megatron itself builds what it builds with a vocabulary
    that every number divides."""
    draw, lines = random.Random(5), []
    for case in ("mixtral", "qwen3_moe"):
        groups = draw.choice((4, 6))
        heads, vocabulary = 12, draw.randint(90, 400)
        config = hf_models.settings(case).to_dict() | {
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "hidden_size": 8 * heads,
            "head_dim": 8,
            "intermediate_size": 48 * heads,
            "vocab_size": vocabulary,
        }
        args = arguments(config, load(hf_models.model_type(case)))
        args.transformer_impl = "local"
        flags = [*run_flags(args), *RUN, "--expert-tensor-parallel-size", "1"]
        rows = int(flags[flags.index("--padded-vocab-size") + 1])
        assert vocabulary <= rows < vocabulary + lcm(*range(1, heads + 1))
        for tp in (1, 2, 3, 5, *draw.sample((4, 6, 7, 8, 9, 10, 11, 12), 2)):
            typed = [*flags, "--tensor-model-parallel-size", str(tp)]
            lines += [[tp, typed, rows], [tp, typed, lcm(*range(1, heads + 1)) * 10]]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "helpers" / "read_flags.py")],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        env={**os.environ, "EP_PLUGIN_DEVICE": "cpu", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [isinstance(one, dict) for one in json.loads(done.stdout.splitlines()[-1])]
    assert found[::2] == found[1::2]
    assert 4 <= sum(found[::2]) < len(found[::2])
