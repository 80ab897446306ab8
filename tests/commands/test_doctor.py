"""`ep-plugin doctor`: what it says of what is here, of what is not, and of another `apex`."""

import json
import sys
from pathlib import Path

import pytest

from ep_plugin.cli import main
from ep_plugin.commands import doctor
from ep_plugin.errors import BackendUnavailable
from ep_plugin.megatron.seams import found, touchpoints
from ep_plugin.megatron.seams.apex import foreign_apex
from ep_plugin.registry import available


def by_name(findings: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in findings}


@pytest.mark.megatron
def test_this_machine_is_usable_and_every_option_is_listed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["usable"] is True
    status = {finding["name"]: finding["status"] for finding in report["findings"]}
    assert {status[name] for name in ("python", "torch", "device", "megatron-core")} == {"ok"}
    options = [f"{kind} {name}" for kind in doctor.KINDS for name in available(kind)]
    assert set(options) <= set(status)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in status)
    assert "moe_module_specs" not in printed
    assert main(["doctor", "-v"]) == 0
    printed = capsys.readouterr().out
    assert {"place", "why"} == set(report["seams"][0])
    for seam in report["seams"]:
        assert f"\n  {seam['why']}\n" in printed
        assert f"\n    {seam['place']}\n" in printed
    assert any(seam["place"].endswith("moe_module_specs:MoELayer") for seam in report["seams"])
    assert printed.endswith("\nusable\n")


@pytest.mark.megatron
def test_a_release_without_a_table_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(touchpoints, "installed_version", lambda: "0.15.3")
    assert main(["doctor", "-v"]) == 1
    printed = capsys.readouterr().out
    assert "broken  megatron-core          megatron-core 0.15.3 is none that the plugin" in printed
    assert printed.endswith("\nnot usable: see what is broken\n")


@pytest.mark.megatron
@pytest.mark.parametrize(("checkout", "shown"), [(False, "0.19.2"), (True, "0.19.2+abc1234")])
def test_a_commit_is_shown_where_it_is_megatron_s(
    checkout: bool, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """megatron.core adds the commit of the repository that it lies in, also of a stranger's."""
    monkeypatch.setattr(touchpoints, "installed_version", lambda: "0.19.2+abc1234")
    monkeypatch.setattr(touchpoints, "verify", lambda: {"a": None})
    monkeypatch.setattr(found, "is_checkout", lambda _: checkout)
    said = by_name(doctor.examine())["megatron-core"].text
    assert said.startswith(f"{shown}, all 1 touch points match")


def test_without_megatron_the_rest_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (doctor, found):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    (finding,) = doctor._megatron()
    assert finding.status == "absent"
    assert "run pip install 'megatron-core[training]==" in finding.text


def test_an_option_without_its_package_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(kind: str, name: str) -> None:
        if name == "alltoall" or kind == "gemm":
            raise BackendUnavailable(f"{name} needs a package")

    monkeypatch.setattr(doctor, "resolve", resolve)
    found = by_name(doctor._options())
    assert found["dispatcher alltoall"].status == "absent"
    assert found["dispatcher local"].status == "ok"
    assert "dispatcher" not in found
    assert found["gemm"].status == "broken"


def test_an_unknown_device_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP_PLUGIN_DEVICE", "toaster")
    assert doctor._device().status == "broken"
    monkeypatch.setenv("EP_PLUGIN_DEVICE", "cpu")
    assert doctor._device().text == "CPU mode with gloo as EP_PLUGIN_DEVICE asks"


def test_a_package_that_does_not_import_says_why() -> None:
    here = doctor._package(("pytest", "pytest", "tests"))
    assert (here.status, here.text) == ("ok", pytest.__version__)
    failing = doctor._package(("pytest", "no_such_module", "tests"))
    assert failing.status == "absent"
    assert "No module named 'no_such_module'" in failing.text
    missing = doctor._package(("no-such-package", "no_such_module", "tests"))
    assert missing.text == "not installed; it is for tests"


@pytest.fixture
def unhidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU mode, wherever an earlier test of this process put it on, hides apex."""
    monkeypatch.delitem(sys.modules, "apex", raising=False)


def make_apex(folder: Path, *parts: str) -> None:
    for part in ("apex", *(f"apex/{part}" for part in parts)):
        (folder / part).mkdir()
        (folder / part / "__init__.py").write_text("raise RuntimeError('imported')\n")


@pytest.mark.usefixtures("unhidden")
@pytest.mark.parametrize(
    ("parts", "missing"),
    [
        (("optimizers", "multi_tensor_apply"), None),
        (("optimizers",), "no apex.multi_tensor_apply;"),
        ((), "no apex.optimizers and no apex.multi_tensor_apply;"),
    ],
)
def test_another_apex_is_told_from_nvidias_without_importing_it(
    parts: tuple[str, ...], missing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_apex(tmp_path, *parts)
    monkeypatch.syspath_prepend(tmp_path)
    problem = foreign_apex()
    finding = doctor._apex()
    if missing is None:
        assert problem is None
        assert (finding.status, finding.text) == ("ok", "NVIDIA's")
        return
    assert problem is not None
    assert missing in problem
    assert str(tmp_path / "apex") in problem
    assert "pip uninstall apex" in problem
    assert (finding.status, finding.text) == ("broken", problem)


@pytest.mark.usefixtures("unhidden")
def test_an_apex_of_one_file_is_another_apex(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert f"the apex in {tmp_path / 'apex.py'} is not NVIDIA's" in str(foreign_apex())


@pytest.mark.usefixtures("unhidden")
def test_no_apex_is_no_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert foreign_apex() is None


@pytest.mark.megatron
def test_which_layers_of_a_hybrid_model_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    from ep_plugin.megatron.cpu import mode as cpu_mode

    def said(**packages: str) -> doctor.Finding:
        status = dict.fromkeys(("megatron-core", "device"), "ok")
        names = ("transformer-engine", "mamba-ssm", "flash-linear-attention")
        status |= {name: packages.get(name.partition("-")[0], "absent") for name in names}
        found = [doctor.Finding(name, state, "") for name, state in status.items()]  # type: ignore[arg-type]
        (finding,) = doctor._hybrid(found[:2], found[2:])
        return finding

    monkeypatch.setattr(touchpoints, "installed_version", lambda: "0.19.2")
    monkeypatch.setattr(cpu_mode, "wanted", lambda: True)
    assert said().text.startswith("layers *, +, - and E on the CPU; M: Mamba layers need the")
    monkeypatch.setattr(cpu_mode, "wanted", lambda: False)
    assert said().status == "absent"
    assert said(transformer="ok", mamba="ok").text == (
        "layers *, +, D, -, E, M; G needs flash-linear-attention"
    )
    monkeypatch.setattr(touchpoints, "installed_version", lambda: "0.17.1")
    assert said().text == "megatron-core 0.17.1 has none; it is there from 0.18"
    assert doctor._hybrid([], []) == []
