"""Plant hostile content in every file that a command opens, and count what happens.

python tests/hostile --cases 120000 --commands 500 --record benchmarks/results/hostile.json

With one of the two alone, or --only, --record keeps the other counts, and of which run they are.
--commands: so many cases through the real commands, each in a forked child that is watched.
--cases: so many cases in one process, through readers, settings and parsers (`inside.py`).
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from tests.hostile import healthy, record  # noqa: E402
from tests.hostile.case import Sandbox, case_of  # noqa: E402


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python tests/hostile", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--cases", type=int, default=0, metavar="N", help="in one process")
    parser.add_argument(
        "--commands", type=int, default=0, metavar="N", help="through real commands"
    )
    parser.add_argument("--seconds", type=float, default=1e9, metavar="S", help="then end --cases")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--only", metavar="WORDS", help="kinds or commands whose name has these words"
    )
    parser.add_argument("--number", type=int, help="that case of --commands alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts here")
    parser.add_argument("--record", type=Path, metavar="FILE", help="and what docs/ shows of them")
    parser.add_argument("--verbose", action="store_true", help="print every case")
    return parser.parse_args()


def warm() -> None:
    """Import what commands import, so that a forked child begins with it; starts no thread."""
    import importlib
    import warnings

    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("MPLBACKEND", "agg")
    import torch

    torch.set_num_threads(1)
    for module in (
        "ep_plugin.cli", "ep_plugin.commands.convert", "ep_plugin.commands.report.any_run",
        "transformers",
        "ep_plugin.commands.report.events", "ep_plugin.commands.report.pictures",
        "ep_plugin.commands.audit",
        "ep_plugin.commands.report.html", "ep_plugin.commands.report.summary",
        "ep_plugin.commands.convert.run_hf",
        "ep_plugin.commands.plan", "ep_plugin.commands.bench", "ep_plugin.commands.apply",
        "ep_plugin.checkpoint.formats.hf_safetensors", "ep_plugin.megatron.workers.model_run",
        "matplotlib.backends.backend_agg", "transformers.models.qwen3.modeling_qwen3",
        "transformers.models.qwen3_moe.modeling_qwen3_moe",
        "transformers.models.auto.tokenization_auto", "sentencepiece",
        "tiktoken.load", "torch._subclasses.schema_check_mode",
        "ep_plugin.commands.generate", "ep_plugin.megatron.workers.generate_run",
    ):  # fmt: skip
        importlib.import_module(module)


def made_trees(folder: Path) -> Path:
    """Make the healthy folders in a child, since libraries start threads there.

    Where they are used later: an unfinished conversion remembers the path and times of its source.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            quiet = os.open(folder / "made.log", os.O_WRONLY | os.O_CREAT)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            healthy.make(folder / "sandbox" / "in")
            code = 0
        finally:
            os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise AssertionError((folder / "made.log").read_text()[-2000:])
    return Path(shutil.copytree(folder / "sandbox" / "in", folder / "store"))


def through_commands(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run cases through the real commands; returns counts per command, and the faults."""
    (folder / "sandbox").mkdir(parents=True)
    sandbox = Sandbox(folder / "sandbox", made_trees(folder))
    sandbox.learn(args.only or "")
    counts: dict[str, Counter[str]] = {}
    faults: list[dict[str, Any]] = []
    numbers = [args.number] if args.number is not None else range(10**9)
    done = 0
    for number in numbers:
        name, rng = case_of(args.seed, number)
        if args.only and args.only not in name:
            continue
        verdict = sandbox.run(name, rng)
        row = counts.setdefault(name, Counter())
        row["cases"] += 1
        row["refused" if verdict.code else "a result"] += 1
        found = verdict.faults()
        row.update({kind: 1 for kind in found})
        if found:
            faults.append({"number": number, "command": name, "plant": verdict.plant, **found})
        if found or args.verbose:
            words = f"{number} {name}; {verdict.plant[:90]}: exit code {verdict.code} {found or ''}"
            print(f"{words} {verdict.seconds:.1f} s: {verdict.said[:160]}", flush=True)
        done += 1
        if done == args.commands or args.number is not None:
            break
    opened = {name: sorted(files) for name, files in sandbox.opened.items()}
    return {"counts": counts, "faults": faults, "opened": opened}


def in_one_process(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run cases in this process; returns counts per kind, and the faults."""
    from tests.hostile import inside

    (folder / "sandbox").mkdir(parents=True)
    made_trees(folder)
    (folder / "sandbox" / "in").rename(folder / "in")
    found = inside.run(folder, args.cases, args.seed, args.seconds, args.only)
    for fault in found["faults"]:
        print(json.dumps(fault)[:600], flush=True)
    return found


def main() -> int:
    args = read_arguments()
    warm()
    result: dict[str, Any] = {"seed": args.seed}
    start = time.monotonic()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # many small files
    with tempfile.TemporaryDirectory(prefix="hostile-", dir=memory) as name:
        folder = Path(name).resolve()
        if args.commands or args.number is not None:
            result["commands"] = through_commands(args, folder / "commands")
        if args.cases:  # last: the hook and the limits of this process stay
            result["cases"] = in_one_process(args, folder / "cases")
    if args.record:
        kept = record.made(result, time.monotonic() - start)
        if args.record.is_file():
            kept = record.beside(kept, json.loads(args.record.read_text()))
        args.record.write_text(json.dumps(kept, indent=1) + "\n")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    total = Counter[str]()
    for part in ("commands", "cases"):
        for row in result.get(part, {}).get("counts", {}).values():
            total.update(row)
    print(", ".join(f"{number} {kind}" for kind, number in total.items()))
    return 1 if any(total[kind] for kind in record.FAULTS) else 0


if __name__ == "__main__":
    sys.exit(main())
