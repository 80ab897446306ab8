"""Understanding a Megatron pretrain script: its guard, its `pretrain(` call, its layout.

Nothing here changes a script; `__init__.py` beside it does. Every function raises ConfigError, with
the line named, for what it does not understand.
"""

import ast
import io
from collections.abc import Iterator

from ep_plugin.errors import ConfigError

GUARD = 'if __name__ == "__main__":'
NO_EDIT = "`python -m ep_plugin.run SCRIPT` needs no edit"


def parse(text: str) -> ast.Module:
    """Return the script as a tree; a byte order mark that a reader left in the text is skipped."""
    try:
        return ast.parse(text.removeprefix("\ufeff"))
    except SyntaxError as error:
        raise ConfigError(
            f"line {error.lineno}: {error.msg}; give a script that Python runs"
        ) from error
    except (ValueError, RecursionError, MemoryError) as error:  # a null byte; brackets in brackets
        raise ConfigError(
            f"Python cannot read it ({error or 'it nests too deep'}); give a script that Python "
            "runs"
        ) from error


def split_lines(text: str) -> list[str]:
    """Return the lines as Python counts them, each with its own ending."""
    return io.StringIO(text, newline="").readlines()


def _is_main_test(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq)):
        return False
    sides = [ast.dump(side) for side in (node.left, *node.comparators)]
    wanted = [ast.dump(ast.parse(side, mode="eval").body) for side in ("__name__", "'__main__'")]
    return sorted(sides) == sorted(wanted)


def find_guard(tree: ast.Module) -> ast.If:
    """Return the only guard, a statement of the top level; either side may come first."""
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.expr) and _is_main_test(node)]
    tests.sort(key=lambda test: test.lineno)
    if not tests:
        raise ConfigError(f"there is no `{GUARD}` to add the call under; {NO_EDIT}")
    if len(tests) > 1:
        raise ConfigError(
            f"line {tests[1].lineno}: a second `{GUARD}`; the first is in line {tests[0].lineno}; "
            f"keep one of them; {NO_EDIT}"
        )
    for statement in tree.body:
        if isinstance(statement, ast.If) and statement.test is tests[0]:
            return statement
    raise ConfigError(
        f"line {tests[0].lineno}: the guard must be `{GUARD}` at the top level, with no further "
        f"condition; {NO_EDIT}"
    )


def _pretrain_calls(tree: ast.Module) -> list[ast.Call]:
    """Return the calls of an imported `pretrain`, also under an alias or through its module."""
    functions, modules = set(), set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for alias in node.names:
            if isinstance(node, ast.ImportFrom) and alias.name == "pretrain":
                functions.add(alias.asname or alias.name)
            elif alias.name == "*" and str(getattr(node, "module", "")).startswith("megatron"):
                functions.add("pretrain")
            else:
                modules.add(alias.asname or alias.name.partition(".")[0])

    def is_pretrain(called: ast.expr) -> bool:
        if isinstance(called, ast.Name):
            return called.id in functions
        root = called
        while isinstance(root, ast.Attribute):
            root = root.value
        is_member = isinstance(called, ast.Attribute) and called.attr == "pretrain"
        return is_member and isinstance(root, ast.Name) and root.id in modules

    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and is_pretrain(n.func)]


def _run_at_import(tree: ast.Module, guard: ast.If) -> Iterator[ast.AST]:
    """Yield every node outside the guard that is run when the module is imported."""
    todo: list[ast.AST] = [*(node for node in tree.body if node is not guard), *guard.orelse]
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo.extend(ast.iter_child_nodes(node))


def check_pretrain(tree: ast.Module, guard: ast.If) -> None:
    """Check that a `pretrain` is called, and only after the guard has been entered."""
    calls = _pretrain_calls(tree)
    if not calls:
        raise ConfigError(
            "there is no `pretrain(` call of an imported pretrain; give a Megatron pretrain "
            f"script, with `from megatron.training import pretrain`; {NO_EDIT}; what starts "
            "workers of its own needs one call in the worker, as docs/other-scripts.md shows"
        )
    run_at_import = set(_run_at_import(tree, guard))
    too_early = [call.lineno for call in calls if call in run_at_import]
    if too_early:
        raise ConfigError(
            f"line {min(too_early)}: pretrain( is called outside `{GUARD}` (line {guard.lineno}), "
            f"so before the plugin; move the call under it; {NO_EDIT}"
        )


def end_of_header(lines: list[str], guard: ast.If) -> int:
    """Return how many lines end with the guard's own; comments under it belong to its body."""
    first = guard.body[0]
    own_line = not lines[first.lineno - 1][: first.col_offset].strip()
    decorators: list[ast.expr] = getattr(first, "decorator_list", [])
    end = min([first.lineno, *(decorator.lineno for decorator in decorators)]) - 1
    while own_line and (not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#")):
        end -= 1
    if not own_line or lines[end - 1].rstrip().endswith("\\"):
        raise ConfigError(
            f"line {guard.lineno}: the guard and its first statement share a line; "
            "put the statement on a line of its own"
        )
    return end


def layout(lines: list[str], guard: ast.If, end: int) -> tuple[str, str]:
    """Return the indentation under the guard, and its header's line ending."""
    first, header = guard.body[0], lines[end - 1]
    return lines[first.lineno - 1][: first.col_offset], header[len(header.rstrip("\r\n")) :]


def lines_of_use(tree: ast.Module) -> list[int]:
    """Return the lines that name ep_plugin.megatron, in order."""

    def names_it(node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute):
            return ast.unparse(node) == "ep_plugin.megatron"
        if not isinstance(node, ast.Import | ast.ImportFrom):
            return False
        prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        paths = [f"{prefix}{alias.name}." for alias in node.names]
        return any(path.startswith("ep_plugin.megatron.") for path in paths)

    uses = [node for node in ast.walk(tree) if isinstance(node, ast.stmt | ast.expr)]
    return sorted(node.lineno for node in uses if names_it(node))
