"""The table of exit codes in docs/troubleshooting.md has those that the code ends with."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Functions whose result is the code that a process ends with, beside `sys.exit` anywhere.
DOORS = {"cli.py": ("main", "_main"), "run.py": ("main",)}
COMMAND, RUN, RECIPE = 1, 2, 3  # columns


def table() -> dict[int, list[str]]:
    """Return code -> what it means, by column."""
    text = (ROOT / "docs/troubleshooting.md").read_text().partition("## Exit codes")[2]
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", text.partition("\n## ")[0], re.MULTILINE)
    return {int(code): ["", *(cell.strip() for cell in rest.split(" | "))] for code, rest in rows}


def said_in(column: int) -> set[int]:
    return {code for code, cells in table().items() if cells[column] != "-"}


def codes(source: str, doors: tuple[str, ...] = ()) -> set[int]:
    """Return the numbers that a file's `sys.exit` is given, and that its doors return."""
    tree = ast.parse(source)
    names = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def numbers(node: ast.AST | None) -> Iterator[int]:
        for part in ast.walk(node) if node else ():
            value = names.get(part.id) if isinstance(part, ast.Name) else None
            value = part.value if isinstance(part, ast.Constant) else value
            if type(value) is int:
                yield value

    found = set[int]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "sys.exit":
            found.update(code for word in node.args[:1] for code in numbers(leaf(word)))
        if isinstance(node, ast.FunctionDef) and node.name in doors:
            for part in ast.walk(node):
                if isinstance(part, ast.Return):
                    found.update(numbers(part.value))
    return found


def leaf(word: ast.expr) -> ast.AST | None:
    """Return what `sys.exit` is given where that is a number or a name, not what it calls."""
    return word if isinstance(word, ast.Constant | ast.Name) else None


def of_package(commands: bool) -> set[int]:
    found = set[int]()
    for path in sorted((ROOT / "ep_plugin").rglob("*.py")):
        name = path.relative_to(ROOT / "ep_plugin").as_posix()
        of_commands = name == "cli.py" or name.startswith("commands/")
        if of_commands == commands:
            found |= codes(path.read_text(), DOORS.get(name, ()))
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import sys\nsys.exit(5)", {5}),
        ("A = 7\ndef f():\n    sys.exit(A)", {7}),
        ("def main():\n    return 0 if a[9] else B\nB = 4", {0, 4, 9}),
        ("def other():\n    return 8\nsys.exit(main(1))", set()),
    ],
)
def test_codes_are_found(source: str, expected: set[int]) -> None:
    assert codes(source, ("main",)) == expected


def test_commands_end_with_what_the_table_says() -> None:
    """0 and 1 are what a command's own `run` returns."""
    assert of_package(commands=True) | {0, 1} == said_in(COMMAND)


def test_runs_end_with_what_the_table_says() -> None:
    assert of_package(commands=False) == said_in(RUN)


def test_recipes_end_with_what_the_table_says() -> None:
    scripts = [path.read_text() for path in sorted((ROOT / "recipes").rglob("*.sh"))]
    found = {int(code) for text in scripts for code in re.findall(r"\bexit (\d+)\b", text)}
    assert found == said_in(RECIPE)
