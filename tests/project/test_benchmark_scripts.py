"""What benchmarks/*.py make of rows; the runs themselves are started by hand."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ep_plugin.commands.bench.figures import make_row
from ep_plugin.commands.bench.measure import Timing

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import scaling  # noqa: E402
import train_ep  # noqa: E402


def row(ep: int, ms: float, **fields: Any) -> dict[str, Any]:
    where = {"shape": "dsv3", "routing": "balanced", "backend": "ep_plugin", "precision": "bf16"}
    bench = "overlap" if ep > 1 else "layer"
    timing = Timing(ms, ms, ms)
    made = make_row(torch.device("cpu"), timing, bench=bench, ep=ep, **(where | fields))
    return {**made, "device": "a GPU", "floor_ms": 1.0}


def test_the_fastest_way_at_each_ep_counts_beside_one_rank(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, plot = tmp_path / "rows.json", tmp_path / "scaling.png"
    rows = [
        *(row(1, 8.0), row(2, 16.0, dispatcher="alltoall", schedule="serial")),
        *(row(2, 10.0, dispatcher="symm_mem", schedule="chunked"), row(8, 20.0)),
        *(row(2, 9.0, graph=True), row(2, 9.0, routing="zipf"), row(2, 1.0, shape="mixtral")),
    ]
    path.write_text(json.dumps(rows))
    command = [sys.executable, str(ROOT / "benchmarks" / "scaling.py"), str(path)]
    done = subprocess.run([*command, "--plot", str(plot)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [line[5:8] for line in lines] == [
        *(["EP=1", "8.00", "1.00"], ["EP=2", "10.00", "0.80"], ["EP=8", "20.00", "0.40"])
    ]
    assert lines[1][8:] == ["symm_mem", "chunked"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    path.write_text(json.dumps(rows[1:3]))
    assert scaling.series(rows[1:3]) == {}
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no shape has rows at EP=1 and at another EP" in done.stderr


def test_losses_are_compared_seed_by_seed() -> None:
    ours = {"losses": [1.01, 2.06], "tokens_per_second": 300.0, "device": "a GPU"}
    theirs = {"losses": [1.00, 2.00], "tokens_per_second": 100.0, "device": "a GPU"}
    told = train_ep.beside(ours, theirs)
    assert told == "3.00 x tokens per second, loss +2.00 % (standard error 1.00) beside"
    one = [{**side, "losses": side["losses"][:1], "device": "cpu"} for side in (ours, theirs)]
    assert train_ep.beside(*one) == "loss +1.00 % beside"


def test_layouts_are_megatron_s_flags() -> None:
    assert train_ep.layout_flags(train_ep.parallel_of("tp=2,ep=4", 8))[-1] == "--sequence-parallel"
    with pytest.raises(ValueError, match="--layouts takes tp, pp, ep, etp"):
        train_ep.parallel_of("xp=2", 8)
