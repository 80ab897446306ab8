"""SECURITY.md, licences and the weekly audit: each command and each dependency has its row."""

import json
import re
import tomllib
from pathlib import Path

import list_licences
import pytest

from ep_plugin.cli import COMMANDS

ROOT = Path(__file__).parents[2]
SECURITY = (ROOT / "SECURITY.md").read_text()
LICENCES = (ROOT / "docs" / "licences.md").read_text()
WORKFLOW = (ROOT / ".github" / "workflows" / "audit.yml").read_text()
ROW = re.compile(r"^\| (?P<package>[\w.-]+) \| (?P<licence>[^|]+) \| (?P<by>[^|]+) \|$", re.M)


def rows() -> list[list[str]]:
    table = SECURITY.split("|---|---|---|\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_every_command_has_a_row_that_says_whether_it_is_safe() -> None:
    named = [name for row in rows() for name in re.findall(r"`ep-plugin ([a-z]+)", row[0])]
    assert set(named) == set(COMMANDS)
    assert all(len(row) == 3 and all(row) for row in rows())


def test_what_runs_a_script_is_not_called_safe() -> None:
    safe = {row[0]: row[1] for row in rows()}
    runs = [said for what, said in safe.items() if re.search(r"ep-plugin run|parity|--load", what)]
    assert runs == ["**no**"] * 2


def test_every_dependency_has_a_licence() -> None:
    listed = {row["package"]: row["licence"].strip() for row in ROW.finditer(LICENCES)}
    assert set(list_licences.asked()) <= set(listed)
    assert "not said" not in listed.values()


@pytest.mark.newest
def test_licences_are_those_that_the_installed_packages_say() -> None:
    """Of packages that are on both sides: which ones are installed depends on the machine."""
    listed = {row["package"]: row["licence"].strip() for row in ROW.finditer(LICENCES)}
    installed = {name: said for name, said, _ in list_licences.rows()}
    both = listed.keys() & installed.keys()
    assert {"torch", "tqdm", "pytest", "packaging"} <= both
    assert {n: listed[n] for n in both} == {n: installed[n] for n in both}


def test_the_weekly_audit_may_read_and_nothing_else() -> None:
    assert re.search(r"^permissions:\n  contents: read\n(?! )", WORKFLOW, re.M)
    assert "write" not in WORKFLOW
    assert re.search(r'- cron: "\d+ \d+ \* \* \d"', WORKFLOW)
    used = re.findall(r"uses: (\S+)", WORKFLOW)
    assert used
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in used)
    assert "--requirement constraints.txt" in WORKFLOW


def test_what_the_audit_covers_is_what_the_tests_run_with() -> None:
    """Each dependency that is tested has its version in constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    constraints = (ROOT / "constraints.txt").read_text()
    for word in project["dependencies"]:
        name = re.split(r"[^\w-]", word)[0]
        assert re.search(rf"^{name}==", constraints, re.M), name


def test_the_last_output_is_of_the_versions_tested_and_security_says_what_it_says() -> None:
    kept = json.loads((ROOT / "docs" / "pip-audit.json").read_text())
    audited, other = kept["audited"], kept["not_audited"]
    pins = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert pins
    for name, version in pins:
        assert (audited | other)[name] == version, f"{name}: run pip-audit again"
    text = " ".join(SECURITY.split())
    for figure in (
        f"is of {kept['date']}: of {len(audited) + len(other)} packages",
        f"{len(audited)} were audited, with no known weakness",
        f"The other {len(other)}, ",
    ):
        assert figure in text, figure
    assert kept["known_weaknesses"] == 0
