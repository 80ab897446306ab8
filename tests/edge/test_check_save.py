"""A state that holds nan or inf is never the newest checkpoint, whatever holds it."""

import errno
import json
import math
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loop import MOE, OURS, launch
from torch import nn
from warm import Done

from ep_plugin.checkpoint.finite import any_nonfinite, nonfinite
from ep_plugin.cli import main
from ep_plugin.megatron.arguments import not_saved
from ep_plugin.megatron.arguments.not_saved import NOTE, at_start, leave
from ep_plugin.megatron.seams import failed_save
from ep_plugin.megatron.seams.rank_state import held

pytestmark = pytest.mark.megatron
CPU = torch.device("cpu")
RUN = ("--train-iters", "3", *MOE, "--expert-model-parallel-size", "2", "--save-interval", "1")
TRACKER = "latest_checkpointed_iteration.txt"
# Pretrain scripts that do something before a save; `spoil` is put into each.
HEAD = """
import runpy, sys, torch
from megatron.training import training

save = training.save_checkpoint
rank = torch.distributed.get_rank
"""
TAIL = """
training.save_checkpoint = spoil
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
IN_A_MOMENT = """
def spoil(iteration, model, optimizer, *rest, **settings):
    if iteration == 2 and rank() == 1:
        experts = optimizer.chained_optimizers[1].optimizer
        experts.state[experts.param_groups[0]["params"][0]]["exp_avg"].view(-1)[-1] = -torch.inf
    save(iteration, model, optimizer, *rest, **settings)
"""
# In every tensor that is saved, one at a time, on one rank; what is there is found by what
# torch's modules and optimizers say of themselves.
EVERYWHERE = """
from ep_plugin.megatron.seams import check_save

def leaves(optimizer):
    parts = getattr(optimizer, "chained_optimizers", None)
    return [optimizer] if parts is None else [leaf for part in parts for leaf in leaves(part)]

def spoil(iteration, model, optimizer, *rest, **settings):
    if iteration != 2:
        return
    chunks, saved = training.unwrap_model(model), []
    for chunk in chunks:
        saved += [(name, t) for name, t in chunk.state_dict().items() if torch.is_tensor(t)]
    for leaf in leaves(optimizer):
        inner = leaf.optimizer
        saved += [("param", p) for group in inner.param_groups for p in group["params"]]
        for state in inner.state_dict()["state"].values():
            saved += [(key, t) for key, t in state.items() if torch.is_tensor(t) and t.dim()]
    saved = [(name, t) for name, t in saved if t.is_floating_point() and t.numel()]
    counts = [None, None]
    torch.distributed.all_gather_object(counts, len(saved))
    assert min(counts) > 20, counts
    assert check_save.find(chunks, optimizer) is None
    for number in range(max(counts)):
        planter = number % 2 if number < min(counts) else counts.index(max(counts))
        if rank() == planter:
            name, tensor = saved[number]
            values = tensor.detach().view(-1)
            where, value = number % len(values), ("nan", "inf", "-inf")[number % 3]
            before = values[where].clone()
            values[where] = float(value)
        said = check_save.find(chunks, optimizer)
        assert said is not None and f"rank {planter} holds " in said, (number, said)
        assert "a parameter of" not in said, said
        if rank() == planter:
            assert value[-3:] + " in " in said, (said, value)
            assert name == "param" or name.split(".")[-1] in said, (said, name)
            values[where] = before
    assert check_save.find(chunks, optimizer) is None
    if rank() == 0:
        print("planted in", *counts)
