"""What `ep-plugin parity` makes of a run's flags: comparable, small, and legal at every layout."""

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from ep_plugin import cli
from ep_plugin.commands.parity.by_nature import set_aside
from ep_plugin.commands.parity.comparable import (
    comparable,
    expand_preset,
    value,
    values,
    without,
)
from ep_plugin.commands.parity.launch import Launcher, RunFailed
from ep_plugin.commands.parity.layouts import ONE_RANK, Layout, parse
from ep_plugin.commands.parity.sizes import check_resumes
from ep_plugin.commands.parity.tiny import default_layout, shrink
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.parser import experts_per_layer
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
        counts = (value(tiny, "--ep-experts-per-layer") or "").split(",")
        if value(given, "--ep-experts-per-layer") is not None:
            assert len(counts) == pattern.count("1")
            assert len(set(counts)) > 1  # a pyramid stays one
            assert max(map(int, counts)) == number("--num-experts")
            assert min(map(int, counts)) >= number("--moe-router-topk", 1)
            few = experts_per_layer(value(given, "--ep-experts-per-layer") or "")
            assert copies(map(int, counts)) == copies(few)  # so that these are compared, too


def copies(counts: Iterable[int]) -> bool:
    """Whether some layout has several copies of a layer's experts."""
    return any(count % layout.parallel.ep for count in counts for layout in LAYOUTS)


# what a pyramid of these numbers, at these layouts, becomes
PYRAMIDS = {
    ("2,4,8", "ep=2", "[1]*3"): "4,8,16",  # whole experts on each rank there, and here
    ("2,4,8", "ep=4", "[1]*3"): "2,4,8",  # two copies of the first layer's
    ("4*16,8*16", "ep=2", "1"): "4,8",
    ("8*16,4*16", "ep=2", "1"): "8,4",
    ("4,8,4,16,4,8", "ep=2", "1"): "16,4,8",
    ("32*10,64*2", "pp=2,ep=2", "1"): "4,4,8,8",
    ("2,4,8", "pp=2,ep=2", "[1]*3"): "4,8,16,16",
    ("4,8,16", "ep=2", "[0,1]*3"): "4,8,16",
    ("4*3", "ep=2", "1"): "4,4",
}


@pytest.mark.parametrize(("pyramid", "layout", "layers"), PYRAMIDS)
def test_a_pyramid_keeps_all_its_sizes_and_their_order(
    pyramid: str, layout: str, layers: str
) -> None:
    depth = len(experts_per_layer(pyramid)) * (2 if "0" in layers else 1)
    flags = ["--num-layers", str(depth), "--moe-layer-freq", layers, "--num-experts", "64"]
    parsed = [ONE_RANK, parse(layout)]
    tiny = shrink([*flags, "--ep-experts-per-layer", pyramid], parsed).all
    small = value(tiny, "--ep-experts-per-layer") or ""
    assert small == PYRAMIDS[pyramid, layout, layers]
    pattern = (value(tiny, "--moe-layer-freq") or "").strip("[]").split(",")
    assert len(pattern) == int(value(tiny, "--num-layers") or 0)
    assert len(pattern) % parsed[1].parallel.pp == 0
    assert pattern.count("1") == len(small.split(","))
    assert value(tiny, "--num-experts") == str(max(map(int, small.split(","))))


def test_a_pyramid_with_more_sizes_than_are_kept_is_refused() -> None:
    flags = ["--num-layers", "7", "--num-experts", "64", "--ep-experts-per-layer"]
    with pytest.raises(ConfigError, match=r"6 different numbers .* has 7; use fewer, or leave out"):
        shrink([*flags, "1,2,4,8,16,32,64"], [ONE_RANK])
    assert shrink([*flags, "2,2,4,8,16,32,64"], [ONE_RANK]).all


