"""Are tensors that were only renamed the source's? Each is read back, and its bits compared."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ep_plugin.checkpoint.formats.megatron_dist import open_checkpoint
from ep_plugin.checkpoint.names import plain
from ep_plugin.checkpoint.target import Target
from ep_plugin.commands.convert.compare import REPORT, Differs
from ep_plugin.commands.convert.request import Request


def compare_kept(request: Request, target: Target, folder: Path) -> dict[str, Any]:
    """Compare what was written in `folder` with the source, one tensor at a time; keep the report.

    Raises Differs for a tensor whose bits, dtype or shape are others, or that is missing.
    """
    written = open_checkpoint(folder)
    if target.model.spelling == "plain":
        written = plain(written, target.args)
    expected = target.model.source
    wrong = sorted(expected.tensors.keys() ^ written.tensors.keys())
    for name in expected.tensors.keys() & written.tensors.keys():
        if not _same_bits(expected.read_tensor(name), written.read_tensor(name)):
            wrong.append(name)
    report = {
        **({"kept_layers": list(request.keep_layers)} if request.keep_layers else {}),
        "tensors": len(expected.tensors),
        "differ": wrong,
        "same": not wrong,
        "passed": not wrong,
    }
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    if wrong:
        raise Differs(
            f"comparison failed: {wrong[0]} and {len(wrong) - 1} more tensors are not the "
            f"source's, bit for bit; {request.target} was not written"
        )
    print(
        f"all {len(expected.tensors)} tensors read back are the source's, bit for bit",
        file=sys.stderr if request.json else sys.stdout,
    )
    return report


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bytes."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(a, b)
