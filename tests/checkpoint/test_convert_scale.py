"""Conversion of much: killed and resumed, in several processes, in little memory, on full disks."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ep_plugin.checkpoint import writer
from ep_plugin.checkpoint.formats import dist_writer
from ep_plugin.checkpoint.formats.dist_writer import write_checkpoint
from ep_plugin.checkpoint.tensors import NewTensor, Region, Source, TensorInfo
from ep_plugin.cli import main
from tests.commands.test_convert import (
    ITERATION,
    convert,
    dense_tensors,
    refused,
    run_args,
    save_dense,
)

DROP = ("--mode", "drop")  # its random numbers must come out again


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist_writer, "MAX_FILE_BYTES", 1000)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def killed(root: Path, at: int, processes: int) -> int:
    """Convert in a process that kills itself; returns its exit code.

    One process dies in the `at`-th tensor it writes, several when the `at`-th file is whole.
    """
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_convert_until, args=(root, at, processes))
    process.start()
    process.join(timeout=60)
    assert process.exitcode is not None
    return process.exitcode


def _convert_until(root: Path, at: int, processes: int) -> None:
    torch.set_num_threads(1)
    owner, name = (torch, "save") if processes == 1 else (writer.Journal, "add")
    original, calls = getattr(owner, name), []

    def die(*args: Any, **kwargs: Any) -> None:
        calls.append(name)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*args, **kwargs)

    setattr(owner, name, die)
    os._exit(convert(root / "dense", root / "moe", *DROP, "--processes", str(processes)))


@pytest.mark.parametrize(("processes", "moments"), [(1, (10, 16)), (3, (2, 7))])
def test_killed_and_resumed_gives_the_same_bytes(
    tmp_path: Path, processes: int, moments: tuple[int, int]
) -> None:
    """Twice killed at random moments, then run to its end: as if nothing had happened."""
    save_dense(tmp_path / "dense")
    assert convert(tmp_path / "dense", tmp_path / "whole", *DROP) == 0
    whole = contents(tmp_path / "whole")
    assert sum(name.endswith(".distcp") for name in whole) > 15
    for _ in range(2):
        at = random.randint(*moments)
        assert killed(tmp_path, at, processes) == -signal.SIGKILL, at
        assert not (tmp_path / "moe").exists()
    (journal,) = tmp_path.glob(".moe.partial/journal.jsonl")
    first, *done = [json.loads(line)[0] for line in journal.read_text().splitlines()[1:]]
    folder = journal.parent / "checkpoint" / f"iter_{ITERATION:07d}"
    (folder / first).unlink()  # as if the disk had lost it
    stamps = {name: (folder / name).stat().st_mtime_ns for name in done}
    assert convert(tmp_path / "dense", tmp_path / "moe", *DROP, "--processes", str(processes)) == 0
    assert contents(tmp_path / "moe") == whole
    for name, stamp in stamps.items():  # what was whole was not written again
        (path,) = (tmp_path / "moe").rglob(name)
        assert path.stat().st_mtime_ns == stamp
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe", "whole"]


def test_other_arguments_do_not_touch_an_unfinished_conversion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_dense(tmp_path / "dense")
    assert killed(tmp_path, 6, 1) == -signal.SIGKILL
    before = contents(tmp_path)
    message = refused(tmp_path, capsys, "--seed", "5", *DROP)
    assert "unfinished conversion of another kind (seed was 1234 and is 5)" in message
    assert contents(tmp_path) == before


def test_an_error_leaves_no_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN in a tensor far back: found while streaming; with one process and with several."""
    tensors = dense_tensors()
    tensors["decoder.layers.mlp.linear_fc2.weight"][3, 5, 2] = float("nan")
    save_dense(tmp_path / "dense", tensors)
    for processes in ("1", "3"):
        message = refused(tmp_path, capsys, "--processes", processes)
        assert "decoder.layers.3.mlp.linear_fc2.weight" in message
        assert "has 1 values that are NaN or infinite" in message


def test_no_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_dense(tmp_path / "dense")
    usage = shutil.disk_usage(tmp_path)
    few = usage._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: few)
    assert "has 0.00 GiB free, and the output needs 0.06 GiB" in refused(tmp_path, capsys)


def test_a_disk_that_takes_nothing_is_not_called_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_dense(tmp_path / "dense")
    few = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: few)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    message = refused(tmp_path, capsys)
    assert f"{tmp_path} cannot be written; use another --to" in message
    assert "GiB" not in message