@pytest.mark.parametrize("layouts", [["ep=2"], ["tp=2", "pp=2"], ["tp=8,ep=8,etp=1", "dp=3"]])
def test_tiny_describes_a_whole_run_without_any_flag(layouts: list[str]) -> None:
    tiny = shrink(comparable([], 3).all, [ONE_RANK, *map(parse, layouts)]).all
    for flag in ("--lr", "--micro-batch-size", "--global-batch-size", "--num-experts", "--lr"):
        assert value(tiny, flag) is not None
    assert float(value(tiny, "--moe-aux-loss-coeff") or 0) > 0
    tp = max(parse(layout).parallel.tp for layout in layouts)
    assert int(value(tiny, "--vocab-size") or 0) % (128 * tp) == 0
    assert default_layout([], tiny=True) == "ep=2"
    assert default_layout(["--num-layers", "2"], tiny=True) == "tp=2"
    assert default_layout(["--num-experts", "2"], tiny=False) == "ep=2"


def test_a_rate_and_other_choices_of_the_user_s_stay() -> None:
    tiny = shrink(["--num-layers", "2", "--lr", "3e-3"], [ONE_RANK]).all
    assert value(tiny, "--lr") == "3e-3"
    assert value(tiny, "--num-experts") is None


# a flag that holds a size or one entry a layer -> what is left of it at 24 layers, two a stage
SHAPES = {
    "--mtp-num-layers 4": ["2"],
    "--encoder-num-layers 24": [],
    "--window-size 4096,0": ["8,0"],
    "--window-attn-skip-freq [1,0]*12": ["[1,0]"],
    "--no-rope-freq 4": ["4"],
    "--linear-num-value-heads 32": ["2"],
    "--recompute-num-layers 6": ["1"],
    "--moe-shared-expert-intermediate-size 4096": ["32"],
    "--padded-vocab-size 50304": [],
}


@pytest.mark.parametrize("given", SHAPES)
def test_every_flag_with_a_size_is_made_small(given: str) -> None:
    depth = [] if "num-layers 24" in given else ["--num-layers", "24"]
    tiny = shrink([*depth, *given.split()], [ONE_RANK]).all
    assert values(tiny, given.split()[0]) == SHAPES[given]


def test_what_cannot_be_made_small_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot shrink --hybrid-layer-pattern.*without --tiny"):
        shrink(["--hybrid-layer-pattern", "M*E"], [ONE_RANK])
    with pytest.raises(ConfigError, match=r"--moe-layer-freq must .* use --moe-layer-freq '\[1\]"):
        shrink(["--num-layers", "3", "--moe-layer-freq", "[1,0]"], [ONE_RANK])
    with pytest.raises(ConfigError, match=r"--ep-experts-per-layer must be .* use --ep-experts"):
        shrink(["--num-experts", "4", "--ep-experts-per-layer", "four"], [ONE_RANK])


ASIDE = {  # flags -> what they become at dp=2, and at tp=2
    "--moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0.1": (
        "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.1",
        None,
    ),
    "--moe-router-load-balancing-type seq_aux_loss global_aux_loss --moe-aux-loss-coeff 0.1 0.2": (
        "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.1",
        None,
    ),
    "--ep-aux-loss-scope global": ("--ep-aux-loss-scope micro_batch", None),
    "--ep-further-losses micro_batch:1,global:1 --ep-aux-loss-scope sequence": (
        "--ep-further-losses micro_batch:1 --ep-aux-loss-scope sequence",
        None,
    ),
    "--ep-further-losses micro_batch:1 --ep-aux-loss-scope global": (
        "--ep-further-losses micro_batch:1 --ep-aux-loss-scope sequence",
        None,
    ),
    "--ep-further-losses micro_batch:1,sequence:2 --ep-aux-loss-scope global": (
        "--ep-further-losses sequence:2 --ep-aux-loss-scope micro_batch",
        None,
    ),
    "--dataloader-type cyclic": ("--dataloader-type single", None),
    "--ep-second-expert random": ("--ep-second-expert threshold",) * 2,
    "--optimizer muon": (None, "--optimizer muon --muon-tp-mode duplicated"),
    "--seq-length 32 --ep-capacity-factor 1": (
        None,
        "--seq-length 32 --ep-capacity-factor 1 --ep-group-tokens 16",
    ),
    "--seq-length 32 --ep-capacity-factor 1 --ep-group-tokens 8": (None, None),
    "--seq-length long --ep-capacity-factor 1": (None, None),
}


