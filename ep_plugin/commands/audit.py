"""`ep-plugin audit`: is a checkpoint whole, and is every expert in it once?"""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from ep_plugin.checkpoint.audit import audit

EXAMPLES = """examples:
  ep-plugin audit runs/moe
  ep-plugin audit runs/moe/iter_0001000 --json

Reads every byte of a Megatron torch_dist checkpoint, one chunk at a time, and needs no Megatron.
Checked: the parts of each tensor cover it exactly once; every expert of every layer is there once,
with its router; experts that were trained differ; shapes and dtypes agree; no value is nan or inf;
every parameter has its moments. In training, --ep-audit-save does it after each save.
Exit code 1: something is wrong with the checkpoint; 2: there is no such checkpoint.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, metavar="CKPT",
        help="torch_dist checkpoint: what --save named, or one iter_NNNNNNN folder",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Audit. Returns 0, or 1 when there is an error; raises ConfigError for no checkpoint."""
    report = audit(args.checkpoint, _progress)
    print(json.dumps(report.as_dict()) if args.json else report.table())
    return 0 if report.passed else 1


@contextlib.contextmanager
def _progress(num_bytes: int) -> Iterator[Callable[[int], object]]:
    with tqdm(total=num_bytes, unit="B", unit_scale=True, unit_divisor=1024, desc="audit") as bar:
        yield bar.update
