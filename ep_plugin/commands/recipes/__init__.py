"""`ep-plugin recipes`: the scripts, models, layouts and patches that come along; copies of them."""

import argparse
import json
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from ep_plugin.errors import ConfigError, closest
from ep_plugin.untrusted import shown
from ep_plugin.written import cannot, write_whole

EXAMPLES = """examples:
  ep-plugin recipes                               every recipe, one a line
  ep-plugin recipes --copy train                  all of them into the folder train
  ep-plugin recipes --copy train qwen3-nano ep2   one model, one layout and the launcher
  cd train && DRY_RUN=1 MODEL=qwen3-nano LAYOUT=ep2 ./recipes/run.sh pretrain_gpt.py
  ep-plugin recipes --json                        for scripts
"""
FILES = Path(__file__).parent / "files"  # links to recipes/ and patches/; in a wheel their content
LAUNCHER = "recipes/run.sh"
BESIDE = {name: [LAUNCHER] for name in ("model", "layout", "schedule")} | {
    "patch": ["patches/README.md"],
    "evidence": ["recipes/evidence/README.md"],
}
KINDS = {  # what each matches, below FILES
    "model": "recipes/models/*.sh",
    "layout": "recipes/layouts/*.sh",
    "schedule": "recipes/schedules/*.sh",
    "script": "recipes/[!_]*.*",
    "slurm": "recipes/slurm/*.sbatch",
    "evidence": "recipes/evidence/[!_]*.py",
    "patch": "patches/*/*.patch",
}


class Recipe(NamedTuple):
    """Something to list and to copy."""

    kind: str
    name: str
    summary: str
    files: list[str]  # below FILES: its own, then those it names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes (default: all)")
    parser.add_argument("--copy", type=Path, metavar="FOLDER", help="copy them, with what they use")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """List or copy; raises ConfigError for an unknown name and for a file that is in the way."""
    chosen = choose(recipes(), args.names)
    if args.copy is None:
        print(json.dumps([r._asdict() for r in chosen], indent=2) if args.json else table(chosen))
        return 0
    files = sorted({file for recipe in chosen for file in recipe.files})
    copy(files, args.copy)
    if args.json:
        print(json.dumps({"folder": str(args.copy), "files": files}, indent=2))
    else:
        more = f"; there, ./{LAUNCHER} --help says more" if LAUNCHER in files else ""
        print(f"{len(files)} files copied to {args.copy}{more}")
    return 0


def recipes() -> list[Recipe]:
    """Return every recipe, in the order of its kind and name."""
    found = []
    for kind, pattern in KINDS.items():
        for path in sorted(FILES.glob(pattern)):
            file = str(path.relative_to(FILES))
            name = path.stem if kind in ("model", "layout", "schedule") else file.partition("/")[2]
            files = used([file, *BESIDE.get(kind, [])])
            found.append(Recipe(kind, name, _summary(path), files))
    return found


def choose(everything: list[Recipe], names: list[str]) -> list[Recipe]:
    """Return the recipes of these names; all where there is none. Raises ConfigError."""
    known = [recipe.name for recipe in everything]
    for name in names:
        if name not in known:
            near = ", ".join(closest(name, known))
            raise ConfigError(
                f"NAME must be one that `ep-plugin recipes` lists; got {shown(name)}; use {near}"
            )
    return [recipe for recipe in everything if not names or recipe.name in names]


def used(files: list[str]) -> list[str]:
    """Return these files and all that they name as recipes/FILE, once each."""
    found = list(files)
    for file in found:  # which grows
        for name in re.findall(r"recipes/[\w./-]+\w", (FILES / file).read_text()):
            if name not in found and (FILES / name).is_file():
                found.append(name)
    return found


def copy(files: list[str], folder: Path) -> None:
    """Copy files below FILES into a folder; raises ConfigError before it writes anything."""
    try:
        blocked = next(
            (p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None
        )
    except (OSError, ValueError) as error:
        raise ConfigError(cannot("written", folder, error)) from error
    if blocked is not None:
        raise ConfigError(f"--copy must be a folder; {blocked} is a file; use another FOLDER")
    for file in files:
        if os.path.lexists(folder / file):
            raise ConfigError(
                f"{folder / file} is there and is not overwritten; use --copy ANOTHER_FOLDER, "
                "or remove it"
            )
    made: list[Path] = []
    try:
        for file in files:
            write_whole(folder / file, (FILES / file).read_bytes(), follow=False)
            made.append(folder / file)
            shutil.copymode(FILES / file, folder / file)  # with its permission to run
    except BaseException:  # a disk that is full, or Ctrl-C
        for path in made:
            path.unlink()
        raise


def table(chosen: list[Recipe]) -> str:
    """Return one line for each recipe."""
    rows = [("kind", "name", "what"), *(recipe[:3] for recipe in chosen)]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(
        f"{kind.ljust(widths[0])}  {name.ljust(widths[1])}  {summary}"
        for kind, name, summary in rows
    )


def _summary(path: Path) -> str:
    """Return a file's first sentence: of its comment, its docstring, or what a patch is for."""
    if path.suffix == ".patch":
        return f"what `ep-plugin apply` does to {path.stem}.py of {path.parent.name}"
    for line in path.read_text().splitlines():
        text = line.strip('#" ')
        if text and not line.startswith(("#!", "#SBATCH")):
            return text
    raise AssertionError(f"{path} does not begin with what it is")
