"""How long until a layer's first step is done: with nothing compiled yet, and once more.

python benchmarks/start.py [--shapes dsv3 ...] [--recipes off rowwise blockwise] [--output F]

Each start is a process of its own, and its seconds are those of one forward and backward after
torch, the layer and its data are there: compiling kernels and measuring GEMMs. The first start has
empty caches of Triton's and ours, the second what the first left. Rows are as `ep-plugin bench`
writes them, `op` saying which start.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ep_plugin.commands.bench.figures import make_row, merge, read, write
from ep_plugin.commands.bench.measure import Timing, default_device

STEP = """
import sys, time, torch
from ep_plugin.commands.bench.case import make_case
from ep_plugin.commands.bench.measure import default_device
from ep_plugin.commands.bench.ours import build
from ep_plugin.commands.bench.shapes import pick
device = default_device()
case = make_case(pick([sys.argv[1]])[0], "balanced", device)
contender = next(c for c in build(case, sys.argv[2]) if c.backend == sys.argv[3])
leaf = torch.ones(2, device=device, requires_grad=True)
torch.autograd.backward(2 * leaf, torch.ones_like(leaf))  # torch loads parts of itself then
begin = time.perf_counter()
if contender.quantize is not None:
    contender.quantize()
torch.autograd.backward(contender.forward(case.tokens[0]), case.grads[0])
if device.type == "cuda":
    torch.cuda.synchronize()
print(time.perf_counter() - begin)
"""
VARIANTS = {  # of each recipe
    "off": ("bf16", "ep_plugin"),
    "rowwise": ("fp8", "ep_plugin+rowwise"),
    "blockwise": ("fp8", "ep_plugin+blockwise"),
}


def seconds(shape: str, precision: str, backend: str, caches: str) -> float:
    """Return the seconds of a first step in a process with these caches."""
    folders = {"TRITON_CACHE_DIR": f"{caches}/triton", "EP_PLUGIN_CACHE": f"{caches}/ep_plugin"}
    command = [sys.executable, "-c", STEP, shape, precision, backend]
    done = subprocess.run(
        command, env={**os.environ, **folders}, check=True, stdout=subprocess.PIPE, text=True
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    """Start twice for each shape and recipe; print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["dsv3"])
    parser.add_argument("--recipes", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device: torch.device = default_device()
    for shape in args.shapes:
        for precision, backend in [VARIANTS[recipe] for recipe in args.recipes]:
            with tempfile.TemporaryDirectory() as caches:
                for start in ("first start", "second start"):
                    taken = 1000 * seconds(shape, precision, backend, caches)
                    print(f"{shape} {backend:22} {start:13} {taken / 1000:7.2f} s", flush=True)
                    row = make_row(
                        device,
                        Timing(taken, taken, taken),
                        bench="start",
                        op=start,
                        shape=shape,
                        backend=backend,
                        precision=precision,
                        routing="balanced",
                    )
                    if args.output is not None:
                        write(args.output, merge(read(args.output), [row]))


if __name__ == "__main__":
    main()
