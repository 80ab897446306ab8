"""docs/flags.md and --help are what the table of flags prints, group by group."""

import argparse
from pathlib import Path
from typing import get_args

from ep_plugin.megatron.arguments.page import page
from ep_plugin.megatron.arguments.parser import add_ep_arguments
from ep_plugin.megatron.arguments.table import TABLE, Group

PAGE = Path(__file__).parents[2] / "docs" / "flags.md"


def test_the_page_is_what_the_table_prints() -> None:
    assert PAGE.read_text() == page(), (
        "print it anew: python -m ep_plugin.megatron.arguments.page > docs/flags.md"
    )


def test_every_flag_has_one_line() -> None:
    for row in TABLE:
        assert page().count(f"\n| `{row.flag}` |") == 1


def test_help_has_a_group_for_each_of_the_table() -> None:
    text = add_ep_arguments(argparse.ArgumentParser()).format_help()
    titles = [line for line in text.splitlines() if line.startswith("ep_plugin: ")]
    assert titles == [f"ep_plugin: {group}:" for group in get_args(Group)]
    for row in TABLE:
        part = text.partition(f"ep_plugin: {row.group}:\n")[2].partition("\nep_plugin: ")[0]
        assert f"\n  {row.flag}" in f"\n{part}"
    assert "parity-dump" not in text
