"""`docs/systems.md`: no empty cell; the presets, tests and evidence it names are there."""

import re

import pytest
from documents import ROOT

from ep_plugin.presets import presets

TEXT = (ROOT / "docs" / "systems.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in TEXT.splitlines()
    if line.startswith("| ") and not line.startswith("| feature |")
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_a_row_has_four_cells_with_words_in_each(row: list[str]) -> None:
    assert len(row) == 4
    assert all(re.search(r"\w", cell) for cell in row)
    named = re.findall(r"`test_|\(evidence\.md\)", row[3])
    assert named or "not served" in row[2] or "not run" in row[3]


def test_tests_and_evidence_that_are_named_are_there() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    functions = set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    assert len(named) > 30
    assert named <= functions
    page = (ROOT / "docs" / "evidence.md").read_text()
    for letter in set(re.findall(r"\[evidence (\(.\))\]", TEXT)):
        assert f"\n## {letter} " in page, letter


def test_every_published_preset_is_in_its_system_s_row() -> None:
    for name, preset in presets().items():
        if not name.endswith("-nano"):
            assert f"`{name}`" in TEXT, preset.system
