"""`ep-plugin bench overlap` on two CPU ranks: its rows, its table, its timeline."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from warm import run_script

from ep_plugin import cli
from ep_plugin.commands.bench.figures import make_row, table
from ep_plugin.commands.bench.measure import Timing

RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_two_ranks_measure_every_dispatcher_and_schedule(tmp_path: Path) -> None:
    rows_file, trace_file = tmp_path / "rows.json", tmp_path / "trace.json"
    done = subprocess.run(
        [
            *(*RANKS, "-m", "ep_plugin.cli", "bench", "overlap", "--shapes", "tiny"),
            *("--repeats", "2", "--warm", "1", "--precision", "bf16", "--backends", "ep_plugin"),
            *("--output", str(rows_file), "--trace", str(trace_file)),
            *("--trace-plot", str(tmp_path / "trace.png"), "--gradients", "added"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(rows_file.read_text())
    ways = {(row["dispatcher"], row["schedule"]) for row in rows}
    assert ways == {
        *(("alltoall", "serial"), ("alltoall", "chunked")),
        *(("alltoall+dedup", "serial"), ("alltoall+dedup", "chunked")),
        *(("symm_mem", "serial"), ("symm_mem", "chunked"), ("hierarchical", "serial")),
    }
    for row in rows:
        assert (row["bench"], row["ep"], row["backend"]) == ("overlap", 2, "ep_plugin")
        assert min(row["ms"], row["exchange_ms"], row["compute_ms"]) > 0
        least = row["exchange_ms"] + row["compute_ms"] - row["ms"]
        share = min(1, max(0, least / row["exchange_ms"]))
        assert row["hidden_share"] == pytest.approx(share, abs=1e-3)
    assert "hierarchical) does not" in done.stdout  # why one pair is missing
    assert done.stdout.count("of the exchange hidden") == len(rows)  # printed by one rank
    check_timeline(json.loads(trace_file.read_text())["traceEvents"])
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")


def check_timeline(events: list[dict[str, Any]]) -> None:
    """Every verb has a range, and ranges of a track lie inside each other or apart."""
    names = {event.get("name", "") for event in events}
    assert {"router", "dispatcher pack", "dispatcher swap", "dispatcher swap, wait"} <= names
    assert {"experts first", "experts second", "experts fc1_grads", "dispatcher unpack"} <= names
    tracks: dict[Any, list[tuple[float, float]]] = {}
    for event in events:
        if event.get("ph") == "X":
            span = event["ts"], event["ts"] + event["dur"]
            tracks.setdefault((event["pid"], event["tid"]), []).append(span)
    assert any("network" in str(tid) for _, tid in tracks)
    for spans in tracks.values():
        open_ends: list[float] = []
        for begin, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while open_ends and open_ends[-1] <= begin:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1] + 0.01  # microseconds, rounded
            open_ends.append(end)


def test_a_gpu_s_step_is_drawn_with_its_backward() -> None:
    """There the host is done with a step before the kernels are."""
    pytest.importorskip("matplotlib")
    from ep_plugin.commands.bench.timeline_plot import ON_GPU, draw

    spans = [
        *(("user_annotation", "step 1", 2000, 100), ("user_annotation", "step 0", 900, 50)),
        *(("kernel", "gemm", 1000, 50), ("kernel", "gemm", 2500, 1000)),
        ("gpu_user_annotation", "step 1", 2600, 50),
        *(("gpu_memcpy", "Memcpy PtoP", 3000, 800), ("kernel", "barrier_kernel", 3900, 100)),
    ]
    events = [
        {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 7}
        for cat, name, ts, dur in spans
    ]
    axes = draw({"traceEvents": events}).axes[0]
    boxes = [c.get_paths()[0].get_extents() for c in axes.collections]
    drawn = {list(ON_GPU)[round(-(box.y0 + box.y1) / 2)]: (box.x0, box.x1) for box in boxes}
    assert drawn["work"] == pytest.approx((0, 1.0))
    assert drawn["network"] == pytest.approx((0.5, 1.3))
    assert drawn["wait"] == pytest.approx((1.4, 1.5))


def test_a_process_on_its_own_is_told_how_to_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "overlap", "--shapes", "tiny"]) == 2
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().err
    for flag, value in (("--trace", "x.json"), ("--recipes", "off"), ("--dispatchers", "alltoall")):
        assert cli.main(["bench", "layer", flag, value]) == 2
        assert f"{flag} is for overlap" in capsys.readouterr().err


def test_rows_are_beside_serial_on_as_many_ranks() -> None:
    cpu = torch.device("cpu")
    where = {"bench": "overlap", "shape": "tiny", "routing": "balanced", "backend": "ep_plugin"}
    where |= {"precision": "bf16", "dispatcher": "symm_mem"}
    rows = [
        make_row(cpu, Timing(ms, ms, ms), **where, ep=ep, schedule=schedule)
        for ep, schedule, ms in (
            *((2, "serial", 1.0), (2, "chunked", 2.0)),
            *((4, "serial", 10.0), (4, "chunked", 5.0)),
        )
    ]
    said = table(rows)
    ratios = [
        line.partition(" x serial")[0].split()[-1] for line in said.splitlines() if " x " in line
    ]
    assert ratios == ["1.00", "2.00", "1.00", "0.50"]
    assert "tiny, ep=2, balanced" in said
    assert "tiny, ep=4, balanced" in said


def test_what_is_asked_for_is_measured_and_the_rest_resumed(tmp_path: Path) -> None:
    rows_file = tmp_path / "rows.json"
    found = []
    for recipes, dispatchers in ((["off"], ["symm_mem"]), (["off", "rowwise"], ["symm_mem"])):
        command = [
            *("-m", "ep_plugin.cli", "bench", "overlap", "--shapes", "tiny", "--resume"),
            *("--repeats", "1", "--warm", "0", "--output", str(rows_file)),
            *("--recipes", *recipes, "--dispatchers", *dispatchers, "--gradients", "anew"),
        ]
        done = run_script(2, command, {**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(rows_file.read_text()))
    first, both = found
    assert [(row["backend"], row["schedule"]) for row in both] == [
        *(("ep_plugin", "serial"), ("ep_plugin", "chunked")),
        *(("ep_plugin+rowwise", "serial"), ("ep_plugin+rowwise", "chunked")),
    ]
    assert first == both[:2]
