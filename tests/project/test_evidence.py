"""recipes/evidence: figures from results, what is left to run, and the page that shows them."""

import importlib
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_plugin.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import modules of the folder by name."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "evidence"))
    return importlib.import_module


def result(evidence: Any, variant: Any, curve: list[list[float]], seed: int = 1) -> Any:
    size = evidence("_model").SIZES["cpu"]
    return variant.described(size) | {
        "seed": seed,
        "parameters": 2_000_000,
        "tokens": curve[-1][0],
        "epochs": 0.5,
        "heldout": curve,
        "step_seconds": 0.1,
        "beside": 1,
        "experts": {},
        "corpus": {"sha256": "ab" * 32, "distinct_tokens": 10, "heldout_tokens": 1},
        "hardware": "none",
        "date": "2026-11-29",
        "versions": {},
    }


def test_a_loss_is_reached_between_two_points(evidence: Any) -> None:
    reached = evidence("_show").reached
    curve = [(10.0, 5.0), (20.0, 4.0), (30.0, 3.0)]
    assert reached(curve, 3.5) == 25.0
    assert reached(curve, 6.0) == 10.0
    assert reached(curve, 2.0) is None
    assert reached([], 2.0) is None


CURVES = st.lists(st.floats(1.0, 9.0), min_size=2, max_size=8)


@given(fast=CURVES, slow=CURVES)
def test_sooner_is_of_curves_that_stay_below(fast: list[float], slow: list[float]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "recipes" / "evidence"))
        show = importlib.import_module("_show")
    runs = [[{"heldout": [[i + 1, y] for i, y in enumerate(curve)]}] for curve in (fast, slow)]
    assert show.sooner(runs[1], runs[1]) == 1.0
    times = show.sooner(*runs)
    assert (times is None) == (fast[-1] > slow[-1]), "a curve that ends above is never there"
    if times is not None:
        start = show.reached(show.mean_curve(runs[0]), slow[-1])
        assert all(y <= slow[-1] for i, y in enumerate(fast) if i + 1 > start)


def test_seeds_have_a_standard_error(evidence: Any) -> None:
    runs = [{"heldout": [[1, loss]]} for loss in (4.0, 4.2, 4.4)]
    assert evidence("_show").loss_text(runs) == "4.2000 ± 0.1155"
    assert evidence("_show").loss_text(runs[:1]) == "4.0000"


