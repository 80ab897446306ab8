"""docs/flags.md is what the table of flags prints."""

from pathlib import Path

from ep_plugin.megatron.arguments.page import page
from ep_plugin.megatron.arguments.table import TABLE

PAGE = Path(__file__).parents[2] / "docs" / "flags.md"


def test_the_page_is_what_the_table_prints() -> None:
    assert PAGE.read_text() == page(), (
        "print it anew: python -m ep_plugin.megatron.arguments.page > docs/flags.md"
    )


def test_every_flag_has_one_line() -> None:
    for row in TABLE:
        assert page().count(f"\n| `{row.flag}` |") == 1
