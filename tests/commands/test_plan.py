"""The network model: its counts against sampled routings, its times against measured ones."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from ep_plugin.cli import main
from ep_plugin.commands.plan.network import (
    NETWORKS,
    Forecast,
    Network,
    Traffic,
    exchange_ms,
    forecast,
    hidden_share,
    load,
)
from ep_plugin.errors import ConfigError

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
# One NCCL all-to-all between two H100s, EP=2: tokens, topk, hidden, measured milliseconds.
MEASURED = {
    "dsv3": (8192, 4, 7168, 0.94),
    "q3-235b": (8192, 8, 4096, 1.06),
    "q3-30b-ep8": (8192, 8, 2048, 0.58),
}


@pytest.mark.parametrize("shape", MEASURED)
def test_times_are_those_measured_on_two_gpus(shape: str) -> None:
    tokens, topk, hidden, measured = MEASURED[shape]
    network = NETWORKS["nvlink8"]
    sent = load(Traffic(tokens, topk, hidden, experts=64), network, 2, "flat", 2.0)
    assert exchange_ms(sent, network, "flat") == pytest.approx(measured, rel=0.06)


SCHEDULES = [("serial", "symm_mem"), ("chunked", "swaps")]


def steps_in_a_graph(ep: int, shape: str, schedule: str, *files: str) -> list[dict[str, Any]]:
    """Rows of `bench overlap` through symm_mem, in bf16."""
    want = {"bench": "overlap", "shape": shape, "schedule": schedule, "ep": ep}
    want |= {"dispatcher": "symm_mem", "graph": True, "precision": "bf16"}
    rows = [row for file in files for row in json.loads((RESULTS / file).read_text())]
    return [row for row in rows if all(row[key] == value for key, value in want.items())]


def foresee(ep: int, shape: str, how: str, compute_ms: float) -> Forecast:
    tokens, topk, hidden, _ = MEASURED[shape]
    experts = {"dsv3": 8, "q3-235b": 16, "q3-30b-ep8": 16}[shape] * ep
    traffic = Traffic(tokens, topk, hidden, experts)
    return forecast(traffic, NETWORKS["nvlink8"], ep, how, compute_ms, 1)


@pytest.mark.parametrize("shape", MEASURED)
@pytest.mark.parametrize(("schedule", "how"), SCHEDULES)
def test_a_step_in_a_graph_takes_what_the_model_says(shape: str, schedule: str, how: str) -> None:
    """Within 10 % of the median start on two H100, which differ by up to 20 %."""
    files = ("two_gpus.json", "two_gpus_other_starts.json", "two_h100_loop.json")
    starts = steps_in_a_graph(2, shape, schedule, *files)
    assert len(starts) == 5

    def middle(what: str) -> float:
        return median(start[what] for start in starts)

    found = foresee(2, shape, how, middle("compute_ms"))
    assert found.exchange_ms == pytest.approx(middle("exchange_ms"), rel=0.1)
    assert found.step_ms == pytest.approx(middle("ms"), rel=0.1)


@pytest.mark.parametrize("shape", MEASURED)
@pytest.mark.parametrize(("schedule", "how"), SCHEDULES)
def test_four_gpus_take_what_was_fitted_to_two(shape: str, schedule: str, how: str) -> None:
    """Steps to 15 % and exchanges to 20 % on four H200, which no rate was fitted to."""
    (start,) = steps_in_a_graph(4, shape, schedule, "four_gpus_h200.json")
    found = foresee(4, shape, how, start["compute_ms"])
    assert start["exchange_ms"] == pytest.approx(found.exchange_ms, rel=0.2)
    assert start["ms"] == pytest.approx(found.step_ms, rel=0.15)


def test_swaps_send_all_tokens_and_end_at_the_domain() -> None:
    traffic, network = Traffic(100, 2, 1, experts=32), Network(domain=4)
    assert load(traffic, network, 4, "swaps", 1.0).inside == 300
    stores = load(traffic, network, 4, "symm_mem", 1.0)
    assert stores.inside == load(traffic, network, 4, "dedup", 1.0).inside < 300
    assert stores.copied == pytest.approx(2 * stores.inside * 4 / 3)
    with pytest.raises(ConfigError, match=r"in one NVLink domain \(4\); use ep=4"):
        load(traffic, network, 8, "swaps", 1.0)


@pytest.mark.parametrize("how", ["flat", "dedup", "hierarchical"])
def test_bytes_are_those_of_sampled_routings(how: str) -> None:
    """Rank 0's rows, over 4 domains of 4 ranks; a byte a value, one value a row."""
    tokens, topk, experts, ep, near = 20000, 3, 32, 16, 4
    found = load(Traffic(tokens, topk, 1, experts), Network(domain=near), ep, how, 1.0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(tokens, experts, generator=generator).topk(topk, dim=1).indices
    rank = ids // (experts // ep)
    domain = rank // near
    inside = outside = 0
    for ranks, domains in zip(rank.tolist(), domain.tolist(), strict=True):
        if how == "flat":
            inside += sum(d == 0 and r != 0 for r, d in zip(ranks, domains, strict=True))
            outside += sum(d != 0 for d in domains)
        elif how == "dedup":
            inside += sum(r // near == 0 and r != 0 for r in set(ranks))
            outside += sum(r // near != 0 for r in set(ranks))
        else:  # a domain's first rank passes on what came from outside; all domains are alike
            inside += sum(r % near != 0 for r in set(ranks))
            outside += sum(d != 0 for d in set(domains))
    assert found.inside == pytest.approx(inside, rel=0.03)
    assert found.outside == pytest.approx(outside, rel=0.03)
    assert found.messages == (3 if how == "hierarchical" else 12)


def test_what_is_hidden() -> None:
    assert hidden_share(2.0, 10.0, 1) == 0
    assert hidden_share(2.0, 10.0, 4) == pytest.approx(0.75)  # all but the first and last chunk
    assert hidden_share(10.0, 2.0, 4) == pytest.approx(0.15)  # 1.5 of 10 ms under the compute
    assert hidden_share(0.0, 10.0, 4) == 1
    alone = forecast(Traffic(8192, 8, 7168, 256), NETWORKS["nvlink8"], 1, "flat", 10.0, 4)
    assert (alone.exchange_ms, alone.step_ms) == (0, 10)


def test_less_is_sent_by_each_way_in_turn() -> None:
    traffic = Traffic(8192, 8, 7168, 256)
    outside = [
        load(traffic, NETWORKS["nvlink8"], 64, how, 2.0).outside
        for how in ("flat", "dedup", "hierarchical")
    ]
    assert outside[0] > outside[1] > outside[2]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--ep", "8", "64", "--plot", str(tmp_path / "p.png"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["ep"], row["how"]) for row in rows[:2]] == [(8, "flat"), (8, "dedup")]
    assert (tmp_path / "p.png").stat().st_size > 10000
    assert main(["plan", "--ep", "8"]) == 0
    assert "exchange ms" in capsys.readouterr().out


def test_compute_may_be_the_floor_of_the_layer(capsys: pytest.CaptureFixture[str]) -> None:
    layer = ["--topk", "8", "--hidden", "2048", "--ffn", "768", "--experts", "128"]
    assert main(["plan", *layer, "--ep", "1", "8", "--json"]) == 0
    found = {row["ep"]: row["compute_ms"] for row in json.loads(capsys.readouterr().out)}
    assert round(found[1], 2) == 4.21  # of docs/benchmarks.md
    assert 3.05 < found[8] < 3.2  # fewer weights on a rank, as many rows
    assert main(["plan", *layer, "--compute-ms", "3"]) == 2
    assert "use --compute-ms without --ffn" in capsys.readouterr().err
    assert main(["plan", *layer[:4], "--ffn", "0"]) == 2
    assert "--ffn must be positive; got 0; use --ffn 1" in capsys.readouterr().err


def test_measured_rows_stand_beside_what_is_foreseen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dims = {"tokens": 8192, "topk": 8, "hidden": 7168}
    row = {"bench": "overlap", "precision": "bf16", "ep": 8, "hidden_share": 0.5, "dims": dims}
    row |= {"graph": False, "schedule": "serial"}
    network, traffic = NETWORKS["nvlink8"], Traffic(8192, 8, 7168, 256)
    twice = 2 * forecast(traffic, network, 8, "dedup", 1.0, 1).exchange_ms
    half = forecast(traffic, network, 8, "swaps", 1.0, 1).exchange_ms / 2
    rows = [
        {**row, "dispatcher": "alltoall+dedup", "exchange_ms": twice},
        {**row, "dispatcher": "symm_mem", "exchange_ms": 1.0},  # the host's launches
        {
            **row,
            "dispatcher": "symm_mem",
            "exchange_ms": half,
            "schedule": "chunked",
            "graph": True,
        },
        {**row, "dispatcher": "alltoall", "exchange_ms": 1.0, "dims": {**dims, "topk": 4}},
        {**row, "dispatcher": "alltoall", "exchange_ms": 1.0, "precision": "fp8"},
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    plot = tmp_path / "p.png"
    assert main(["plan", "--ep", "8", "--measured", str(path), "--plot", str(plot)]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = lines[lines.index("measured, over what is foreseen:") + 1 :]
    assert [line.split() for line in told] == [
        ["8", "dedup", f"{twice:.2f}", "ms", "2.00"],
        ["8", "swaps", f"{half:.2f}", "ms", "0.50"],
    ]
    assert plot.stat().st_size > 10000
    assert main(["plan", "--hidden", "64", "--measured", str(path)]) == 2
    assert "has no bf16 row with tokens 8192, topk 8, hidden 64" in capsys.readouterr().err
    path.write_text("[1]")
    assert main(["plan", "--measured", str(path)]) == 2
    assert "is no file of `bench overlap`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ep", "3"], "--ep (3) must divide --experts (256); use --ep 2"),
        (
            ["--experts", "120", "--ep", "12"],
            "--ep (12) must be a multiple of the NVLink domain (8); use --ep 8",
        ),
        (["--topk", "300"], "--topk (300) must be at most --experts (256)"),
        (["--chunks", "0"], "--chunks must be positive; got 0; use --chunks 1"),
    ],
)
def test_mistakes(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *flags]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="flat, dedup, hierarchical, symm_mem, swaps; got 'round'"
    ):
        load(Traffic(8, 2, 8, 8), NETWORKS["nvlink8"], 2, "round", 2.0)
