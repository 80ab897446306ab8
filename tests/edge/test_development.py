"""Megatron in development, where a checkout of it is given: what verifies, and what trains.

EP_MEGATRON_CHECKOUT=FOLDER pytest -q tests/edge/test_development.py

Its data sets need their helper compiled in the checkout, which `docs/releases.md` shows.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from core_model import Case
from layouts import (
    CHECKS,
    DEGREES,
    EVERYWHERE,
    HYBRID,
    LATENT,
    LOSS_CHECKS,
    NEWEST_ALONE,
    difference,
    results,
)
from list_settings import to_decide
from loop import MOE, NEWEST, OURS, RUN, SHAPE
from releases import CHECKOUT, DEVELOPMENT, ROOT, environment

from ep_plugin.commands.report.events import read_run
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.theirs import BY_FIELD
from ep_plugin.megatron.arguments.theirs_next import NEXT
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.seams import touchpoints

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(
        not cpu_mode.wanted(), reason="a GPU is here and EP_PLUGIN_DEVICE is not cpu"
    ),
]
given = pytest.mark.skipif(
    CHECKOUT not in os.environ or not NEWEST, reason=f"{CHECKOUT} names no checkout of Megatron-LM"
)
# A checkout compiles that helper.
ASKED = tuple(check for check in CHECKS + LOSS_CHECKS if check != "helpers of the wheel")
CASES = tuple(
    case if case.vpp or case.dense_layers else replace(case, layers=2)
    for case in (*EVERYWHERE[:6], *NEWEST_ALONE, DEGREES[1], *HYBRID, *LATENT)
)
LAYERS = {"pretrain_gpt": SHAPE, "pretrain_hybrid": ["--hybrid-layer-pattern", "*E*E", *SHAPE[2:]]}


def test_it_is_experimental_and_not_what_is_installed() -> None:
    assert touchpoints.newest() == "0.19"
    assert touchpoints.experimental("0.19.2") is None
    said = touchpoints.experimental("0.20.0rc1")
    commit = touchpoints.release_for("0.20").EXPERIMENTAL
    assert said is not None
    assert said.startswith("megatron-core 0.20.0rc1 is in development and experimental here: ")
    assert commit in said
    assert said.endswith("the newest release is 0.19")


def test_another_commit_is_refused_with_the_one_that_was_tested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = (touchpoints.Touchpoint("megatron.core:gone"),)
    monkeypatch.setattr(touchpoints, "installed_version", lambda: "0.20.0")
    monkeypatch.setattr(touchpoints, "table_for", lambda version: gone)
    commit = touchpoints.release_for("0.20").EXPERIMENTAL
    with pytest.raises(ConfigError, match=f"{commit} .*core:gone is not there.*check out that"):
        touchpoints.verify()


@given
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_layout_trains_as_one_rank(case: Case) -> None:
    found = results(DEVELOPMENT, CASES, 2)
    assert "error" not in found[case.name], found[case.name]["error"]
    assert difference(found, case) < 1e-5


@given
@pytest.mark.parametrize("check", ASKED)
def test_check(check: str) -> None:
    found = results(DEVELOPMENT, CASES, 2)
    assert found[check] == {}, found[check]["error"]


@given
def test_every_setting_has_a_row_and_a_plain_model_none_that_refuses() -> None:
    script = ROOT / "tests" / "helpers" / "list_settings.py"
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment(DEVELOPMENT),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["config"], found["args"]) == (None, None)
    assert not to_decide(found) - {*BY_FIELD}
    assert not {row.field for row in NEXT} - {*found["fields"], *found["flags"]}


@given
def test_its_own_scripts_train_and_are_equal(tmp_path: Path) -> None:
    folder = Path(os.environ[CHECKOUT])
    if not list((folder / "megatron" / "core" / "datasets").glob("helpers_cpp*")):
        pytest.skip("the helper of its data sets is not compiled there")
    losses: list[Any] = []
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, layers in LAYERS.items():
        flags = [*layers, *RUN, *MOE, "--expert-model-parallel-size", "2", "--train-iters", "4"]
        events, save = str(tmp_path / name), str(tmp_path / f"{name}-saved")
        flags += ["--tensorboard-dir", events, "--save", save, "--save-interval", "4"]
        flags += ["--ep-audit-save"]
        done = subprocess.run(
            [sys.executable, *torchrun, *OURS, str(folder / f"{name}.py"), *flags],
            env=environment(DEVELOPMENT),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert done.stdout.count("is in development and experimental here") == 1
        assert "optimizer by parameter: fine" in done.stdout
        losses.append([value for _, value in read_run(Path(events)).series("lm loss")])
    assert len(losses[0]) == 4
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
