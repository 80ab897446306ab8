"""Time the check for nan and inf before a save, beside the save itself, at the size of one rank.

    python benchmarks/check_save.py --parameters 1e9 2e9 --output ROWS.json     on a GPU
    python benchmarks/check_save.py --parameters 1e8            on a CPU, for the ratio of the two

A rank's state: weights in bf16, master weights and two moments in fp32, cut into tensors as a model
of that size has them. The save is torch's own of the same tensors, `torch.distributed.checkpoint`,
which Megatron's torch_dist format is made of; its files are flushed to the disk.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from ep_plugin.checkpoint.finite import any_nonfinite
from ep_plugin.commands.bench.figures import Row, make_row, merge, read, write
from ep_plugin.commands.bench.measure import Timing

PARTS = {
    "": torch.bfloat16,
    **dict.fromkeys(("fp32_param.", "exp_avg.", "exp_avg_sq."), torch.float32),
}


def state_of(parameters: float, device: torch.device) -> dict[str, Tensor]:
    """Return the tensors of a rank: matrices of 16M values, and a vector of 4096 beside each."""
    sizes = [4096 * 4096, 4096] * max(1, round(parameters / (4096 * 4096)))
    return {
        f"{prefix}{number}": torch.randn(size, device=device, dtype=dtype)
        for prefix, dtype in PARTS.items()
        for number, size in enumerate(sizes)
    }


def timed(function: Callable[[], object], repeats: int, device: torch.device) -> Timing:
    """Return the median and the ends of a call's wall time in ms, the device's work included."""
    seen = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seen.append(1e3 * (time.perf_counter() - start))
    return Timing(statistics.median(seen), min(seen), max(seen))


def measure(parameters: float, repeats: int, saves: int, where: Path | None) -> list[Row]:
    """Return a row of the check and one of the save, and print both."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = state_of(parameters, device)
    tensors = list(state.values())
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def check() -> bool:
        return bool(any_nonfinite(tensors, device))

    assert not check()
    held = 0.0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        check()
        held = (torch.cuda.max_memory_allocated() - before) / 2**20
    checked = timed(check, repeats, device)
    with tempfile.TemporaryDirectory(dir=where) as folder:

        def save() -> None:
            shutil.rmtree(Path(folder, "saved"), ignore_errors=True)
            dcp.save(state, checkpoint_id=Path(folder, "saved"), no_dist=True)

        saved = timed(save, saves, device)
    tensors[-1].view(-1)[-1] = float("nan")
    assert check()  # what was timed sees one value of all
    shape = f"{parameters:.3g} parameters"
    print(
        f"{shape}, {size / 1e9:.1f} GB in {len(tensors)} tensors: check {checked.median:.2f} ms "
        f"({size / checked.median / 1e6:.0f} GB/s, {held:.1f} MiB of memory), save "
        f"{saved.median:.0f} ms ({size / saved.median / 1e6:.2f} GB/s): "
        f"{100 * checked.median / saved.median:.3f} % of the save",
        flush=True,
    )
    backends = {"check": "ep_plugin", "save": "torch.distributed.checkpoint"}
    return [
        make_row(
            *(device, taken),
            bench="check_save",
            op=op,
            shape=shape,
            backend=backends[op],
            gbps=size / taken.median / 1e6,
            saved_mib=size / 2**20,
        )
        for op, taken in (("check", checked), ("save", saved))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=float, nargs="+", default=[1e8], help="of a rank")
    parser.add_argument("--repeats", type=int, default=20, help="of the check")
    parser.add_argument("--saves", type=int, default=2, help="times that the state is saved")
    parser.add_argument("--folder", type=Path, help="where to save; default: a temporary folder")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(1)
    for parameters in args.parameters:
        rows = measure(parameters, args.repeats, args.saves, args.folder)
        if args.output is not None:
            write(args.output, merge(read(args.output), rows))


if __name__ == "__main__":
    main()