"""


def run(folder: Path, spoil: str, *flags: str) -> Done:
    script = folder / "spoilt.py"
    script.write_text(HEAD + spoil + TAIL)
    saved = str(folder / "saved")
    return launch(2, (*OURS, str(script)), *RUN, "--save", saved, "--load", saved, *flags)


@pytest.mark.newest
def test_what_holds_inf_is_not_saved_and_the_next_start_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The save before, which is still under way then, is finished."""
    flags = ("--use-distributed-optimizer", "--bf16", "--async-save", "--async-strategy", "mcore")
    done = run(tmp_path, IN_A_MOMENT, *flags)
    saved = tmp_path / "saved"
    said = [line for line in done.stderr.splitlines() if line.startswith("ep_plugin: error: ")]
    assert len(said) == 1, done.stdout[-2000:] + done.stderr[-4000:]
    assert "iteration 2 is not saved: rank 1 holds inf in optimizer.state.exp_avg." in said[0]
    assert ".mlp.experts.experts.linear_fc" in said[0]
    assert f"(layer 1); the newest whole checkpoint is {saved}/iter_0000001; " in said[0]
    assert done.returncode == 3
    assert [path.name for path in saved.glob("iter_*")] == ["iter_0000001"]
    assert (saved / TRACKER).read_text() == "1"
    assert main(["audit", str(saved), "--json"]) == 0, capsys.readouterr().out
    done = run(tmp_path, "spoil = save\n", *flags)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "did not save iteration 2: rank 1 holds inf in optimizer.state.exp_avg." in done.stdout
    assert "; this one goes on from 1\n" in done.stdout
    assert (saved / TRACKER).read_text() == "3"
    assert not (saved / "not_saved.json").exists()


NO_ROOM = """
import errno
from megatron.core.dist_checkpointing.strategies import filesystem_async

real = filesystem_async._write_item

def no_room(*rest, **settings):
    raise OSError(errno.ENOSPC, "No space left on device")

def spoil(iteration, *rest, **settings):
    filesystem_async._write_item = no_room if (iteration, rank()) == (2, 1) else real
    save(iteration, *rest, **settings)
"""


def test_a_save_that_fails_leaves_nothing_and_names_the_disk(tmp_path: Path) -> None:
    flags = ("--async-save", "--async-strategy", "mcore")
    done = run(tmp_path, NO_ROOM, *flags)
    saved = tmp_path / "saved"
    said = [line for line in done.stderr.splitlines() if line.startswith("ep_plugin: error: ")]
    assert len(said) == 1, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"iteration 2 is not saved: saving it to {saved} failed on rank 1: " in said[0]
    assert f"the disk of {saved} has " in said[0]
    assert f"bytes free); the newest whole checkpoint is {saved}/iter_0000001; " in said[0]
    assert done.returncode == 1
    names = ["iter_0000001", TRACKER, "not_saved.json"]
    assert sorted(path.name for path in saved.iterdir()) == names
    assert (saved / TRACKER).read_text() == "1"


