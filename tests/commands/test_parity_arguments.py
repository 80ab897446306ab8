"""What `ep-plugin parity` makes of a run's flags: comparable, small, and legal at every layout."""

import json
from pathlib import Path

import pytest

from ep_plugin import cli
from ep_plugin.commands.parity.comparable import comparable, expand_preset, value, without
from ep_plugin.commands.parity.launch import Launcher, RunFailed
from ep_plugin.commands.parity.layouts import ONE_RANK, Layout, parse
from ep_plugin.commands.parity.tiny import shrink
from ep_plugin.errors import ConfigError
from ep_plugin.presets import presets

LAYOUTS = [ONE_RANK, *map(parse, ("tp=2,ep=4", "pp=2,ep=2", "ep=3,cp=2", "tp=2,ep=2,etp=1"))]


def test_a_layout_takes_as_few_ranks_as_it_can() -> None:
    ranks = [layout.parallel.world_size for layout in LAYOUTS]
    assert ranks == [1, 8, 4, 6, 2]  # etp defaults to tp; lcm(2, 8), 2 * 2, lcm(2, 3), lcm(2, 2)
    assert parse("ep=2,dp=4").parallel.world_size == 4
    flags = parse("tp=2,ep=2,etp=1").arguments()
    assert value(flags, "--expert-tensor-parallel-size") == "1"
    assert "--sequence-parallel" in flags
    assert "--sequence-parallel" not in parse("ep=2").arguments()


def test_flags_are_taken_with_their_values_and_the_last_counts() -> None:
    given = ["--data-path", "0.3", "a", "--bf16", "--lr", "-1", "--seed=3", "--data-path=b"]
    kept, taken = without(given, ("--data-path", "--bf16"))
    assert kept == ["--lr", "-1", "--seed=3"]
    assert taken == ["--data-path", "0.3", "a", "--bf16", "--data-path=b"]
    assert value(given, "--data-path") == "b"
    assert value(given, "--seed") == "3"
    assert value(given, "--save") is None


@pytest.mark.parametrize("name", presets())
def test_every_preset_becomes_small_and_divides(name: str) -> None:
    given = comparable(expand_preset(["--ep-preset", name]), 3).all
    if value(given, "--ep-experts-per-layer") is not None:
        with pytest.raises(ConfigError, match="cannot shrink --ep-experts-per-layer"):
            shrink(given, LAYOUTS)
        return
    tiny = shrink(given, LAYOUTS).all

    def number(flag: str, default: int = 1) -> int:
        return int(value(tiny, flag) or default)

    for layout in LAYOUTS:
        degrees = layout.parallel
        assert number("--num-attention-heads") % degrees.tp == 0
        assert number("--num-query-groups", degrees.tp) % degrees.tp == 0
        assert number("--hidden-size") % (degrees.tp * degrees.expert_tp) == 0
        assert number("--num-layers") % degrees.pp == 0
        assert number("--seq-length") % (2 * degrees.cp) == 0
        assert number("--global-batch-size") % degrees.dp == 0
        if value(given, "--num-experts") is not None:
            assert number("--num-experts") % degrees.ep == 0
            assert number("--moe-ffn-hidden-size") % degrees.expert_tp == 0
    assert number("--num-attention-heads") % number("--num-query-groups") == 0
    assert number("--hidden-size") <= 256
    if value(given, "--num-experts") is not None:
        pattern = (value(tiny, "--moe-layer-freq") or "").strip("[]").split(",")
        assert len(pattern) == number("--num-layers")
        assert "1" in pattern
        assert number("--num-experts") >= 2 * number("--moe-router-topk", 2)
        groups, of = number("--moe-router-num-groups"), number("--moe-router-group-topk")
        assert number("--num-experts") % groups == 0
        assert number("--num-experts") // groups * of >= number("--moe-router-topk", 2)


def test_a_layout_that_does_not_finish_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(launcher: Launcher, layout: Layout, name: str, *flags: str) -> Path:
        if layout.parallel.ep == 2:
            raise RunFailed(f"{layout.name}: out of memory")
        (launcher.folder / name).mkdir()
        (launcher.folder / name / "scalars.json").write_text('{"1": {"lm loss": 2.0}}')
        return launcher.folder / name

    monkeypatch.setattr(Launcher, "run", run)
    monkeypatch.setattr("ep_plugin.commands.parity.compare_gradients", lambda one, other: [])
    report, script = tmp_path / "report.json", tmp_path / "script.py"
    script.touch()
    ours = ["--layouts", "ep=2", "dp=2", "--output", str(report)]
    assert cli.main(["parity", str(script), "--num-layers", "2", *ours]) == 1
    shown = capsys.readouterr().out
    assert "DID NOT FINISH" in shown
    assert "ep=2: out of memory" in shown
    layouts = json.loads(report.read_text())["layouts"]
    assert [layout["passed"] for layout in layouts] == [False, True]
    assert [layout["failure"] for layout in layouts] == ["ep=2: out of memory", None]
