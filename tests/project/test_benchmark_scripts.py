"""What benchmarks/*.py make of rows; the runs themselves are started by hand."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from ep_plugin.cli import build_parser
from ep_plugin.commands import bench, law
from ep_plugin.commands.bench import figures
from ep_plugin.commands.bench.best import both_figures
from ep_plugin.commands.bench.figures import make_row, merge, read, table
from ep_plugin.commands.bench.floors import PRECISIONS, Precision
from ep_plugin.commands.bench.measure import Timing
from ep_plugin.commands.bench.peers._megatron_ways import ways

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_page  # noqa: E402
import bench_rows  # noqa: E402
import forecast_errors  # noqa: E402
import scaling  # noqa: E402
import train_ep  # noqa: E402
import train_run  # noqa: E402
import train_sides  # noqa: E402


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
    where = {"device": "a GPU", "start": "0" * 8, "graph": False}
    ours = {"losses": [1.01, 2.06], "tokens_per_second": 300.0, **where}
    theirs = {"losses": [1.00, 2.00], "tokens_per_second": 100.0, **where}
    told = train_ep.beside(ours, theirs)
    assert told == "3.00 x tokens per second, loss +2.00 % (standard error 1.00) beside"
    for start in ("1" * 8, None):
        two = [each | {"start": start} for each in (ours, theirs)]
        pairs = [(ours, two[1]), (two[0], theirs), *([tuple(two)] if start is None else [])]
        said = [train_ep.beside(*pair) for pair in pairs]
        assert all("may be of two hosts, and not compare) beside" in line for line in said)
        captured = [{**each, "graph": True} for each in (ours, two[1])]
        assert "hosts" not in train_ep.beside(*captured)
    one = [{**side, "losses": side["losses"][:1], "device": "cpu"} for side in (ours, theirs)]
    assert train_ep.beside(*one) == "loss +1.00 % beside"


def test_layouts_are_megatron_s_flags() -> None:
    layout = train_run.parallel_of("tp=2,ep=4", 8)
    assert train_run.layout_flags(layout)[-1] == "--sequence-parallel"
    with pytest.raises(ValueError, match="--layouts takes tp, pp, ep, etp"):
        train_run.parallel_of("xp=2", 8)


def parsed(monkeypatch: pytest.MonkeyPatch, *words: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["train_ep.py", "--ranks", "2", *words])
    return train_ep.parse()


@cache
def megatron_parser() -> argparse.ArgumentParser:
    arguments = pytest.importorskip("megatron.training.arguments")
    from ep_plugin.megatron.arguments.parser import add_ep_arguments

    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return add_ep_arguments(parser)


@pytest.mark.parametrize("recipe", [None, *train_sides.FORMATS])
@pytest.mark.parametrize("side", train_sides.SIDES)
def test_megatron_has_the_flags_of_every_side(
    side: str, recipe: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = megatron_parser()
    monkeypatch.setattr(train_run, "has_engine", lambda: True)
    words = [*("--fp8-recipe", recipe or "tensorwise"), "--force-balance"]
    args = parsed(monkeypatch, *words)
    case = train_run.Case("ep=2", None, 4)
    command = train_run.command_of(side, recipe is not None, 7, args, case)
    known = parser.parse_args(command[command.index(train_run.SCRIPT) + 1 :])
    assert known.moe_router_force_load_balancing
    assert (known.cross_entropy_loss_fusion, known.cross_entropy_fusion_impl) == (True, "native")
    assert (known.manual_gc, known.check_for_nan_in_loss_and_grad) == (True, False)
    assert (known.overlap_grad_reduce, known.overlap_param_gather) == (True, True)
    theirs = side.startswith("megatron")
    assert known.fp8_recipe == (recipe if theirs and recipe else "delayed")  # Megatron's default
    fused = theirs and side != "megatron-defaults"
    assert known.moe_router_padding_for_quantization == (fused and recipe is not None)
    assert known.moe_router_fusion == fused
    everything = side == "megatron-all"
    assert known.delay_wgrad_compute == (everything or side == "megatron-overlap")
    graphs = [module.name for module in known.cuda_graph_modules]
    wanted = ["attn", "moe_router", *(["moe_preprocess"] if recipe is None else [])]
    assert graphs == (wanted if everything or "graphs" in side else [])


def test_sides_differ_by_what_their_rows_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads a row can start it: all sides alike but for its switches."""
    monkeypatch.setattr(train_run, "has_engine", lambda: True)
    args, case = parsed(monkeypatch), train_run.Case("ep=2", None, 4)
    shared = set()
    for name, side in train_sides.SIDES.items():
        command = train_run.command_of(name, True, 7, args, case)
        own = train_run.own(name, True, args, case)
        words = command[command.index(train_run.SCRIPT) :]
        assert words[-len(own.split()) :] == own.split()
        shared.add(" ".join(words[: -len(own.split())]))
        told = train_sides.switches(side, own)
        assert own in told
        assert ("NVTE_USE_CUTLASS_GROUPED_GEMM=1" in told) == (
            name in ("megatron-cutlass", "megatron-graphs-cutlass", "megatron-all")
        )
    assert len(shared) == 1
    names = [train_sides.backend(name, None, True) for name in train_sides.SIDES]
    assert len(set(names)) == len(names) - 1  # whole iterations in a graph are a field
    assert train_sides.backend("megatron", "tensorwise", True) == "megatron (te)"
    delayed = train_sides.backend("megatron-graphs-cutlass", "delayed", True)
    assert delayed == "megatron+graphs+cutlass+delayed (te)"


