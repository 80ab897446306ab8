"""Adding the plugin to a Megatron pretrain script, and taking it out again byte for byte.

The whole change, first under the guard that every pretrain script ends with:

     if __name__ == "__main__":
    +    import ep_plugin.megatron
    +    ep_plugin.megatron.install()
    +
         ...

The script is understood through `ast` and edited by line, so nothing else moves. What is not
understood is refused with the line named; `python -m ep_plugin.run SCRIPT` needs no edit at all.
"""

import argparse
import difflib
import io
import sys
import tokenize
from collections.abc import Callable
from pathlib import Path

from ep_plugin.commands.apply.script import (
    GUARD,
    check_pretrain,
    end_of_header,
    find_guard,
    layout,
    lines_of_use,
    parse,
    split_lines,
)
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import one_line, read_bytes
from ep_plugin.written import write_whole

MOST_BYTES = 1 << 20  # of a script, which Python reads into a tree much larger
IMPORT = "import ep_plugin.megatron"
CALL = "ep_plugin.megatron.install()"
EXAMPLES = """examples:
  ep-plugin apply pretrain_gpt.py             add the plugin; a second time changes nothing
  ep-plugin apply --diff pretrain_*.py        show what would change, as a patch; write nothing
  ep-plugin apply --check pretrain_gpt.py     exit code 1 if something would change; write nothing
  ep-plugin apply --revert pretrain_gpt.py    take the plugin out again, byte for byte

Exit code 2: a script is not understood; then none of the scripts is written.
"""


def apply(text: str) -> str:
    """Return the script `text` with the plugin's call added; unchanged when it is there.

    Raises ConfigError, with the line, for a script that is not understood.
    """
    from ep_plugin.megatron.seams.served import check_recipe, check_script

    tree, lines = parse(text), split_lines(text)
    check_script(tree)
    check_recipe(tree)
    guard = find_guard(tree)
    check_pretrain(tree, guard)
    end = end_of_header(lines, guard)
    indent, newline = layout(lines, guard, end)
    if uses := lines_of_use(tree):
        _height_of_block(lines, end, (indent, newline), uses)
        return text
    block = [indent + IMPORT + newline, indent + CALL + newline, newline]
    return "".join([*lines[:end], *block, *lines[end:]])


def revert(text: str) -> str:
    """Return the script `text` as it was before `apply`; unchanged when the plugin is not in it.

    Raises ConfigError, with the line, when the call is there but not as `apply` wrote it.
    """
    tree, lines = parse(text), split_lines(text)
    if not lines_of_use(tree):
        return text
    guard = find_guard(tree)
    end = end_of_header(lines, guard)
    height = _height_of_block(lines, end, layout(lines, guard, end), lines_of_use(tree))
    if len(guard.body) == 2:
        raise ConfigError(f"line {guard.lineno}: nothing else is under the guard; delete it whole")
    return "".join([*lines[:end], *lines[end + height :]])


def rewrite(source: bytes, edit: Callable[[str], str]) -> bytes:
    """Return `source` edited as text; byte order mark, encoding and line endings stay.

    Raises ConfigError for bytes that are no Python source.
    """
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
        text = source.decode(encoding)
    except (SyntaxError, LookupError, UnicodeError) as error:
        raise ConfigError(
            f"not Python source ({one_line(str(error))}); give a script that Python runs"
        ) from error
    if _encoded(text, encoding) != source:
        raise ConfigError(
            f"the encoding {encoding} cannot restore every byte; save the script in utf-8"
        )
    return _encoded(edit(text), encoding)


def _encoded(text: str, encoding: str) -> bytes:
    try:
        return text.encode(encoding)
    except UnicodeError as error:  # idna, for one, reads more than it writes
        raise ConfigError(
            f"the encoding {encoding} cannot write the script ({error}); save it in utf-8"
        ) from error


def diff(name: str, old: bytes, new: bytes) -> bytes:
    """Return the change as a patch for `git apply` and `patch -p1`; empty when there is none.

    One line of context, the least that `git apply` accepts.
    """
    before, after = (io.BytesIO(source).readlines() for source in (old, new))
    names = f"a/{name}".encode(), f"b/{name}".encode()
    changes = difflib.diff_bytes(difflib.unified_diff, before, after, *names, n=1)
    unfinished = b"\n\\ No newline at end of file\n"
    return b"".join(line if line.endswith(b"\n") else line + unfinished for line in changes)


def _height_of_block(lines: list[str], end: int, layout: tuple[str, str], uses: list[int]) -> int:
    """Return how many lines `apply` added after line `end`; `uses` are the lines that name us.

    A formatter's blank line after the import is allowed. Raises ConfigError for any other edit.
    """
    indent, newline = layout
    imported, called = indent + IMPORT + newline, indent + CALL + newline
    blocks = [imported, called, newline], [imported, newline, called, newline]
    height = max(len(block) * (lines[end : end + len(block)] == block) for block in blocks)
    strays = [line for line in uses if not end < line <= end + height]
    if strays:
        raise ConfigError(
            f"line {strays[0]}: uses ep_plugin.megatron, but not as `apply` writes it: `{IMPORT}`, "
            f"`{CALL}` and a blank line right under `{GUARD}`; restore these three lines, or "
            "delete what is left of them"
        )
    return height


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("scripts", nargs="+", type=Path, metavar="SCRIPT", help="pretrain script")
    parser.add_argument("--revert", action="store_true", help="take the plugin out instead")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if a script would change"
    )
    parser.add_argument(
        "--diff", action="store_true", help="write nothing; print the change as a patch"
    )


def run(args: argparse.Namespace) -> int:
    """Edit the scripts; all are understood before the first is written. Raises ConfigError."""
    edit = revert if args.revert else apply
    edits = [(path, *_edited(path, edit)) for path in args.scripts]
    for path, old, new in edits:
        if args.diff:
            sys.stdout.buffer.write(diff(path.as_posix().lstrip("/"), old, new))
            continue
        if old != new and not args.check:
            write_whole(path, new)
        would = "would be " if args.check else ""
        done = "taken out" if args.revert else "added"
        print(f"{path}: {'unchanged' if old == new else f'plugin {would}{done}'}")
    return int(args.check and any(old != new for _, old, new in edits))


def _edited(path: Path, edit: Callable[[str], str]) -> tuple[bytes, bytes]:
    from ep_plugin.megatron.seams.served import check_neighbours

    source = read_bytes(path, "give the path of your pretrain script", MOST_BYTES)
    try:
        if edit is apply:
            check_neighbours(path)
        return source, rewrite(source, edit)
    except RecursionError as error:
        raise ConfigError(
            f"{path}: it nests too deep to be understood; `python -m ep_plugin.run SCRIPT` needs "
            "no edit"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
