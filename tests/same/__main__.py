"""Run two checkouts of this project side by side and compare what they produce, to the bit.

python tests/same OLD NEW

For a reorganisation that must change nothing: it uses commands, public names and file formats
alone, never where code lies. Bits hold on one machine with one torch, so nothing is kept.
"""

import argparse
import logging
import re
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import arguments
import conversions
import inputs
import printed
import training
from checkout import FINISHED, Checkout, DidNotRun

Found = dict[str, str]
PARTS = ("presets", "arguments", "json", "conversions", "training")
RELEASES = ("0.17.1", "0.18.2")  # megatron-core, as tests/helpers/releases.py installs them
WIDTH, ROWS = 160, 60  # of a value and of the table
EXAMPLES = """examples:
  python tests/same ../before .                     everything
  python tests/same ../before . --only training --releases all
  python tests/same ../before . --ignore 'json/doctor/' --expect expected.txt

A value's name is PART/CASE/...; FILE of --expect has a regular expression a line, for what is to
differ: it is matched against `NAME: OLD -> NEW`. Exit code 1: something else differs; 2: a run that
both have to make did not finish.
"""


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python tests/same",
        description=__doc__.splitlines()[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", type=Path, metavar="OLD", help="a checkout")
    parser.add_argument("new", type=Path, metavar="NEW", help="a checkout to compare with it")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,...", help="%(default)s")
    parser.add_argument("--ignore", nargs="+", default=[], metavar="PATTERN", help="names left out")
    parser.add_argument("--expect", type=Path, metavar="FILE", help="differences that are right")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave what was written here")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=2, help="checkouts at once")
    parser.add_argument("--releases", choices=("newest", "all"), default="newest",
                        help="of Megatron, for training")  # fmt: skip
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(PARTS):
        parser.error(f"--only must name parts of {','.join(PARTS)}; got {','.join(unknown)}")
    for root in (args.old, args.new):
        if not (root / "ep_plugin" / "__init__.py").is_file():
            parser.error(f"{root} is no checkout: it has no ep_plugin/__init__.py")
    if args.keep is not None and args.keep.exists() and any(args.keep.iterdir()):
        parser.error(f"--keep {args.keep} must be missing or empty")
    return args


def compare(args: argparse.Namespace, folder: Path) -> dict[str, tuple[str, str]]:
    """Run the parts on both checkouts; return name -> (old, new) of all values."""
    sides = tuple(
        Checkout(root, folder / name) for root, name in ((args.old, "old"), (args.new, "new"))
    )
    tiny, values = folder / "inputs", {}
    try:
        for side in sides:
            side.ready()
        if {"conversions", "json"} & set(args.only):
            timed("tiny checkpoints", partial(inputs.make, sides[0], tiny))
        collect: dict[str, Callable[[Checkout], Found]] = {
            "presets": printed.collect_presets,
            "arguments": arguments.collect,
            "json": partial(printed.collect_json, inputs=tiny),
            "conversions": partial(conversions.collect, inputs=tiny),
            "training": train,
        }
        for part in (part for part in PARTS if part in args.only):
            values |= on_both(part, collect[part], sides, args.jobs)
    finally:
        for side in sides:
            side.close()
    if args.releases == "all" and "training" in args.only:
        for version in RELEASES:
            values |= on_release(version, args, folder)
    return values


def train(checkout: Checkout) -> Found:
    """Train on the newest release, with the recipe of the checkout."""
    script = checkout.root / "recipes" / "pretrain_gpt.py"
    return training.collect(checkout, script, training.RUNS)


def on_release(version: str, args: argparse.Namespace, folder: Path) -> dict[str, tuple[str, str]]:
    """Train on an older release of megatron-core; raises DidNotRun where it is not installed."""
    release = Path(sys.prefix) / "megatron" / version
    if not (release / "complete").exists():
        raise DidNotRun(
            f"megatron-core {version} is not in {release}; run tests/helpers/releases.py"
        )
    sides = tuple(
        Checkout(root, folder / version / name, release)
        for root, name in ((args.old, "old"), (args.new, "new"))
    )
    try:
        for side in sides:
            side.ready()
        older = partial(training.collect_older, runs=training.OLDER)
        return on_both(f"training-{version}", older, sides, args.jobs)
    finally:
        for side in sides:
            side.close()


def on_both(
    part: str, collect: Callable[[Checkout], Found], sides: tuple[Checkout, ...], jobs: int
) -> dict[str, tuple[str, str]]:
    """Return PART/NAME -> (old, new)."""

    def both() -> list[Found]:
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(collect, sides))

    old, new = timed(part, both)
    names = dict.fromkeys([*old, *new])
    return {f"{part}/{n}": (old.get(n, "(absent)"), new.get(n, "(absent)")) for n in names}


def timed[T](name: str, function: Callable[[], T]) -> T:
    """Call the function and say how long it took."""
    print(f"{name} ...", end=" ", flush=True)
    start = time.monotonic()
    result = function()
    print(f"{time.monotonic() - start:.0f} s", flush=True)
    return result


def judge(values: dict[str, tuple[str, str]], ignore: list[str], expect: list[str]) -> int:
    """Print what differs; return the exit code."""
    kept = {n: v for n, v in values.items() if not any(re.search(p, n) for p in ignore)}
    differ = {name: pair for name, pair in kept.items() if pair[0] != pair[1]}
    expected = {
        name
        for name, (old, new) in differ.items()
        if any(re.search(pattern, f"{name}: {old} -> {new}", re.DOTALL) for pattern in expect)
    }
    broken = {name: old for name, (old, _) in kept.items() if name.endswith("/run")}
    broken = {name: old for name, old in broken.items() if old != FINISHED}
    rest = [(name, *pair) for name, pair in differ.items() if name not in expected]
    for name, old, new in rest[:ROWS]:
        print(f"{name}\n  old  {shown(old, new)}\n  new  {shown(new, old)}")
    if len(rest) > ROWS:
        print(f"... and {len(rest) - ROWS} more")
    counts = ", ".join(
        f"{part} {sum(name.startswith(f'{part}/') for name in kept)}"
        for part in dict.fromkeys(name.partition("/")[0] for name in kept)
    )
    print(f"compared: {counts}; left out: {len(values) - len(kept)}")
    print(f"{len(rest)} differ" + (f", and {len(expected)} as expected" if expected else ""))
    for name, old in broken.items():
        print(f"{name} did not finish in OLD, so nothing was compared: {old}")
    return 2 if broken else int(bool(rest))


def shown(text: str, other: str) -> str:
    """Return a value from shortly before where it first differs from the other."""
    pairs = zip(text, other, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(other)))
    start = max(first - WIDTH // 2, 0) if len(text) > WIDTH else 0
    part = text[start : start + WIDTH].replace("\n", "\\n")
    return ("..." if start else "") + part + ("..." if start + WIDTH < len(text) else "")


def main() -> int:
    args = read_arguments()
    logging.disable(logging.WARNING)  # of libraries that read a checkpoint here
    expect = args.expect.read_text().splitlines() if args.expect else []
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.keep or Path(scratch)).resolve()
        try:
            values = compare(args, folder)
        except DidNotRun as error:
            print(f"\n{error}", file=sys.stderr)
            return 2
    return judge(values, args.ignore, [line for line in expect if line.strip()])


if __name__ == "__main__":
    sys.exit(main())