def test_a_row_says_its_switches_and_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both figures of Megatron are printed; a side that fails is named, the others have rows."""
    log = "[INFO] Selected backend = FusedAttention (sub-backend 1)\n"
    steps = [(1, 200.0), (2, 100.0), (3, 100.0)]
    log += "".join(f"elapsed time per iteration (ms): {ms} | lm loss: 9.{i}\n" for i, ms in steps)

    def start(command: list[str], out: Any, variables: dict[str, str], minutes: float) -> int:
        graphs = "--cuda-graph-modules" in command
        slow = 2 if "--moe-router-fusion" not in command and "stock_run" in str(command) else 1
        said = log.replace("100.0", f"{100.0 * slow}")
        out.write("RuntimeError: no capture\n" if graphs else said)
        assert "--overlap-param-gather" not in command
        assert "--overlap-grad-reduce" in command
        seen.append(
            (variables.get("NVTE_USE_CUTLASS_GROUPED_GEMM"), variables["NCCL_GRAPH_REGISTER"])
        )
        return int(graphs)

    seen: list[tuple[str | None, str]] = []
    for module in (train_ep, train_run):
        monkeypatch.setattr(module, "has_engine", lambda: True)
    monkeypatch.setattr(train_run, "start", start)
    output = tmp_path / "rows.json"
    sides = ["ep_plugin", "megatron-defaults", "megatron-cutlass", "megatron-graphs"]
    words = [
        "--without",
        "overlap-param-gather",
        "--sides",
        *sides,
        "--logs",
        str(tmp_path / "logs"),
        "--output",
        str(output),
    ]
    monkeypatch.setattr(train_ep, "make_row", on_a_gpu)
    monkeypatch.setattr(sys, "argv", ["train_ep.py", "--ranks", "2", "--minutes", "1", *words])
    train_ep.main()
    out = capsys.readouterr().out
    assert "megatron-graphs bf16 not measured: it ended with 1: RuntimeError: no capture" in out
    assert (
        "Megatron bf16 as its users get it: 81920 tokens/s (without --overlap-param-gather)" in out
    )
    best = "--moe-permute-fusion --moe-router-fusion NVTE_USE_CUTLASS_GROUPED_GEMM=1"
    best += " without --overlap-param-gather"
    assert f"Megatron bf16 best: 163840 tokens/s ({best})" in out
    rows = {row["backend"]: row for row in json.loads(output.read_text())}
    assert set(rows) == {"ep_plugin", "megatron+defaults (te)", "megatron+cutlass (te)"}
    row = rows["megatron+cutlass (te)"]
    assert (row["attention"], row["switches"]) == ("FusedAttention", best)
    assert (row["gradients"], row["shape"], row["routing"]) == ("added", "gpt-20m", "natural")
    assert seen == [(None, "0"), (None, "0"), ("1", "0"), (None, "0")]
    monkeypatch.setattr(train_ep, "device_name", lambda device: "a GPU")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume"])
    train_ep.main()  # only what has no row is run again
    assert seen[4:] == [(None, "0")]


def test_a_run_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import time; print('on', flush=True); time.sleep(60)"]
    with (tmp_path / "log").open("w") as out:
        began = time.monotonic()
        assert train_run.start(words, out, dict(os.environ), 0.02) is None
    assert time.monotonic() - began < 30
    with (tmp_path / "log").open("w") as out:
        assert train_run.start([sys.executable, "-c", "raise SystemExit(3)"], out, {}, None) == 3


@pytest.mark.parametrize("name", ["two_h100_loop", "two_gpus", "layer_h100", "gemm_h100"])
def test_files_of_before_can_be_read_and_added_to(name: str) -> None:
    rows = read(ROOT / "benchmarks" / "results" / f"{name}.json")
    assert {row["gradients"] for row in rows if row["bench"] == "train"} <= {"added"}
    assert {row["gradients"] for row in rows if row["bench"] != "train"} <= {"anew"}
    assert len(merge(rows, rows)) == len(rows)
    assert all(table([row]) for row in rows if row["bench"] != "train")


def on_a_gpu(device: torch.device, *rest: Any, **fields: Any) -> dict[str, Any]:
    return {**make_row(torch.device("cpu"), *rest, **fields), "device": "a GPU"}


def test_sides_that_cannot_run_here_are_named() -> None:
    why = {
        name: train_sides.why_not(side, False, False, None)
        for name, side in train_sides.SIDES.items()
    }
    able = {name for name, reason in why.items() if not reason}
    assert able == {"ep_plugin", "graph", "graph-serial", "megatron-defaults", "megatron"}
    alone = train_sides.why_not(train_sides.SIDES["megatron-all"], False, True, None)
    assert alone == "its overlap needs experts on more than one rank"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--layouts", "xp=2"], "--layouts takes tp, pp, ep, etp"),
        (["--precision", "fp8", "--sides", "megatron"], "--precision fp8 of side megatron needs"),
        (["--without", "bf16"], "invalid choice: '--bf16'"),
        (["--micro-batch", "3"], "--batch (32) must be a multiple of --micro-batch (3) times"),
        (["--micro-batch", "0"], "--batch (32) must be a multiple of --micro-batch (0) times"),
        (["--num-layers", "1", "2", "3"], "--num-layers takes one depth or two; got 3"),
    ],
)
def test_bad_flags_of_train_ep_are_refused(
    words: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_ep.py", "--ranks", "2", *words])
    with pytest.raises(SystemExit) as ended:
        train_ep.main()
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_layer_costs_what_two_depths_differ_by() -> None:
    cost = train_ep.layer_cost({"ms": 100.0}, {"ms": 180.0}, 8, tokens=16_000, ranks=2)
    assert cost == pytest.approx(1.25)  # 10 ms a layer over 8000 tokens of a GPU


@pytest.mark.parametrize("shape", ["dsv3", "q3-30b"])
def test_both_figures_of_megatron_s_layer(shape: str) -> None:
    rows = [
        row(1, 9.0, shape=shape, backend="megatron+defaults"),
        row(1, 7.0, shape=shape, backend="megatron+cutlass", switches="A=1"),
        row(1, 1.0, shape=shape, backend="megatron+drop_and_pad"),
        row(1, 2.0, shape=shape, backend="ep_plugin"),
        row(1, 6.0, shape=shape, backend="megatron+delayed", precision="fp8"),
    ]
    assert both_figures(rows) == [
        f"layer {shape}, balanced, a GPU: Megatron bf16 as its users get it 9.00 ms "
        "(megatron+defaults); at its best 7.00 ms (A=1)",
        f"layer {shape}, balanced, a GPU: Megatron fp8 as its users get it not measured; at its "
        "best 6.00 ms (megatron+delayed)",
    ]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_megatron_s_config_has_the_settings_of_every_way(precision: Precision, ranks: int) -> None:
    config = pytest.importorskip("megatron.core.transformer.transformer_config").TransformerConfig
    known = {f.name: f for f in fields(config)}
    found = ways(precision, ranks)
    assert len({way.name for way in found}) == len(found)
    assert sum("defaults" in way.name for way in found) == 1
    for way in found:
        assert set(way.settings) <= set(known)
        assert way.drops == ("moe_expert_capacity_factor" in way.settings)
        flags = {word for word in way.switches.split() if word.startswith("--")}
        assert ("--enable-experimental" in flags) == way.experimental == ("padding" in way.name)
        flags -= {"--enable-experimental"}
        assert flags == {f"--{n.replace('_', '-')}" for n in way.settings if n != "fp8"} | (
            {"--fp8-format"} if precision == "fp8" else set()
        )


def test_the_pages_of_benchmarks_are_those_of_the_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_page.py", "--check"])
    assert bench_page.main() == 0, capsys.readouterr().out
    fewer = [each for each in bench_rows.load() if each.row["shape"] != "dsv3"]
    monkeypatch.setattr(bench_page, "load", lambda: fewer)
    assert bench_page.main() == 1
    assert "benchmarks.md" in capsys.readouterr().out


def test_every_row_says_how_it_is_repeated() -> None:
    seen, parser = set(), build_parser("bench")
    rows = {bench_rows.repeat(each.row): each for each in bench_rows.load()}
    for each in rows.values():
        words = shlex.split(bench_rows.repeat(each.row))
        words = [word for word in words if not word.startswith("NVTE_")]
        seen.add(each.row["bench"])
        if each.row["bench"] == "train":
            assert words[1] == "benchmarks/train_ep.py"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", words[1:])
                args = train_ep.parse()
            case = train_run.Case(args.layouts[0], args.depths[0], args.micro_batch[0])
            assert case.title(args) == each.row["shape"]
            assert (args.ranks, args.precision) == (each.row["ep"], [each.row["precision"]])
            continue
        args = parser.parse_args(words[words.index("bench") :])
        assert (args.bench, args.shapes) == (each.row["bench"], [each.row["shape"]])
        assert (args.precision, args.cuda_graph) == ([each.row["precision"]], each.row["graph"])
        bench._check(args)
        law.check(bench, args, words[words.index("bench") :])
    assert seen == set(bench_rows.BENCHES)


def test_a_row_of_the_loop_is_repeated_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parsed(monkeypatch, "--sequence", "4096", "--batch", "16", "--seeds", "7", "8")
    made = row(2, 1.0, shape="qwen3-30b-a3b, 4 layers, micro-batch 1", op="ep=2")
    made |= {"bench": "train", "backend": "megatron+graphs+cutlass+delayed (te)"}
    made |= {"precision": "fp8", "routing": "forced balance"}
    made |= {"run": train_ep.size_flags(args)}
    again = parsed(monkeypatch, *shlex.split(bench_rows.repeat(made))[4:])
    assert again.sides == ["megatron-graphs-cutlass"]
    for name in ("sequence", "batch", "iterations", "seeds"):
        assert getattr(again, name) == getattr(args, name)
    told = again.depths, again.micro_batch, again.fp8_recipe, again.force_balance
    assert told == ([4], [1], "delayed", True)


def test_a_picture_of_the_loop_has_each_side_at_its_best_on_any_host() -> None:
    """Routing is kept apart, a side alone is left out, and what drops rows has bars of its own."""
    pytest.importorskip("matplotlib")
    import bench_pictures

    here = {"bench": "train", "device": "a GPU", "op": "ep=2", "ep": 2}
    made = [
        row(2, 1 / speed, routing=routing, backend=backend, shape=shape, start=start)
        | {"tokens_per_second": 1000.0 * speed}
        for routing, backend, shape, speed, start in (
            ("natural", "ep_plugin", "m", 2, "a"),
            ("natural", "ep_plugin+layers", "m", 6, "a"),
            ("natural", "megatron+graphs (te)", "m", 1, "a"),
            ("natural", "megatron+graphs (te)", "m", 3, "b"),
            ("natural", "megatron+drop_and_pad (te)", "m", 4, "b"),
            ("forced balance", "ep_plugin", "m", 9, "a"),
            ("natural", "ep_plugin", "alone", 5, "a"),
        )
    ]
    figure = bench_pictures._loop([bench_rows.Found(each | here, "f.json") for each in made])
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["m\nep=2, 2 x a GPU"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    drawn = dict(zip(legend, [bar.get_width() for bar in axes.patches], strict=True))
    assert {name: width for name, width in drawn.items() if width} == {
        "ours bf16": 6,
        "Megatron bf16": 3,
        "Megatron bf16, drop-and-pad": 4,
    }


def test_no_row_of_the_loop_is_lost_where_two_machines_ran_a_case_on_one_day() -> None:
    here = {"bench": "train", "op": "ep=2", "routing": "natural"}
    made = [row(2, 1.0, backend=name) | here for name in ("ep_plugin", "megatron (te)")]
    found = [
        bench_rows.Found(each | {"start": start}, "f.json")
        for each in made
        for start in ("a" * 8, "b" * 8, None)
    ]
    by_case = bench_rows.cases(found)
    assert sorted(map(len, by_case.values())) == [2, 2, 2]
    assert all(len({each.row["start"] for each in own}) == 1 for own in by_case.values())
    assert len(bench_rows.cases(found[::3])) == 1


def test_a_start_is_told_by_a_hash(tmp_path: Path) -> None:
    boots = [tmp_path / name for name in "ab"]
    for path in boots:
        path.write_text(path.name)
    starts = [figures.this_start(path) for path in (*boots, tmp_path / "none")]
    assert starts[2] is None
    assert len(set(starts)) == 3
    assert all(len(start) == 8 for start in starts[:2] if start is not None)
    assert make_row(torch.device("cpu"), Timing(1, 1, 1))["start"] == figures.this_start()


def test_the_newest_file_of_a_card_counts_and_a_floor_is_of_its_own_card() -> None:
    old, new = row(1, 8.0), row(1, 9.0) | {"date": "9999-01-01"}
    found = [bench_rows.Found(old, "b.json"), bench_rows.Found(new, "a.json")]
    assert bench_rows.newest(found) == found[1:]
    assert found[0].floor() is None
    h100 = bench_rows.Found(old | {"device": "NVIDIA H100 80GB HBM3"}, "b.json")
    assert h100.floor() == pytest.approx(12.30, abs=0.005)


def test_what_is_foreseen_stands_beside_what_was_measured() -> None:
    where = {"dispatcher": "symm_mem", "schedule": "serial", "graph": True}
    dims = {"tokens": 8192, "topk": 4, "hidden": 7168}
    measured = row(2, 16.0, **where, exchange_ms=2.0, compute_ms=13.0, hidden_share=0.0, dims=dims)
    assert (found := forecast_errors.ratios(measured)) is not None
    assert 2.0 / found[0] == pytest.approx(16.0 / found[1] - 13.0)  # the foreseen exchange
    assert forecast_errors.ratios(measured | {"exchange_ms": None}) is None
