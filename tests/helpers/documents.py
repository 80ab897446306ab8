"""The documents, their fenced blocks, and Megatron's parser: what the tests of documents share."""

import argparse
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
OTHERS = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "patches/README.md")
DOCUMENTS = [README, *(ROOT / name for name in OTHERS), *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<mark>[^\n]*) -->\n *)?```(?P<language>\w+)\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a document, and what the comment above it says."""

    place: str  # document:number, for the name of the test
    language: str
    mark: str
    text: str


def blocks_of(path: Path) -> Iterator[Block]:
    for number, found in enumerate(FENCE.finditer(path.read_text()), start=1):
        name = f"{path.relative_to(ROOT)}:{number}"
        text = textwrap.dedent(found["text"])
        yield Block(name, found["language"], found["mark"] or "", text)


BLOCKS = [block for path in DOCUMENTS for block in blocks_of(path)]


def megatron_parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    from ep_plugin.megatron.arguments.parser import add_ep_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser = add_megatron_arguments(parser)
    if "--ep-preset" not in parser._option_string_actions:
        add_ep_arguments(parser)
    return parser