def test_the_table_says_how_much_sooner(evidence: Any, tmp_path: Path) -> None:
    experts = evidence("experts")
    variants = {variant.name: variant for variant in experts.VARIANTS}
    kept = {
        "dense-seed1": result(evidence, variants["dense"], [[10, 5.0], [20, 4.0], [40, 3.0]]),
        "top1-e8-seed1": result(evidence, variants["top1-e8"], [[10, 4.0], [20, 3.0], [40, 2.0]]),
    }
    row = next(
        line for line in experts.CLAIM.table(kept).splitlines() if line.startswith("| 8 experts")
    )
    assert "2.0000 | 1/2.00 | 100.0 |" in row
    experts.CLAIM.plot(kept, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_what_is_kept_is_not_run_again_and_must_be_the_same(evidence: Any, tmp_path: Path) -> None:
    sweep, grown = evidence("_sweep"), evidence("grown")
    size = evidence("_model").SIZES["cpu"]
    variants = list(grown.VARIANTS)
    assert len(sweep.left(variants, [1, 2], size, {}, tmp_path)) == 2 * len(variants)
    start = variants[0]
    kept = {f"{start.name}-seed1": result(evidence, start, [[1, 1.0]])}
    todo = [variant.name for variant, _ in sweep.left(variants, [1], size, kept, tmp_path)]
    assert todo[0] == start.name, "its checkpoint is not on this machine, and others need it"
    (tmp_path / f"{start.name}-seed1" / "checkpoint").mkdir(parents=True)
    assert start not in [v for v, _ in sweep.left(variants, [1], size, kept, tmp_path)]
    kept[f"{start.name}-seed1"]["flags"] = "--lr 1"
    with pytest.raises(ConfigError, match="kept with other settings"):
        sweep.left(variants, [1], size, kept, tmp_path)


def test_one_name_is_one_run_in_every_claim(evidence: Any) -> None:
    found: dict[str, Any] = {}
    for module in evidence("several").MODULES:
        for variant in module.CLAIM.variants:
            assert found.setdefault(variant.name, variant) == variant


def test_the_page_shows_the_results_that_are_kept(evidence: Any) -> None:
    assert (ROOT / "docs" / "evidence.md").read_text() == evidence("page").page()


def test_a_gpu_is_asked_for_before_anything_runs(
    evidence: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    sweep, experts = evidence("_sweep"), evidence("experts")
    assert sweep.main([experts.CLAIM], "experts.py", ["--size", "gpu", "--only", "dense"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_text_of_ones_own_in_equal_shares(
    evidence: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = evidence("corpus")
    for name, files, words in (("books", 40, 400), ("laws", 40, 400), ("few", 4, 100)):
        (tmp_path / name / "below").mkdir(parents=True)
        for place in range(files):
            text = " ".join(f"{name}{place}x{word}" for word in range(words))
            (tmp_path / name / "below" / f"{place}.md").write_text(text)
    (tmp_path / "laws" / "again.md").write_bytes(
        (tmp_path / "books" / "below" / "1.md").read_bytes()
    )
    monkeypatch.setattr(corpus, "HELD_OUT", {"heldout": 3000, "heldout_small": 900})
    folders = [tmp_path / name for name in ("books", "laws", "few")]
    sizes = {**corpus.HELD_OUT, "train": 60_000}
    parts, sources = corpus.shared(folders, sizes)
    held = {name: sum(len(t) for t in parts["heldout"] if t.startswith(name)) for name in sources}
    assert held["books"] == held["laws"] == 1000
    assert sum(len(text) for text in parts["heldout"]) == 3000, "files of few are shorter: two"
    firsts = {text.split()[0] for text in parts["heldout"] + parts["heldout_small"]}
    assert not firsts & {text.split()[0] for text in parts["train"]}
    trained = {name: said["bytes"] for name, said in sources.items()}
    few = sum(path.stat().st_size for path in (tmp_path / "few" / "below").iterdir())
    assert trained["few"] < few, "what it has is less than a share: all but the held-out files"
    assert sum(trained.values()) == sum(len(text.encode()) for text in parts["train"])
    assert abs(trained["books"] - trained["laws"]) < 2 * 400 * len("books39x399 ")
    assert 60_000 <= sum(trained.values()) < 60_000 + 3 * 400 * len("books39x399 ")
    contents = [text for part in parts.values() for text in part]
    assert len(set(contents)) == len(contents)
    with pytest.raises(ConfigError, match="use --megabytes 0"):
        corpus.shared(folders, sizes | {"train": 10_000_000})
    with pytest.raises(ConfigError, match="stands there twice"):
        corpus.shared([folders[0], folders[0]], sizes)


def test_shares_are_equal_but_for_those_that_have_less(evidence: Any) -> None:
    assert evidence("corpus").shares({"a": 100, "b": 3, "c": 20}, 60) == {"a": 37, "b": 3, "c": 20}


def losses(evidence: Any, module: str, found: dict[str, list[float]]) -> dict[str, Any]:
    """Return results of a claim's variants with these last losses, one a seed."""
    variants = {variant.name: variant for variant in evidence(module).VARIANTS}
    return {
        f"{name}-seed{seed}": result(evidence, variants[name], [[10, 9.0], [20, loss]], seed)
        for name, values in found.items()
        for seed, loss in enumerate(values, 1)
    }


@pytest.mark.parametrize(
    ("fp32", "bf16", "said"),
    [
        ([3.0], [3.1], "supports the claim"),
        ([3.1], [3.0], "contradicts the claim"),
        ([3.0], [3.01], "cannot tell: differences are below the noise, or of one round"),
        ([3.0], [], "cannot tell: not run"),
        ([3.000, 3.001], [3.010, 3.011], "supports the claim"),
        ([3.0, 3.2], [3.1, 3.3], "cannot tell: differences are below the noise, or of one round"),
    ],
)
def test_what_results_say_of_a_claim(
    evidence: Any, fp32: list[float], bf16: list[float], said: str
) -> None:
    claim = evidence("router_dtype").CLAIM
    kept = losses(evidence, "router_dtype", {"router-fp32": fp32, "router-bf16": bf16})
    assert f"What was seen **{said}**." in claim.shown(kept)


def test_a_claim_of_several_comparisons(evidence: Any) -> None:
    claim = evidence("experts").CLAIM
    names = ["dense", *(f"top1-e{2**i}" for i in range(1, 7))]
    falling = {name: [5.0 - 0.3 * place] for place, name in enumerate(names)}
    shown = claim.shown(losses(evidence, "experts", falling))
    assert "and in part contradicts the claim" in shown, "8 experts are not sooner by half"
    assert "8 experts at the final loss of dense after 1/1.5 of the tokens: 1/1.10" in shown
    shown = claim.shown(losses(evidence, "experts", {**falling, "top1-e8": [], "top1-e64": []}))
    assert "supports the claim as far as it can tell" in shown
    assert "Not run: 8 experts, 64 experts.\n" in shown
    assert "- not run: 6 of 9 comparisons" in shown
    assert "| 8 experts" not in shown


def test_bytes_of_a_rank_are_held_against_the_rule(evidence: Any, tmp_path: Path) -> None:
    module = evidence("rank_bytes")
    kept = losses(evidence, "rank_bytes", {"bytes-ep1": [1.0], "bytes-ep2": [1.0]})
    for ep in (1, 2):
        dense = {"parameters": 10, "parameter_bytes": 20, "optimizer_bytes": 120}
        experts = {name: 64 * number // ep for name, number in dense.items()}
        hold = {"dense": dense, "experts": experts}
        kept[f"bytes-ep{ep}-seed1"]["ranks_hold"] = [hold] * 4
    shown = module.CLAIM.shown(kept)
    assert "| 2 | 330 | 660 | 3,960 | counted on 4 ranks |" in shown
    assert "| 64 | 20 | 40 | 240 | computed |" in shown
    assert "supports the claim as far as it can tell" in shown, "EP 4 was not counted"
    module.CLAIM.plot(kept, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    other = {"dense": dense, "experts": experts | {"optimizer_bytes": 1}}
    kept["bytes-ep2-seed1"]["ranks_hold"] = [hold] * 3 + [other]
    assert "contradicts the claim" in module.CLAIM.shown(kept)


def test_step_times_are_ratios_of_one_round(evidence: Any, tmp_path: Path) -> None:
    module = evidence("step_time")
    kept = losses(evidence, "step_time", {"step-dense": [1.0] * 2, "step-e8": [1.0] * 2})
    for key, seconds in {"dense-seed1": 0.1, "e8-seed1": 0.11, "dense-seed2": 0.2}.items():
        kept[f"step-{key}"]["step_seconds"] = seconds
    kept["step-e8-seed2"]["step_seconds"] = 0.3
    assert module.ratios(kept, "step-e8") == pytest.approx([1.1, 1.5])
    shown = module.CLAIM.shown(kept)
    assert "| 8 experts | 2.0M | 2 | 205.0 | 1.30 | 1.10 to 1.50 |" in shown
    assert "8 experts: at most 1.25 times dense: 1.30 in 2 rounds, cannot tell" in shown
    module.CLAIM.plot(kept, tmp_path / "plot.png")
    kept["step-e8-seed1"]["beside"] = 8
    assert module.ratios(kept, "step-e8") == [0.3 / 0.2], "several at once say nothing of time"


def test_what_must_run_before(evidence: Any) -> None:
    sweep, students, size = evidence("_sweep"), evidence("students"), evidence("_model").SIZES
    chosen = sweep._chosen([students.CLAIM], ["kept-taught"], size["cpu"])
    assert [variant.name for variant in chosen] == ["top1-e8", "kept-taught"]
    on_gpu = sweep._chosen([evidence("rank_bytes").CLAIM], None, size["gpu"])
    assert not on_gpu, "ranks that count are the CPU's"


@pytest.mark.parametrize(
    ("program", "ends"),
    [
        ("import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)", "did not end"),
        ("import signal, sys; signal.signal(15, lambda *_: sys.exit(3)); signal.pause()", "code 3"),
        ("import signal, sys; signal.signal(15, lambda *_: sys.exit(0)); signal.pause()", ""),
    ],
)
def test_a_run_is_asked_to_end_before_the_deadline(
    evidence: Any, tmp_path: Path, program: str, ends: str
) -> None:
    running, size = evidence("_run"), evidence("_model").SIZES["cpu"]

    def call() -> None:
        running._call(["-S", "-c", program], tmp_path / "log.txt", size, time.monotonic() + 3)

    if not ends:
        call()
        return
    with pytest.raises((running.CutError, running.RunError), match=ends):
        call()
