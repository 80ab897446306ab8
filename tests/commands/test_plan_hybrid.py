"""`plan --hybrid-layer-pattern`: what is refused, what spreads over whom, memory by hand.

`tests/edge/test_hybrid_plan.py` compares parameters and work with Megatron's.
"""

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_plugin.cli import main
from ep_plugin.commands.plan.hybrid_plan import in_flight
from ep_plugin.commands.plan.pattern import Pattern, parse
from ep_plugin.errors import ConfigError

SIZES = (
    *("--hidden-size", "256", "--num-attention-heads", "8", "--vocab-size", "1000"),
    *("--seq-length", "128", "--position-embedding-type", "rope"),
)
EXPERTS = ("--num-experts", "8", "--disable-bias-linear", "--normalization", "RMSNorm")


def planned(capsys: pytest.CaptureFixture[str], pattern: str, *flags: str) -> dict[str, Any]:
    line = ["plan", f"--hybrid-layer-pattern={pattern}", *SIZES, *flags, "--json"]
    assert main(line) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def of(row: dict[str, Any], symbol: str) -> dict[str, Any]:
    (found,) = (held for held in row["kinds"] if held["symbol"] == symbol)
    return found  # type: ignore[no-any-return]


def test_a_layer_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """256 wide, 8 heads of 32, blocks of 1024, 8 experts of 1024, vocabulary padded to 1024."""
    found = planned(capsys, "*E-", *EXPERTS, "--gpus", "1")
    kinds = {kind["symbol"]: kind for kind in found["model"]["kinds"]}
    assert kinds["*"]["params"] == 4 * 256 * 256 + 256
    assert kinds["*"]["flops"] == 2 * 4 * 256 * 256 + 2 * 128 * 256  # half of its scores
    assert kinds["-"]["params"] == 2 * 256 * 1024 + 256
    assert kinds["E"]["params"] == 8 * 2 * 256 * 1024 + 8 * 256 + 256
    assert kinds["E"]["flops"] == 2 * (2 * 2 * 256 * 1024 + 8 * 256)  # two experts and the router
    assert kinds["output"]["flops"] == 2 * 256 * 1024
    assert found["model"]["params"] == sum(kind["params"] for kind in kinds.values())
    assert all(kind["trained_flops"] == 3 * kind["flops"] for kind in kinds.values())
    (row,) = (row for row in found["rows"] if row["ep"] == 1)
    block = of(row, "-")
    for name, each in (("weights", 2), ("gradients", 4), ("optimizer", 12)):
        assert block[name] == each * kinds["-"]["params"]
    assert block["activations"] == 128 * 2 * (2 * 256 + 2 * 1024)
    assert of(row, "output")["activations"] == 128 * 1024 * 10  # logits: bf16, and fp32 twice
    total = sum(held[name] for held in row["kinds"] for name in held if name not in (
        "symbol", "params"))  # fmt: skip
    assert row["total_gb"] == pytest.approx(total / 1e9)


def test_what_is_spread_over_whom(capsys: pytest.CaptureFixture[str]) -> None:
    one = planned(capsys, "*EM", *EXPERTS, "--gpus", "8", "--ep", "1", "8")["rows"]
    assert of(one[0], "E")["params"] - of(one[1], "E")["params"] == 7 * 2 * 256 * 1024
    assert of(one[0], "M") == of(one[1], "M")
    assert [row["edp"] for row in one] == [8, 1]
    (cut,) = planned(capsys, "*EM", *EXPERTS, "--gpus", "8", "--ep", "8", "--tp", "4")["rows"]
    whole = 256  # the norm before the layer
    assert of(cut, "M")["params"] - whole == (of(one[1], "M")["params"] - whole) // 4
    assert of(cut, "M")["activations"] < of(one[1], "M")["activations"] // 3
    again = planned(capsys, "*EM", *EXPERTS, "--gpus", "8", "--recompute")
    assert all(
        kind["trained_flops"] == (4 if kind["symbol"] in "*EM" else 3) * kind["flops"]
        for kind in again["model"]["kinds"]
    )
    assert of(again["rows"][0], "*")["activations"] == 128 * 2 * 256  # its input alone


def test_a_pyramid_and_stages(capsys: pytest.CaptureFixture[str]) -> None:
    flags = (*EXPERTS, "--ep-experts-per-layer", "2,8", "--gpus", "8", "--ep", "4")
    (row,) = planned(capsys, "*E|*E", *flags)["rows"]
    assert row["stage"] == 1  # 2 of its experts on a GPU; the other stage has 2 copies of 1
    assert of(row, "E")["params"] == 2 * 2 * 256 * 1024 + 8 * 256 + 256
    assert planned(capsys, "*-|*-|*-|*-", "--pp", "2", "--gpus", "2")["rows"][0]["ep"] == 1


