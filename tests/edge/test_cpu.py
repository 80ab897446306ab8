"""CPU mode: Megatron's own loop trains and resumes on gloo, and nothing of it stays behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from loop import OURS, train

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.cpu import mode as cpu_mode

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(
        not cpu_mode.wanted(), reason="a GPU is here and EP_PLUGIN_DEVICE is not cpu"
    ),
]

LEAVES_NO_TRACE = """
import os, sys
import torch, torch.distributed
import megatron.core.tensor_parallel.random, megatron.training.arguments
import megatron.core.transformer.torch_norm
from ep_plugin.megatron.cpu import mode as cpu
from ep_plugin.megatron.seams.patches import Patches
from ep_plugin.megatron.seams.touchpoints import find_owner

patches = Patches()
cpu.torch_changes(patches)
cpu.megatron_changes(patches)
found = [find_owner(place)[0] for place, _ in patches.table() if ":" in place]
owners = {id(owner): owner for owner in found}
assert len(owners) > 10
def snapshot():
    # The tracker of random states is Megatron's own state, which the use below moves.
    return {(key, name): id(value) for key, owner in owners.items()
            for name, value in vars(owner).items()
            if name == "__new__" or not name.startswith(("__", "_CUDA_RNG_STATE_TRACKER"))}
import torch._dynamo.eval_frame as compiler
stance = compiler._stance
before, environment = snapshot(), dict(os.environ)
cpu.enable(); cpu.enable()
during = snapshot()
assert torch.zeros(2, device="cuda").device.type == "cpu"
assert torch.zeros(2).cuda().to("cuda:0").device.type == "cpu"
assert torch.cuda.is_available() and torch.cuda.current_device() == 0
start, end = torch.cuda.Event(), torch.cuda.Event()
start.record(); end.record()
assert start.elapsed_time(end) >= 0
with torch.cuda.stream(torch.cuda.Stream()):
    torch.cuda.synchronize()

from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
tracker = get_cuda_rng_tracker()
tracker.reset()
torch.cuda.manual_seed(1)
tracker.add("inner", 5)
outer = torch.rand(3)
torch.cuda.manual_seed(1)
with tracker.fork("inner"):
    first = torch.rand(3)
with tracker.fork("inner"):
    second = torch.rand(3)
assert torch.equal(torch.rand(3), outer), "the outer state must not move"
torch.manual_seed(5)
assert torch.equal(torch.rand(3), first) and torch.equal(torch.rand(3), second)

cpu.disable(); cpu.disable()
after = snapshot()
assert after == before, {key for key in before if before[key] != after.get(key)}
assert during != before and dict(os.environ) == environment
assert compiler._stance == stance
try:
    torch.zeros(1, device="cuda")
except (RuntimeError, AssertionError):
    print("no trace")
"""


def test_it_leaves_no_trace() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run(
        [sys.executable, "-c", LEAVES_NO_TRACE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("no trace")


GROUPS_END = """
import atexit
import torch.distributed as dist
atexit.register(lambda: print(f"groups at the end: {dist.is_initialized()}"))  # runs last
from ep_plugin.megatron.cpu import mode as cpu
cpu.enable()
dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
"""


@pytest.mark.newest
@pytest.mark.parametrize(("last", "code", "left"), [("", 0, False), ("1 / 0", 1, True)])
def test_gloo_s_threads_end_before_python(last: str, code: int, left: bool) -> None:
    """After an error nothing is waited for: another rank may be gone."""
    script = [sys.executable, "-c", GROUPS_END + last]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    said = done.stdout.strip()
    assert (done.returncode, said) == (code, f"groups at the end: {left}"), done.stderr


def test_the_device_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP_PLUGIN_DEVICE", "tpu")
    with pytest.raises(ConfigError, match="must be one of cpu, cuda; got 'tpu'"):
        cpu_mode.wanted()
    monkeypatch.setenv("EP_PLUGIN_DEVICE", "cpu")
    assert cpu_mode.wanted()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("EP_PLUGIN_DEVICE", "cuda")
    with pytest.raises(
        ConfigError, match="needs a GPU and torch sees none; use EP_PLUGIN_DEVICE=cpu"
    ):
        cpu_mode.wanted()


@pytest.mark.parametrize("precision", [(), ("--bf16",)], ids=["fp32", "bf16"])
def test_a_resumed_run_equals_the_whole_one(tmp_path: Path, precision: tuple[str, ...]) -> None:
    """Dense, distributed optimizer with its default sharding, torch's Adam."""
    flags = ("--train-iters", "6", "--use-distributed-optimizer", "--save-interval", "3")
    saved = str(tmp_path / "checkpoint")
    whole = train(2, OURS, tmp_path / "whole", *flags, *precision, "--save", saved)
    more = ("--load", saved, "--ckpt-step", "3")
    resumed = train(2, OURS, tmp_path / "resumed", *flags, *precision, *more)
    for tag in ("grad-norm", "lm loss validation"):
        assert resumed.series(tag) == [(i, v) for i, v in whole.series(tag) if i > 3]
    losses = [value for _, value in whole.series("lm loss")]
    assert losses[-1] < losses[0]


def test_sequence_parallel_equals_one_rank(tmp_path: Path) -> None:
    """TP=2 with sequence parallelism; one initial model, because it is made on the CPU."""
    flags = ("--train-iters", "4", "--use-cpu-initialization", "--normalization", "RMSNorm")
    one = train(1, OURS, tmp_path / "one", *flags)
    parallel = (
        *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
        *("--make-vocab-size-divisible-by", "64"),  # times TP: the same padded vocabulary
    )
    two = train(2, OURS, tmp_path / "two", *flags, *parallel)
    for tag in ("lm loss", "grad-norm"):
        values = [value for _, value in one.series(tag)]
        assert len(values) == 4
        assert [value for _, value in two.series(tag)] == pytest.approx(values, rel=1e-5)


RUN = [sys.executable, "-m", "ep_plugin.run"]


@pytest.mark.newest
def test_run_refuses_a_missing_script_once_for_all_ranks() -> None:
    for rank, lines in (("0", 1), ("1", 0)):
        done = subprocess.run(
            [*RUN, "no_such_script.py"],
            env={**os.environ, "RANK": rank},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == lines
    done = subprocess.run([*RUN, "--help"], capture_output=True, text=True, check=True)
    assert "examples:" in done.stdout
