"""`ep-plugin bench` runs whole on the CPU; floors are the published ones; routings are as asked."""

import json
import re
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ep_plugin.cli import main
from ep_plugin.commands import bench as command
from ep_plugin.commands.bench import contest, ours, rounds, which_flags, whole_layer
from ep_plugin.commands.bench.accumulate import train_step
from ep_plugin.commands.bench.case import (
    ROUTINGS,
    Case,
    Contender,
    Makers,
    make_case,
    reference,
    relative_error,
)
from ep_plugin.commands.bench.contest import Contest
from ep_plugin.commands.bench.figures import EMPTY, Row, make_row, table
from ep_plugin.commands.bench.floors import H100, Precision
from ep_plugin.commands.bench.measure import Taken, timing
from ep_plugin.commands.bench.peers import torch as torch_peer
from ep_plugin.commands.bench.rounds import errors
from ep_plugin.commands.bench.shapes import SHAPES, Shape
from ep_plugin.moe.experts import experts

PACKAGES = {
    "megatron": "transformer_engine",
    "sonicmoe": "sonicmoe",
    "liger": "liger_kernel",
    "veomni": "veomni",
    "torchtitan": "torchtitan",
    "deepspeed": "deepspeed",
    "deepgemm": "deep_gemm",
    "transformer_engine": "transformer_engine",
}
KEYS = {
    *("bench", "shape", "backend", "precision", "routing", "ep", "ms", "fwd_ms", "floor_ms"),
    *("saved_mib", "device", "versions", "date"),
}
ADDING = ("ep_plugin+add_wgrad", "ep_plugin+rowwise", "ep_plugin+blockwise")  # to fp32 totals
FAST = ["--repeats", "3", "--warm", "1"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "default_device", lambda: CPU)


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    assert main(["bench", *arguments, *FAST, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    for row in rows:
        assert set(EMPTY) | KEYS <= set(row)
        if row["bench"] == "layer":
            assert row["rates"] == H100.facts()
        assert row["ms"] > 0
        assert row["floor_ms"] > 0
        assert (row["device"], row["ep"]) == ("cpu", 1)
        assert row["versions"]["torch"] == torch.__version__
    return rows


def test_what_peers_print_is_no_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = command._measure

    def noisy(*arguments: Any) -> Any:
        print("a package says what device it found")
        return measure(*arguments)

    monkeypatch.setattr(command, "_measure", noisy)
    bench(capsys, "gemm", "--backends", "ep_plugin", "--precision", "bf16")


def test_layer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output, plot = tmp_path / "results" / "layer.json", tmp_path / "layer.png"
    rows = bench(capsys, "layer", "--output", str(output), "--plot", str(plot))
    assert json.loads(output.read_text()) == rows
    assert {row["gradients"] for row in rows} == {"anew", "added"}
    by_name = {
        (row["backend"], row["precision"]): row for row in rows if row["gradients"] == "added"
    }
    assert {("ep_plugin", "bf16"), ("ep_plugin+save_fp8", "bf16"), ("torch", "bf16")} <= set(
        by_name
    )
    assert ("ep_plugin+rowwise", "fp8") in by_name
    for (backend, precision), row in by_name.items():
        rounded = precision == "fp8" or backend.endswith("save_fp8")
        limit = 0.09 if rounded else 0.01  # an ideal quantiser's is 0.065
        assert row["error"] < limit
        assert row["grad_error"] < limit
        assert row["fwd_ms"] > 0
        assert (row["weight_quant_ms"] > 0) == (precision == "fp8")
    width, height = struct.unpack(">II", plot.read_bytes()[16:24])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert min(width, height) > 300


def test_gemm(capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench(capsys, "gemm")
    backends = {(row["backend"], row["precision"]) for row in rows}
    assert {
        *(("ep_plugin+loop", "bf16"), ("ep_plugin+torch_grouped", "bf16"), ("torch", "bf16")),
        ("ep_plugin+rowwise", "fp8"),
    } <= backends
    operations = {f"{w} {d}" for w in ("fc1", "fc2") for d in ("forward", "dgrad", "wgrad")}
    for backend, precision in backends:
        own = [r for r in rows if (r["backend"], r["precision"]) == (backend, precision)]
        added = {row["op"] for row in own if row["gradients"] == "added"}
        assert added == ({"fc1 wgrad", "fc2 wgrad"} if backend in ADDING else set())
        anew = {row["op"] for row in own if row["gradients"] == "anew"}
        assert anew == (set() if backend == "ep_plugin+add_wgrad" else operations)
        assert all(row["error"] < (0.005 if precision == "bf16" else 0.045) for row in own)


def test_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench(capsys, "kernels")
    operations = {str(row["op"]).partition(",")[0].partition(" ")[0] for row in rows}
    assert operations == {
        *("route", "add_gate", "sort", "spread", "quantise", "activate", "activate_backward"),
        *("transpose_rows", "sum_rows", "quantize_weight"),
        *("quantize_blocks", "transpose_blocks", "quantize_weight_blocks"),
    }
    shape = SHAPES["tiny"]
    (spread,) = (row for row in rows if row["op"] == "spread")
    moved = (shape.tokens + shape.rows) * shape.hidden * 2  # and the places, int64 on the CPU
    counted = spread["gbps"] * spread["ms"] * 1e6
    assert moved < counted < 1.1 * moved


def test_what_fits_into_no_round_with_others_has_one_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["layer", "--gradients", "added"]

    def names(rows: list[dict[str, object]]) -> list[tuple[object, ...]]:
        return [(row["backend"], row["precision"], row["gradients"]) for row in rows]

    together = names(bench(capsys, *arguments))
    held: list[int] = []
    made = whole_layer._measure_round

    def note(contest: Contest, case: Case, contenders: list[Contender]) -> list[Row]:
        held.append(len(contenders))
        return made(contest, case, contenders)

    monkeypatch.setattr(whole_layer, "_measure_round", note)
    monkeypatch.setattr(rounds, "_crowded", lambda _: True)
    assert names(bench(capsys, *arguments)) == together
    assert len(held) > 3
    assert set(held) == {1}


def test_a_shape_that_is_measured_is_not_made_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["layer", "--resume", "--output", str(tmp_path / "rows.json")]
    first = bench(capsys, *arguments)

    def not_again(*_: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(rounds, "ready", not_again)
    assert bench(capsys, *arguments) == first


def test_a_peer_that_computes_another_layer_is_named_and_not_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = torch_peer.build

    def doubled(case: Case, precision: Precision) -> Makers:
        def make() -> Contender:
            contender = right(case, precision)["torch"]()
            forward = contender.forward
            return replace(contender, forward=lambda tokens: 2 * forward(tokens))

        return {"torch": make}

    monkeypatch.setattr(torch_peer, "build", doubled)
    assert main(["bench", "layer", "--precision", "bf16", *FAST]) == 0
    told = capsys.readouterr().out
    assert "not measured: torch (bf16): ValueError: it computes another layer" in told
    assert not re.search(r"^  torch ", told, re.MULTILINE)


def test_resume_keeps_what_is_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    arguments = ["layer", "--precision", "bf16", "--gradients", "anew", "--output", str(output)]
    first = bench(capsys, *arguments, "--backends", "torch")
    resumed = bench(capsys, *arguments, "--resume", "--backends", "torch", "ep_plugin")
    assert [row["backend"] for row in resumed] == ["torch", "ep_plugin", "ep_plugin+save_fp8"]
    assert resumed[0] == first[0]
    assert bench(capsys, *arguments, "--resume") == resumed
    replaced = bench(capsys, *arguments, "--backends", "torch")
    kept = json.loads(output.read_text())
    assert kept == [replaced[0], *resumed[1:]]
    assert replaced[0]["ms"] != first[0]["ms"]


def test_rows_of_other_sources_that_are_kept_are_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "rows.json"
    words = ["layer", "--precision", "bf16", "--gradients", "anew", "--output", str(output)]
    rows = bench(capsys, *words, "--backends", "torch")
    of_these = rows[0]["versions"]
    for state, said in (({"ep-plugin": "0.1.0"}, True), ({}, True), (3, True), (of_these, False)):
        rows[0]["versions"] = state
        output.write_text(json.dumps(rows))
        assert main(["bench", *words, "--backends", "torch", "--resume", *FAST]) == 0
        about = f"not measured: 1 of the rows that --resume kept of {output}: sources of ep_plugin"
        assert (about in capsys.readouterr().out) == said


def test_rows_are_kept_as_they_come(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, measure = tmp_path / "rows.json", whole_layer.measure
    kept = []

    def cut(*arguments: Any) -> Any:
        for row in measure(*arguments):
            yield row
            kept.append(row)
            if len(kept) == 2:
                raise KeyboardInterrupt

    monkeypatch.setitem(command.BENCHES, "layer", cut)
    words = ["layer", "--precision", "bf16", "--output", str(output)]
    assert main(["bench", *words, *FAST]) == 130
    capsys.readouterr()
    assert json.loads(output.read_text()) == json.loads(json.dumps(kept))
    monkeypatch.setitem(command.BENCHES, "layer", measure)
    assert bench(capsys, *words, "--resume")[:2] == kept


@pytest.mark.parametrize("left", ["torch", "ep_plugin"])
def test_a_backend_is_left_out(left: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["layer", "--precision", "bf16", "--gradients", "anew"]
    whole = bench(capsys, *words)
    rows = bench(capsys, *words, "--skip", left)
    names = [str(row["backend"]) for row in whole]
    assert [row["backend"] for row in rows] == [n for n in names if n.partition("+")[0] != left]


@pytest.mark.parametrize("name", contest.INSTALL)
def test_absent_peers_are_named(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    monkeypatch.delitem(sys.modules, f"ep_plugin.commands.bench.peers.{name}", raising=False)
    words = ["bench", "gemm" if name in ("deepgemm", "transformer_engine") else "layer", *FAST]
    assert main(words) == 0
    start = f"not measured: {name} (bf16, fp8): {name} needs "
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith(start))
    assert PACKAGES[name] in line
    assert line.endswith("run " + contest.INSTALL[name])
    assert main([*words, "--backends", name]) == 2
    assert line.partition(": ")[2].partition(": ")[2] in capsys.readouterr().err


@pytest.mark.parametrize("name", ["torchtitan", "deepspeed"])
def test_a_peer_that_runs_on_the_cpu_computes_the_layer(name: str) -> None:
    pytest.importorskip(PACKAGES[name])
    case = make_case(SHAPES["tiny"], "balanced", CPU)
    for make in contest.peer(name)(case, "bf16").values():
        contender = make()
        train_step(case, contender, "added")(0)
        assert max(errors(case, contender, reference(case)).values()) < 0.01
    assert contest.peer(name)(case, "fp8") == {}


def test_torch_whole_in_one_graph_computes_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def as_it_is(function: object, **options: object) -> object:
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", as_it_is)
    case = make_case(SHAPES["tiny"], "balanced", CPU)
    contender = torch_peer._bf16(case, whole=True)
    assert asked == [{"fullgraph": True, "dynamic": False}]
    assert max(errors(case, contender, reference(case)).values()) < 0.01


@pytest.mark.parametrize(("bench", "name"), [("layer", "torch"), ("gemm", "grouped_mm")])
def test_a_peer_that_needs_a_gpu_is_named(
    bench: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", bench, *FAST]) == 0
    assert f"not measured: {name} (fp8): torch fp8 needs a CUDA device" in capsys.readouterr().out


def test_a_run_that_measures_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(command.BENCHES, "gemm", lambda *_: [])
    assert main(["bench", "gemm", *FAST]) == 2


def test_a_peer_that_breaks_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel\nand a trace")

    monkeypatch.setattr(torch_peer, "build", broken)
    assert main(["bench", "layer", *FAST, "--precision", "bf16"]) == 0
    assert "not measured: torch (bf16): RuntimeError: no kernel\n" in capsys.readouterr().out
    words = ["bench", "layer", *FAST, "--precision", "bf16", "--backends", "torch", "ep_plugin"]
    assert main(words) == 0
    assert "not measured: torch (bf16): RuntimeError: no kernel\n" in capsys.readouterr().out
    assert main(words[:-1]) == 2


def test_a_recipe_that_cannot_take_a_shape_leaves_the_others_their_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that do not start at multiples of 16 bytes: by blocks there are products, padded."""
    odd = Shape("odd", tokens=64, hidden=64, ffn=72, experts=4, topk=2)
    monkeypatch.setitem(SHAPES, "tiny", odd)
    monkeypatch.setattr(command, "TINY", odd)
    for words in ([], ["--backends", "ep_plugin"]):
        assert main(["bench", "layer", *FAST, "--precision", "fp8", *words]) == 0
        out = capsys.readouterr().out
        assert re.search(r"not measured: ep_plugin\+rowwise \(fp8\): .* multiple of 16", out), out
        assert "ep_plugin+blockwise" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["all"], "BENCH must be one of layer, gemm, kernels, overlap; got 'all'"),
        (["gemm", "--shapes", "huge"], "--shapes must be among dsv3, .* tiny; got 'huge'"),
        (["layer", "--backends", "apex"], "--backends must be among ep_plugin, torch, .*'apex'"),
        (
            ["kernels", "--backends", "torch"],
            "--backends has no choice in bench kernels",
        ),
        (["layer", "--backends", "liger"], "liger needs .*; run .*"),
        (["layer", "--precision", "fp4"], "--precision must be one of bf16, fp8; got 'fp4'"),
        (["layer", "--routing", "flat"], "--routing must be one of balanced, .*; got 'flat'"),
        (["layer", "--repeats", "0"], "--repeats must be at least 1; got 0; use --repeats 1"),
        (["layer", "--gradients", "kept"], "--gradients must be one of anew, added; got 'kept'"),
        (["gemm", "--explain"], "--explain is for layer; got gemm; use bench layer --explain"),
        (["layer", "--explain", "--json"], "--json is for a run that measures, .* --explain"),
        (["kernels", "--gradients", "anew"], "--gradients has no choice in bench kernels"),
        (["layer", "--resume"], "--resume needs --output, .*"),
        (["layer", "--skip", "apex"], "--skip must be among ep_plugin, torch, .*'apex'; use .*"),
        (["kernels", "--skip", "ep_plugin"], "--skip has nothing to leave out: bench kernels .*"),
        (
            ["layer", "--skip", "torch", "--backends", "ep_plugin"],
            "--skip leaves backends out of all there are, and --backends names some; .*",
        ),
        (
            ["gemm", "--skip", *which_flags.BACKENDS["gemm"]],
            "--skip leaves out all that bench gemm has; use --skip ep_plugin",
        ),
        (["gemm", "--cuda-graph"], "--cuda-graph is for layer and overlap; got gemm; use .*"),
        (["layer", "--cuda-graph"], "--cuda-graph needs a CUDA device; this is cpu; use .*"),
        (["layer", "--output", "bad.json"], "bad.json cannot be read .*; use another --output"),
    ],
)
def test_bad_input_is_refused(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("{")
    assert main(["bench", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ep-plugin bench: error: ")
    assert re.search(sentence, said)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", [SHAPES["tiny"], Shape("many", 512, 8, 256, 32, 64)])
def test_every_router_chooses_what_was_planted(routing: str, shape: Shape) -> None:
    case = make_case(shape, routing, CPU)
    for choices, tokens in zip(case.choices, case.tokens, strict=True):
        wanted = choices.sort(dim=1).values
        assert torch.equal(wanted[:, :-1] == wanted[:, 1:], torch.zeros_like(wanted[:, 1:]).bool())
        for logits in (tokens @ case.router.T, tokens.float() @ case.router.float().T):
            assert torch.equal(logits.topk(shape.topk, dim=1).indices.sort(dim=1).values, wanted)
    counts = torch.bincount(case.choices[0].flatten(), minlength=shape.experts)
    if routing == "one_empty":
        assert (counts == 0).tolist() == [False] * (shape.experts - 1) + [True]
    if routing == "half":
        assert int(counts[0]) == shape.tokens
        assert case.largest_share() == 1 / shape.topk
    if routing in ("zipf", "zipf1.2", "recorded"):
        assert int(counts[0]) == int(counts.max()) > 2 * int(counts[-1])


def test_the_reference_is_the_layer_token_by_token() -> None:
    case = make_case(SHAPES["tiny"], "balanced", CPU)
    output, grad = reference(case, num_tokens=2)
    for token in range(2):
        row = case.tokens[0][token].detach().double().requires_grad_()
        values, experts = (row @ case.router.double().T).topk(2)
        total = torch.zeros(128, dtype=torch.float64)
        for prob, expert in zip(values.softmax(dim=0), experts.tolist(), strict=True):
            fc1, fc2 = case.fc1[expert].double(), case.fc2[expert].double()
            total = total + prob * (fc2 @ (F.silu(fc1[:128] @ row) * (fc1[128:] @ row)))
        total.backward(case.grads[0][token].double())
        assert relative_error(output[token], total.detach()) < 1e-5
        assert row.grad is not None
        assert relative_error(grad[token], row.grad) < 1e-5


def multiply_scaled(left: Tensor, right: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """What torch's scaled grouped product does on a GPU, in fp32; as strict about multiples."""
    spans = list(zip([0, *ends.tolist()], ends.tolist(), strict=False))
    if right.dim() == 3:
        parts = [
            (left[s:e].float() * a[s:e, None]) @ (right[i].float() * b[i])
            for i, (s, e) in enumerate(spans)
        ]
        return torch.cat(parts).bfloat16()
    assert all(end % 16 == 0 for end in ends.tolist())
    a, b = a.view(len(spans), -1, 1), b.view(len(spans), 1, -1)
    products = [left[:, s:e].float() @ right[s:e].float() for s, e in spans]
    return (torch.stack(products) * a * b).bfloat16()


@pytest.mark.parametrize("routing", ["balanced", "one_empty"])
def test_the_fp8_peer_in_torch_computes_the_layer(
    routing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_peer, "scaled_product", multiply_scaled)
    monkeypatch.setattr(torch_peer, "require_cuda", lambda *_: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = make_case(SHAPES["tiny"], routing, CPU)
    contender = torch_peer.build(case, "fp8")["torch+rowwise"]()
    found = errors(case, contender, reference(case))
    assert max(found.values()) < 0.09
    plain = torch_peer.build(case, "bf16")["torch"]()
    grads = []
    for layer in (contender, plain):
        torch.autograd.backward(layer.forward(case.tokens[0]), case.grads[0])
        grads.append([parameter.grad for parameter in layer.parameters])
    for mine, theirs in zip(*grads, strict=True):
        assert mine is not None
        assert theirs is not None
        assert relative_error(mine, theirs) < 0.09


def test_weights_are_quantised_once_for_all_steps() -> None:
    case = make_case(SHAPES["tiny"], "balanced", CPU)
    contender = ours.build(case, "fp8")["ep_plugin+rowwise"]()
    assert contender.quantize is not None
    kept = contender.quantize()
    contender.forward(case.tokens[0])
    layer = contender.forward
    assert layer.experts._weights8 is kept  # type: ignore[attr-defined]
    assert contender.quantize() is not kept


def test_a_graph_takes_no_e4m3_weights_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(SHAPES["tiny"], "balanced", CPU)
    layer = ours.build(case, "fp8")["ep_plugin+rowwise"]().forward.experts  # type: ignore[attr-defined]
    layer.weights_change_every_call = False
    launched = layer.weights8()
    assert layer.weights8() is launched
    monkeypatch.setattr(experts, "captured", lambda tensor: True)
    inside = layer.weights8()
    assert inside is not launched  # a replay makes these anew
    assert layer.weights8() is inside  # as the graphs of later micro-batches do not
    layer.is_first_microbatch = True
    assert layer.weights8() is not inside


def test_median_and_deciles() -> None:
    found = timing([Taken(float(value), None) for value in range(100, -1, -1)])
    assert (found.median, found.p10, found.p90, found.host) == (50.0, 10.0, 90.0, None)


def test_the_host_s_time_has_a_median_of_its_own_and_a_place_in_the_row() -> None:
    """As a GPU's calls have it: they return long before the GPU is done."""
    found = timing([Taken(9.0, 1.0), Taken(5.0, 3.0), Taken(7.0, 2.0)])
    assert (found.median, found.host) == (7.0, 2.0)
    whole = whole_layer.with_weights(found, 8.0)
    assert (whole.median, whole.host) == (8.0, 2.0)
    row = make_row(CPU, whole, bench="layer", shape="tiny", backend="torch", host_ms=whole.host)
    row |= {"device": "a GPU", "floor_ms": 1.0, "precision": "bf16", "routing": "balanced"}
    assert "2.00 ms host" in table([row])


def test_every_peer_has_a_way_to_install_it() -> None:
    folder = Path(torch_peer.__file__).parent
    names = {path.stem for path in folder.glob("[!_]*.py")}
    assert names == {*contest.INSTALL, "torch", "grouped_mm"}