def test_interleaved_stages_keep_what_a_run_of_the_schedule_keeps() -> None:
    """Forwards and backwards in Megatron's order, one by one."""
    for pp, virtual in ((2, 2), (4, 2), (2, 3), (4, 3)):
        for stage in range(pp):
            order = [(step // pp) % virtual for step in range(pp * virtual * 8)]
            back = [virtual - 1 - chunk for chunk in order]
            ahead = 2 * (pp - stage - 1) + (virtual - 1) * pp
            seen, chunks = set(), [0] * virtual
            for step, chunk in enumerate(order):
                chunks[chunk] += 1
                if step >= ahead:
                    seen.add(tuple(chunks))
                    chunks[back[step - ahead]] -= 1
                assert min(chunks) >= 0
            assert {tuple(moment) for moment in in_flight(pp, virtual, stage)} == seen
    assert in_flight(4, 1, 1) == [[3]]


WRONG = {
    "no layer": ("/*", "has no layer before the first /"),
    "another symbol": ("*X", "has 'X'; use *, +, M, G, -, E"),
    "sparse attention": ("DE", "has D, DeepSeek's sparse attention, which plan cannot count"),
    "a cut in prediction": ("*E/*|-", "has '|' behind /"),
    "depths that differ": ("*E/*-/*", "use --hybrid-layer-pattern '*E/*-/*-'"),
    "no prediction": ("*E/", "has no layers behind /; use --hybrid-layer-pattern '*E'"),
    "two attentions": ("*+", "has one kind of attention; use --hybrid-layer-pattern '**'"),
    "experts in prediction": ("*E/*E", "use --hybrid-layer-pattern '*E/*-'"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_patterns_that_are_refused(mistake: str) -> None:
    text, message = WRONG[mistake]
    with pytest.raises(ConfigError) as raised:
        parse(text)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("*E --preset mixtral-8x7b", "and --preset mixtral-8x7b are two models"),
        ("*E", "needs --num-experts; use the one of your training run"),
        ("*-", "--num-experts is for E, which --hybrid-layer-pattern *- does not have"),
        ("*- --mamba-num-heads 8", "--mamba-num-heads is for M, which"),
        ("*- --num-query-groups 2", "beside --group-query-attention alone"),
        ("*- --ep 2", "--ep is for experts, and --hybrid-layer-pattern *- has no E"),
        ("*- --tokens 64", "use --micro-batch N and --seq-length N"),
        ("*- --ep-teacher mixtral-8x7b", "teaches a published GPT, and no --preset is named"),
        ("*-- --pp 2", "must divide the 3 layers of --hybrid-layer-pattern"),
        ("*-|*- --pp 1", "must divide the 2 segments of"),
        ("G- --linear-num-value-heads 24", "--linear-num-key-heads (16) must divide"),
        ("*E --num-experts 8 --etp 2", "none that have biases; use --disable-bias-linear with it"),
        ("*E --num-experts 8 --ep-experts-per-layer 4", "(8) the largest; got '4'; use --ep-exp"),
        (
            "*E --num-experts 8 --ep-experts-per-layer 4*9999999999",
            "must be numbers of experts for",
        ),
        ("*E --num-experts 8 --moe-router-topk 9", "use --moe-router-topk 8"),
    ],
)
def test_mistakes_are_one_sentence(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern, *flags = line.split()
    if message.startswith("--num-experts is for E"):
        flags = ["--num-experts", "8"]
    assert main(["plan", f"--hybrid-layer-pattern={pattern}", *SIZES, *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_sizes_without_a_pattern_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--hidden-size", "64"]) == 2
    assert "there is no pattern of one; use --hybrid-layer-pattern" in capsys.readouterr().err


@given(st.text("*+MGDE-|/x", max_size=12), st.integers(0, 2**30))
@settings(deadline=None, max_examples=60)
def test_any_pattern_is_read_or_refused(text: str, seed: int) -> None:
    """A pattern that is read has the layers that were typed, in order, on any number of stages."""
    try:
        found = parse(text)
    except ConfigError:
        return
    assert isinstance(found, Pattern)
    decoder, *predicting = text.split("/")
    assert found.decoder == decoder.replace("|", "")
    assert (found.predicting * found.depths) == "".join(predicting)
    pp = random.Random(seed).randint(1, 8)
    if found.can_be_cut(pp):
        cut = found.cut(pp)
        rows = (cut[stage][virtual] for virtual in range(len(cut[0])) for stage in range(pp))
        assert "".join(rows) == found.decoder


def test_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["plan", "--hybrid-layer-pattern=*E|M-", *SIZES, *EXPERTS, "--gpu-gb", "40"]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert "fits 40 GB" in said
    assert "those of M have not been measured" in said
    for name in ("* attention", "M Mamba", "- dense block", "E experts", "the whole model"):
        assert f"\n{name} " in said
    assert "one GPU of stage 0 at ep 1:" in said