@pytest.mark.parametrize("before", ["8", None])
def test_a_tracker_that_lost_its_words_gets_them_back(
    before: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where the disk is full once the checkpoint is written; a folder of before stays."""
    for was_there in (True, False):
        (tmp_path / TRACKER).write_text("")
        (tmp_path / "iter_0000012").mkdir(exist_ok=True)
        begun = failed_save.Begun(tmp_path, 12, was_there, before)
        full = OSError(errno.ENOSPC, "No space left on device")
        with pytest.raises(SystemExit), failed_save._told([begun]):
            raise RuntimeError("Worker failure") from full
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "No space left on device" in said
        assert (tmp_path / TRACKER).exists() is (before is not None)
        assert not_saved.newest(tmp_path) == before
        assert (tmp_path / "iter_0000012").exists() is was_there
    (tmp_path / TRACKER).write_text("12")  # it was saved: what failed came after it
    with pytest.raises(RuntimeError), failed_save._told([begun]):
        raise RuntimeError
    assert capsys.readouterr().err == ""


def test_an_optimizer_that_lies_on_the_host_is_read_there() -> None:
    """As Megatron's for two devices, of which only what it keeps is built: it needs a GPU."""
    module = nn.Linear(3, 2, bias=False)
    shard = module.weight.detach().view(-1)[:4].clone()
    copy = shard.clone().requires_grad_()
    steps = torch.optim.Adam([copy])
    copy.grad = torch.ones(4)
    steps.step()
    both = SimpleNamespace(
        sub_optimizers=[steps], inner_param_to_orig_param={copy: shard}, param_groups=[]
    )
    one = SimpleNamespace(
        optimizer=both,
        gbuf_ranges=[],
        model_float16_groups=[[module.weight]],
        shard_fp32_from_float16_groups=[[shard]],
    )
    parts = held([module], SimpleNamespace(chained_optimizers=[one]))
    assert all(part.parameter is module.weight and part.name == "weight" for part in parts)
    expected = {"": module.weight, "param": copy, **steps.state[copy]}
    del expected["step"]
    assert {
        part.prefix.split(".")[-2] if part.prefix else "": id(part.tensor) for part in parts
    } == {name: id(tensor) for name, tensor in expected.items()}


MTP = ("--mtp-num-layers", "1")
BIAS = ("--moe-router-enable-expert-bias", "--moe-router-score-function", "sigmoid")
CHUNKS = (
    *("--num-layers", "4", "--pipeline-model-parallel-size", "2", "--expert-model-parallel-size"),
    *("1", "--num-layers-per-virtual-pipeline-stage", "1", "--micro-batch-size", "1"),
)


@pytest.mark.parametrize(
    "flags",
    [("--use-distributed-optimizer", "--bf16", *MTP, *BIAS), ("--bf16", *CHUNKS)],
    ids=["distributed", "plain"],
)
def test_it_is_found_wherever_it_is(flags: tuple[str, ...], tmp_path: Path) -> None:
    done = run(tmp_path, EVERYWHERE, *flags)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "planted in" in done.stdout


@pytest.mark.newest
def test_the_layer_wise_optimizer_of_muon_too(tmp_path: Path) -> None:
    pytest.importorskip("emerging_optimizers")
    done = run(tmp_path, EVERYWHERE, "--optimizer", "dist_muon", "--bf16")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "planted in" in done.stdout


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn)
VALUES = st.sampled_from(["nan", "inf", "-inf", "0"])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 9)), max_size=6),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8), VALUES)),
)
def test_any_value_of_any_dtype_counts(
    shapes: list[tuple[torch.dtype, int]], wrong: list[tuple[int, int, str]]
) -> None:
    """The largest values of a dtype are finite; integers always are."""
    tensors = {
        str(number): torch.full((size,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
        for number, (dtype, size) in enumerate(shapes)
    }
    tensors["a count"] = torch.tensor([7])
    for number, where, value in wrong:
        if number < len(shapes) and where < shapes[number][1]:
            tensors[str(number)][where] = float(value)
    lists = {name: tensor.double().tolist() for name, tensor in tensors.items()}
    expected = {
        name: "nan" if any(map(math.isnan, values)) else "inf"
        for name, values in lists.items()
        if not all(map(math.isfinite, values))
    }
    assert nonfinite(tensors) == expected
    assert int(any_nonfinite(list(tensors.values()), CPU)) == bool(expected)


def test_a_note_that_is_none_is_none(tmp_path: Path) -> None:
    args = Namespace(load=None, save=str(tmp_path), ckpt_step=None)
    for text in ("", "{}", "[]", json.dumps({"iteration": None, "why": 3}), "\xff"):
        (tmp_path / NOTE).write_text(text)
        assert at_start(args) is None
    leave(tmp_path, 5, "rank 1 holds nan in x")
    assert at_start(args) == (
        "the run before did not save iteration 5: rank 1 holds nan in x; this one begins anew"
    )
    (tmp_path / TRACKER).write_text("5")
    assert at_start(args) is None
    assert "goes on from 4" in str(at_start(Namespace(**vars(args) | {"ckpt_step": 4})))
