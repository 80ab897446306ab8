"""`--ep-audit-save`: Megatron's own saves are read back, and a bad one ends the run."""

import json
from pathlib import Path

import pytest
from loop import MOE, OURS, launch

from ep_plugin.cli import main

pytestmark = pytest.mark.megatron
# A pretrain script in which rank 1's first expert is spoilt as it is saved.
SPOILT = """
import runpy, sys, torch
from megatron.training import training

save = training.save_checkpoint

def spoil(iteration, model, *rest, **settings):
    if torch.distributed.get_rank() == 1:
        for name, parameter in model[0].named_parameters():
            if name.endswith("1.mlp.experts.linear_fc2.weight"):
                parameter.data[0, 3, 5] = float("nan")
    save(iteration, model, *rest, **settings)

training.save_checkpoint = spoil
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
SAVE = ("--train-iters", "2", *MOE, "--expert-model-parallel-size", "2", "--ep-audit-save")


def test_a_save_of_two_ranks_is_audited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once after each save; the command says the same of the last."""
    flags = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
    saved = tmp_path / "saved"
    done = launch(2, OURS, *SAVE, *flags, "--save", str(saved), "--save-interval", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("ep_plugin: audit: ")]
    summary = "2 MoE layers, optimizer fully_reshardable: fine"
    assert [line.partition("MiB, ")[2] for line in lines] == [summary, summary]
    assert main(["audit", str(saved), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(layer["experts"], layer["distinct"]) for layer in report["layers"]] == [(4, 4), (4, 4)]
    assert report["iteration"] == 2
    assert report["findings"] == []


def test_a_bad_save_ends_every_rank_also_when_it_is_asynchronous(tmp_path: Path) -> None:
    script = tmp_path / "spoilt.py"
    script.write_text(SPOILT)
    saved = tmp_path / "saved"
    flags = ("--async-save", "--async-strategy", "mcore", "--save", str(saved))
    flags += ("--ep-check-save", "off")  # which would not let it be saved
    done = launch(2, (*OURS, str(script)), *SAVE, *flags, "--save-interval", "1")
    said = [line for line in done.stderr.splitlines() if line.startswith("ep_plugin: error: ")]
    assert len(said) == 1, done.stdout[-2000:] + done.stderr[-4000:]
    name = "decoder.layers.1.mlp.experts.experts.linear_fc2.weight, expert 2"
    assert f"{saved}/iter_0000001, is not whole: {name}: 1 values are nan or inf" in said[0]
    assert done.returncode == 1