@pytest.mark.parametrize("given", ASIDE)
@pytest.mark.parametrize(("place", "layout"), [(0, "dp=2"), (1, "tp=2,etp=2")])
def test_what_differs_by_nature_is_set_aside_where_it_differs(
    given: str, place: int, layout: str
) -> None:
    expected = ASIDE[given][place]
    left, aside = set_aside(given.split(), [ONE_RANK, parse(layout)])
    assert sorted(left) == sorted((given if expected is None else expected).split())
    assert bool(aside) == (expected is not None)


@pytest.mark.parametrize("name", ["ep_plugin", "ep_plugin.run"])
def test_what_a_run_refuses_is_a_wrong_setting_whoever_says_it(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done = subprocess.CompletedProcess([], 1, "", f"a warning\n{name}: error: no x; use y\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(ConfigError, match=r"^one rank: no x; use y$"):
        Launcher("script.py", [], tmp_path, "cpu").run(ONE_RANK, "run0")


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
    monkeypatch.setattr("ep_plugin.commands.parity.runs.compare_gradients", lambda one, other: [])
    report, script = tmp_path / "report.json", tmp_path / "script.py"
    script.touch()
    ours = ["--layouts", "ep=2", "dp=2", "--output", str(report)]
    assert cli.main(["parity", str(script), "--num-experts", "4", *ours]) == 1
    shown = capsys.readouterr().out
    assert "DID NOT FINISH" in shown
    assert "ep=2: out of memory" in shown
    layouts = json.loads(report.read_text())["layouts"]
    assert [layout["passed"] for layout in layouts] == [False, True]
    assert [layout["failure"] for layout in layouts] == ["ep=2: out of memory", None]


def test_a_vocabulary_that_is_padded_otherwise_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 entries become 256 rows at TP 2; at a layout alike, all is compared."""
    from ep_plugin.commands.parity import differences

    class Saved:
        tensors = ("embedding.word_embeddings.weight",)

        def __init__(self, rows: int) -> None:
            self.rows = rows

        def read_tensor(self, name: str) -> torch.Tensor:
            return torch.ones(self.rows, 4)

    rows = iter((128, 128, 128, 256))
    monkeypatch.setattr(differences, "open_checkpoint", lambda path: Saved(next(rows)))
    (same,) = differences.compare_gradients(Path("one"), Path("two"))
    assert same.relative == 0
    with pytest.raises(
        ConfigError, match=r"128 rows on one rank and 256 .* --padded-vocab-size 256"
    ):
        differences.compare_gradients(Path("one"), Path("two"))


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        ("ep=2", "ep=2 cannot resume the optimizer's state of one rank"),
        ("tp=2,ep=1 ep=2", "ep=2 cannot resume the optimizer's state of tp=2,ep=1"),
        ("tp=2,ep=1,etp=1", "tp=2,ep=1,etp=1 cannot resume the optimizer's state of one rank"),
        ("tp=2,ep=1 pp=2,ep=1", None),
    ],
)
def test_layouts_that_cannot_resume_one_another_are_named_before_any_run(
    names: str, wrong: str | None
) -> None:
    layouts = [parse(name) for name in names.split()]
    flags = ["--num-experts", "4"]
    check_resumes([*flags, "--use-distributed-optimizer"], layouts)
    check_resumes([*flags, "--optimizer", "muon"], layouts)
    check_resumes(["--num-layers", "4"], layouts)
    if wrong is None:
        check_resumes(flags, layouts)
        return
    with pytest.raises(ConfigError) as raised:
        check_resumes([*flags, "--optimizer", "adam"], layouts)
    assert wrong in str(raised.value)
    assert "use --use-distributed-optimizer before --resume" in str(raised.value)
