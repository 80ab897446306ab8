"""`ep-plugin presets`: published models by name, and the Megatron arguments of each."""

import argparse
import json
import shlex
from typing import Any

from ep_plugin.commands.numbers import short_count
from ep_plugin.megatron.arguments.spell import megatron_arguments
from ep_plugin.presets import Preset, active_params, load, presets, total_params

EXAMPLES = """examples:
  ep-plugin presets                   every preset with its parameters
  ep-plugin presets deepseek-v3       the Megatron arguments it stands for, ready to paste
  ep-plugin presets --json            for scripts
  torchrun ... -m ep_plugin.run pretrain_gpt.py --ep-preset deepseek-v3 ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="one preset; default: list all")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Print the list, or one preset's arguments; raises ConfigError for an unknown name."""
    if args.name is None:
        everything = [_record(preset) for preset in presets().values()]
        print(json.dumps(everything, indent=2) if args.json else _table(everything))
        return 0
    preset = load(args.name)
    arguments = megatron_arguments(preset)
    if args.json:
        print(json.dumps({**_record(preset), "arguments": arguments}, indent=2))
        return 0
    print(f"# {preset.name}: {preset.system}, {preset.source}")
    if preset.note:
        print(f"# {preset.note}")
    print(" \\\n".join(_lines(arguments)))
    return 0


def _record(preset: Preset) -> dict[str, Any]:
    return {
        "name": preset.name,
        "system": preset.system,
        "total_params": total_params(preset),
        "active_params": active_params(preset),
        "source": preset.source,
        "note": preset.note,
    }


def _table(records: list[dict[str, Any]]) -> str:
    rows = [("preset", "system", "total", "active", "source")]
    for record in records:
        sizes = (short_count(record["total_params"]), short_count(record["active_params"]))
        rows.append((record["name"], record["system"], *sizes, record["source"]))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip()
        for row in rows
    )


def _lines(arguments: list[str]) -> list[str]:
    """Return one line for each flag with its values, quoted for a shell."""
    lines: list[list[str]] = []
    for word in arguments:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return [shlex.join(line) for line in lines]
