"""Generators under hypothesis, and the short form of the many cases in one process."""

import contextlib
import itertools
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import stored
import torch
from hypothesis import given
from hypothesis import settings as how
from hypothesis import strategies as st

from ep_plugin.errors import ConfigError
from tests.hostile import (
    archives,
    called,
    carried,
    classes,
    inside,
    lines,
    pickles,
    plants,
    readers,
    script_module,
    settings,
    texts,
    watch,
)

pytestmark = [pytest.mark.megatron, pytest.mark.newest]
ROOT = Path(__file__).parents[2]
CASES = 600
draws = st.randoms(use_true_random=False)
plain = how(max_examples=150, deadline=None, database=None)


def test_the_short_form_finds_nothing(tmp_path: Path) -> None:
    result = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, "tests/hostile", "--cases", str(CASES), "--json", str(result)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.is_file(), done.stdout + done.stderr
    found = json.loads(result.read_text())["cases"]
    assert {row["cases"] for row in found["counts"].values()} == {CASES // 6}
    assert found["faults"] == []


@pytest.mark.parametrize("long", ["x" * 5000, "a/" * 2500, "x " * 2500])
def test_a_long_value_leaves_a_short_sentence(long: str) -> None:
    """Of any flag, in pairs whose rules compare them, and of the settings they stand for."""
    said: list[str] = []
    for row, other in itertools.product(lines._rows(), ([], ["--ep-dispatch-dedup", "on"])):
        if row.default is False:
            continue
        try:
            lines._train([row.flag, long, *other])
        except (ConfigError, SystemExit) as error:
            said.append(str(error))
    assert len(said) > 50
    assert max(map(len, said)) < 4000


@plain
@given(draws)
def test_settings_end_in_a_config_error_or_are_right(rng: random.Random) -> None:
    _, make = settings.case(rng)
    _only_config_error(make)


@plain
@given(draws)
def test_lines_end_in_a_config_error_or_are_right(rng: random.Random) -> None:
    _, read = lines.case(rng)
    _only_config_error(read)


def _only_config_error(call: Callable[[], object]) -> None:
    with contextlib.suppress(ConfigError):
        try:
            call()
        except SystemExit as end:
            if end.code not in (0, 2):
                raise AssertionError(f"exit code {end.code}") from end


@pytest.mark.parametrize("seed", range(12))
def test_no_shell_runs_what_is_planted_in_flags_txt(seed: int, tmp_path: Path) -> None:
    """Through recipes/run.sh, which takes the words of a folder that `convert` wrote."""
    rng, place = random.Random(seed), outside(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    (model / "latest_checkpointed_iteration.txt").write_text("release")
    flags = model / "flags.txt"
    words = ["schedule=finetune", "--num-layers", "2", "--hidden-size", "32", "--num-experts", "4"]
    words.insert(rng.randrange(1, len(words)), rng.choice(texts.shell(place)))
    flags.write_bytes("\n".join(words).encode("utf-8", "surrogateescape"))
    if seed % 3 == 0:
        flags.write_bytes(texts.text_file(rng, place, flags.read_bytes())[1])
    done = subprocess.run(
        [str(ROOT / "recipes" / "run.sh"), "pretrain.py"],
        cwd=tmp_path,
        env={
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **{"PYTHONPATH": str(ROOT), "DRY_RUN": "1", "MODEL": "./model", "LAYOUT": "ep2"},
        },
        capture_output=True,
        check=False,
    )
    assert done.returncode in (0, 2)
    assert not (place / pickles.MARK).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "outside"]


# What follows shows that the generator would be seen: its payloads do run where nothing guards.


def outside(folder: Path) -> Path:
    return plants.outside_folder(folder / "outside")


def test_the_name_of_a_dtype_is_no_execution_and_any_other_is(tmp_path: Path) -> None:
    for name, value in {"a": torch.bool, "b": torch.complex64, "c": os.system}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / ".metadata").write_bytes(pickle.dumps([value, torch.uint16]))
        assert [fault.split()[-1] for fault in carried.found(tmp_path / name)] == (
            ["system'"] if name == "c" else []
        )


def test_a_model_that_is_not_whole_and_called_fine_is_a_fault(tmp_path: Path) -> None:
    """Where nothing looks for what is missing, cases of a dropped parameter are called fine."""
    stored.write(stored.healthy(), tmp_path / "in" / "saved")
    shutil.copytree(tmp_path / "in", tmp_path / "store")
    deaf = readers.Reader("deaf", lambda root: 0, readers.METADATA["audit a run"].files)
    audits = readers.Reader("audit", readers.METADATA["audit a run"].read, deaf.files)
    outside(tmp_path)
    (tmp_path / "tmp").mkdir()
    for reader, faults in ((deaf, True), (audits, False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(readers, "METADATA", {reader.name: reader})
            make = inside.model_cases(tmp_path, [])
            bench = inside.Bench(tmp_path, watch.Watch(), there=inside_of(tmp_path / "outside"))
            for number in range(40):
                bench.run("metadata of models", number, make(random.Random(number)))
        assert bench.counts["metadata of models"]["cases"] == 40
        assert any(fault["faults"][0][0] == "silent" for fault in bench.faults) == faults


def inside_of(folder: Path) -> tuple[str, ...]:
    return tuple(path.name for path in folder.iterdir())


@pytest.mark.parametrize("way", [way for way in pickles.WAYS if way in ("REDUCE", "OBJ")])
def test_a_payload_runs_in_python_s_own_unpickler(way: str, tmp_path: Path) -> None:
    place = outside(tmp_path)
    module, name, args = next(c for c in called.callables(place) if c[:2] == ("os", "system"))
    rng = random.Random(1)
    ops = pickles.WAYS[way](rng, f"c{module}\n{name}\n".encode(), args)
    pickle.loads(b"\x80\x04" + ops + b".")
    assert (place / pickles.MARK).exists()


def test_a_script_runs_in_torch_s_own_loader(tmp_path: Path) -> None:
    made = tmp_path / pickles.MARK
    records = [
        archives.Record(name, data) for name, data in script_module.records(str(made)).items()
    ]
    (tmp_path / "common.pt").write_bytes(archives.write(records))
    with pytest.warns(UserWarning, match="TorchScript"):
        torch.load(tmp_path / "common.pt", weights_only=False)
    assert made.exists()


def test_a_changed_class_is_seen_and_put_back() -> None:
    from argparse import Namespace

    before = classes.state()
    Namespace.planted = 1  # type: ignore[attr-defined]
    torch._utils._rebuild_tensor_v2.__defaults__ = (1,)
    assert sorted(classes.changes(before)) == [
        "Namespace.planted was changed",
        "_rebuild_tensor_v2.__defaults__ was changed",
    ]
    assert classes.changes(before) == []


def test_what_is_written_is_told_from_what_cannot_be(tmp_path: Path) -> None:
    """A folder that is there is not made, and to open one for writing makes no file."""
    watched = watch.Watch(writable=(tmp_path / "mine",))
    acts = {
        ("os.mkdir", (str(tmp_path), 0o777, -1)): False,
        ("open", (str(tmp_path), "w+b", os.O_RDWR | os.O_CREAT)): False,
        ("open", (str(tmp_path / "mine" / "file"), "w", os.O_WRONLY | os.O_CREAT)): False,
        ("os.mkdir", (str(tmp_path / "new"), 0o777, -1)): True,
        ("open", (str(tmp_path / "file"), "w", os.O_WRONLY | os.O_CREAT)): True,
    }
    for (event, arguments), is_write in acts.items():
        watched.seen.clear()
        watched._look(event, arguments)
        assert bool(watched.seen) == is_write
