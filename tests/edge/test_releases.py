"""Older releases: their training loop under torchrun, and what the support matrix says of them."""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from core_model import Case
from layouts import (
    CASES,
    CHECKS,
    DEGREES,
    DEGREES_OF_OLDER,
    EVERYWHERE,
    HYBRID,
    IN_PAIRS,
    LATENT,
    NEWEST_ALONE,
    SEAMS,
    layouts_of,
)
from loop import MODEL, MOE
from releases import NEWEST, OLDER_WITH_LOOP, RELEASES, ROOT, VARIABLE, choose, environment
from support_matrix import DOCUMENT, FILE, MARKS, table

from ep_plugin.commands.report.events import read_run
from ep_plugin.megatron.cpu import mode as cpu_mode

pytestmark = pytest.mark.megatron


@pytest.mark.skipif(not cpu_mode.wanted(), reason="a GPU is here and EP_PLUGIN_DEVICE is not cpu")
def test_torchrun_starts_the_oldest_loop(tmp_path: Path) -> None:
    """As users start it; `test_older_loop.py` looks at what it computes."""
    version = OLDER_WITH_LOOP[0]
    script = str(ROOT / "recipes" / "pretrain_gpt.py")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = [*MODEL, *MOE, "--expert-model-parallel-size", "2", "--train-iters", "4"]
    flags += ["--tensorboard-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "ep_plugin.run", script, *flags],
        env=environment(version),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"checked in megatron-core {version}" in done.stdout
    losses = [value for _, value in read_run(tmp_path).series("lm loss")]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_the_documents_matrix_is_what_was_measured() -> None:
    kept = json.loads(FILE.read_text())
    assert MARKS[0] + table(kept) + MARKS[1] in DOCUMENT.read_text()
    assert list(kept) == list(RELEASES)
    for version in RELEASES:
        assert list(kept[version]["layouts"]) == [case.name for case in CASES]
        assert list(kept[version]["checks"]) == list(CHECKS)
        for entries in (kept[version]["layouts"], kept[version]["checks"]):
            assert all(entry["passed"] for entry in entries.values())


def test_a_case_says_what_it_is() -> None:
    """Names are what the matrix shows: no two layouts are the same one."""
    cases: list[Case] = list(CASES)
    assert len({case.name for case in cases}) == len(set(cases)) == len(cases) >= 12
    assert all(case.world <= 8 for case in cases)


def pairs(case: Case) -> set[tuple[tuple[str, object], ...]]:
    """Return all pairs of a layout's settings, and of how often weights are held."""
    copies = case.world // (case.tp * case.cp * case.pp)
    of_experts = case.world // (case.pp * case.ep * case.etp)
    settings = vars(case) | {"experts": bool(case.experts), "pattern": bool(case.pattern)}
    settings |= {"dp": copies, "edp": of_experts}
    aside = ("name", "layers", "sequences")
    return set(combinations([pair for pair in settings.items() if pair[0] not in aside], 2))


def test_pairs_of_what_the_newest_leaves_out_are_in_other_layouts() -> None:
    held = set().union(*(pairs(case) for case in layouts_of(NEWEST)))
    left_out = [case for case in CASES if case.name in IN_PAIRS]
    assert len(left_out) == len(IN_PAIRS)
    for case in left_out:
        assert pairs(case) <= held, case.name


def test_the_newest_is_always_tested_in_full() -> None:
    assert choose("all") == RELEASES
    assert choose("newest") == (NEWEST,)
    assert choose("0.17.1") == ("0.17.1", NEWEST)
    assert choose("0.18.2 0.16.1") == ("0.16.1", "0.18.2", NEWEST)
    assert choose(" ".join(choose("0.16.1"))) == choose("0.16.1")  # as run.sh hands it on
    with pytest.raises(ValueError, match=r"one of all, newest, 0\.16\.1, .*; got '0\.17'"):
        choose("0.17")


def test_what_is_tested_on_a_release_follows_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0.17.1")
    found = {version: {case.name for case in layouts_of(version)} for version in RELEASES}
    seams, everywhere = ({case.name for case in cases} for cases in (SEAMS, EVERYWHERE))
    latent = {case.name for case in LATENT}
    degrees = {
        version: {case.name for case in cases} for version, cases in DEGREES_OF_OLDER.items()
    }
    newest = CASES + NEWEST_ALONE + DEGREES + HYBRID + LATENT
    assert found[NEWEST] == {case.name for case in newest} - set(IN_PAIRS)
    assert found["0.17.1"] == everywhere | latent | degrees["0.17.1"]
    for version in ("0.16.1", "0.18.2"):  # the rest is shared out, and 0.17.1 has its part too
        assert seams | latent | degrees[version] < found[version]
        assert len(found[version] & everywhere) < len(everywhere) - 2
    assert len(SEAMS) == 2
    monkeypatch.setenv(VARIABLE, NEWEST)
    shared = [{case.name for case in layouts_of(version)} & everywhere for version in RELEASES[:-1]]
    assert set.union(*shared) == everywhere
    assert set.intersection(*shared) == seams
    monkeypatch.delenv(VARIABLE)
    assert len(layouts_of("0.16.1")) == len(EVERYWHERE + LATENT) + 1
