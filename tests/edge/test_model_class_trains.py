"""A GPT that becomes a HybridModel goes on as the GPT that stays one: losses, gradients, moments.

Names and refusals are in `test_model_class.py`.
"""

import argparse
from pathlib import Path

import pytest
import torch
from loop import MOE, NEWEST, OURS, SHAPE, launch_with

from ep_plugin.checkpoint.formats.megatron_dist import open_checkpoint
from ep_plugin.cli import main
from ep_plugin.commands.report.events import Run, read_run
from ep_plugin.megatron.cpu import mode as cpu_mode

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(not NEWEST, reason="one release of two; layouts are compared on both"),
    pytest.mark.skipif(
        not cpu_mode.wanted(), reason="a GPU is here and EP_PLUGIN_DEVICE is not cpu"
    ),
]
DISTRIBUTED = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
LATENT = (
    *("--multi-latent-attention", "--kv-lora-rank", "16", "--qk-head-dim", "16"),
    *("--qk-pos-emb-head-dim", "8", "--v-head-dim", "16"),
)
GROUPED = ("--group-query-attention", "--num-query-groups", "1", "--num-attention-heads", "4")
PYRAMID = ("--ep-experts-per-layer", "2,4", "--expert-model-parallel-size", "2")
BIAS = ("--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias")
CASES = {  # -> ranks, flags of both, flags of the GPT, pattern, how the hybrid is cut
    "a pyramid of two ranks": (
        2,
        (*MOE, *PYRAMID, *BIAS, *GROUPED, *DISTRIBUTED),
        ("--moe-layer-freq", "[1]*2"),
        "*E*E",
    ),
    "latent attention, one dense layer, no distributed optimizer": (
        1,
        (*MOE, *LATENT),
        ("--moe-layer-freq", "[0,1]"),
        "+-+E",
    ),
}


def train(folder: Path, ranks: int, *flags: str) -> Run:
    scalars = folder / "scalars"
    more = ("--train-iters", "4", "--save-interval", "2", "--tensorboard-dir", str(scalars))
    done = launch_with(ranks, OURS, *SHAPE[2:], *flags, *more, "--save", str(folder))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return read_run(scalars)


def series(run: Run, tag: str) -> list[float]:
    """Return what the last two steps logged."""
    found = [value for step, value in run.series(tag) if step > 2]
    assert len(found) == 2
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    source = open_checkpoint(folder)
    return {name: source.read_tensor(name) for name in source.tensors}


@pytest.mark.parametrize("case", CASES)
def test_the_hybrid_goes_on_as_the_gpt_does_and_comes_back(tmp_path: Path, case: str) -> None:
    ranks, both, of_gpt, pattern = CASES[case]
    gpt, hybrid, back = (tmp_path / name for name in ("gpt", "hybrid", "back"))
    expected = train(gpt, ranks, "--num-layers", "2", *both, *of_gpt)
    middle = gpt / "iter_0000002"
    convert = ["convert", "--from", str(middle), "--to", str(hybrid)]
    assert main([*convert, "--hybrid-layer-pattern", pattern]) == 0
    convert = ["convert", "--from", str(hybrid), "--to", str(back)]
    assert main([*convert, "--model-class", "gpt"]) == 0
    before, after = tensors(middle), tensors(back)
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert torch.equal(values, after[name]), name
    counters = ("iteration", "optimizer", "opt_param_scheduler")
    assert [open_checkpoint(f).common[n] for f in (middle,) for n in counters] == [
        open_checkpoint(back).common[n] for n in counters
    ]

    found = train(
        tmp_path / "on", ranks, "--hybrid-layer-pattern", pattern, *both, "--load", str(hybrid)
    )
    again = train(
        tmp_path / "again", ranks, "--num-layers", "2", *both, *of_gpt, "--load", str(back)
    )
    for tag in ("lm loss", "grad-norm", "load_balancing_loss"):
        want = series(expected, tag)
        assert series(found, tag) == pytest.approx(want, rel=1e-5), tag
        assert series(again, tag) == pytest.approx(want, rel=1e-5), tag

    made, returned = tmp_path / "on" / "iter_0000004", tmp_path / "returned"
    convert = ["convert", "--from", str(made), "--to", str(returned), "--model-class", "gpt"]
    assert main(convert) == 0
    last, whole = tensors(returned), tensors(gpt / "iter_0000004")
    assert last.keys() == whole.keys()
    for name, values in whole.items():
        torch.testing.assert_close(last[name], values, rtol=1e-4, atol=1e-6, msg=name)
    args = open_checkpoint(returned).common["args"]
    assert isinstance(args, argparse.Namespace)
    assert args.num_layers == 2