def test_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It names every file and tensor, and --check finds what has changed since."""
    save_dense(tmp_path / "dense")
    moe = tmp_path / "moe"
    assert convert(tmp_path / "dense", moe) == 0
    manifest = json.loads((moe / "manifest.json").read_text())
    assert set(manifest["files"]) == set(contents(moe)) - {"manifest.json"}
    name = "decoder.layers.1.mlp.experts.experts.linear_fc2.weight"
    assert manifest["tensors"][name] == {"dtype": "torch.float32", "shape": [4, 8, 12]}
    assert main(["convert", "--check", "--to", str(moe)]) == 0
    folder = moe / f"iter_{ITERATION:07d}"
    changed = bytearray((folder / "__0_1.distcp").read_bytes())
    changed[len(changed) // 2] ^= 1
    (folder / "__0_1.distcp").write_bytes(changed)
    (folder / "__0_2.distcp").write_bytes(b"")
    (folder / "__0_3.distcp").unlink()
    capsys.readouterr()
    assert main(["convert", "--check", "--to", str(moe)]) == 1
    problems = capsys.readouterr().err
    assert "__0_1.distcp has other bytes than were written" in problems
    assert "__0_2.distcp has 0 bytes instead of" in problems
    assert "__0_3.distcp is missing" in problems
    assert len(problems.splitlines()) == 3
    assert main(["convert", "--check", "--to", str(tmp_path / "dense")]) == 2


# EP_TEST_GIB=10 makes the dense checkpoint as large, and the result twice that.
LAYERS, HIDDEN, WIDTH = 22 * int(os.environ.get("EP_TEST_GIB", "1")), 1024, 4096
MEASURE = """
import resource, sys
from ep_plugin.cli import main
import ep_plugin.commands.convert

def memory(name):
    status = open("/proc/self/status").read()
    return int(status.split(name + ":")[1].split()[0]) * 1024

before, limit = memory("VmHWM"), memory("VmData") + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
assert main(sys.argv[2:]) == 0
print(memory("VmHWM") - before)
"""


def test_memory_is_that_of_two_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense checkpoint of 1 GiB becomes one of 2 GiB in the memory of the two largest tensors.

    More than those and a GiB cannot be had, and most of the GiB is not asked for.
    """
    monkeypatch.setattr(dist_writer, "MAX_FILE_BYTES", 1 << 30)
    save_large(tmp_path / "dense")
    paths = ["--from", str(tmp_path / "dense"), "--to", str(tmp_path / "moe")]
    command = ["convert", *paths, "--num-experts", "2", "--topk", "2", "--skip-parity", "--json"]
    largest = 2 * (2 * WIDTH * HIDDEN * 4)  # fc1 of both experts
    limit = str(2 * largest + (1 << 30))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, limit, *command], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary, grown = done.stdout.splitlines()
    assert json.loads(summary)["num_bytes"] > (LAYERS // 22) * 2 << 30
    assert (tmp_path / "moe" / "manifest.json").exists()
    assert int(grown) < 2 * largest + (128 << 20)  # of the GiB it may take beside them
    shutil.rmtree(tmp_path / "moe")
    shutil.rmtree(tmp_path / "dense")


def save_large(root: Path) -> None:
    """Write random weights tensor by tensor."""

    def draw(name: str, *shape: int) -> NewTensor:
        return NewTensor(name, TensorInfo(shape, torch.float32), partial(once, shape))

    def once(shape: tuple[int, ...]) -> Iterator[Region]:
        yield Region((0,) * len(shape), torch.empty(shape).uniform_(-1, 1))

    content = [draw("embedding.word_embeddings.weight", 64, HIDDEN)]
    content += [draw("decoder.final_layernorm.weight", HIDDEN)]
    for layer in range(LAYERS):
        mlp, attention = (f"decoder.layers.{layer}.{name}" for name in ("mlp.", "self_attention."))
        content += [draw(f"{attention}linear_qkv.weight", 3, HIDDEN)]
        content += [draw(f"{attention}linear_proj.weight", HIDDEN, 1)]
        content += [draw(f"{mlp}linear_fc1.weight", 2 * WIDTH, HIDDEN)]
        content += [draw(f"{mlp}linear_fc2.weight", HIDDEN, WIDTH)]
    changes = {"num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": WIDTH}
    common = {"args": run_args(**changes, add_bias_linear=False), "iteration": 1}
    nowhere = Source(Path("iter_0000001"), common, True, {}, frozenset(), torch.zeros, bytes)  # type: ignore[arg-type]
    write_checkpoint(root, nowhere, common, content, lambda _: None)
