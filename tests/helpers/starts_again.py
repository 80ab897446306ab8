"""Two starts of a rank that differs in the first and is right in the second.

STARTS says how. `in process`: it tries again itself. Else torchrun starts it again, after the two
`differ`, or rank 1 is `killed`, or says that it `fails`, before rank 0 comes. Without Megatron: the
arguments are a namespace, and what compares is the seam of `init_process_group`.
"""

import argparse
import os
import sys
import time

import torch
import torch.distributed as dist

from ep_plugin.megatron.seams import alike


def start(rank: int, seed: int) -> None:
    args = argparse.Namespace(seed=seed, distributed_timeout_minutes=1, rank=rank)
    alike._arguments = lambda: args  # type: ignore[assignment]
    state = alike._state()
    state.layer_class = type("Layer", (), {"typed": {}})
    alike._around_init(state, INIT, ("gloo",), {})
    total = torch.ones(1)
    dist.all_reduce(total)
    print(f"rank {rank} trains with seed {seed}: {total.item():.0f} ranks", flush=True)
    dist.barrier()
    dist.destroy_process_group()


INIT = dist.init_process_group

if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    if os.environ["STARTS"] == "in process":
        try:
            start(rank, seed=rank)
        except SystemExit:
            time.sleep(float(rank))  # ranks come back at different times
        start(rank, seed=7)
        start(rank, seed=7)  # after a start that was fine, too
        sys.exit()
    mark = os.path.join(os.environ["FOLDER"], f"started_{rank}")
    again = os.path.exists(mark)
    with open(mark, "a") as file:
        print(os.environ["TORCHELASTIC_RESTART_COUNT"], file=file)
    if not again and os.environ["STARTS"] != "differ":  # one agent alone counts a restart
        time.sleep(30 * (rank == 0))
        if os.environ["STARTS"] == "fails":
            alike._TO_HEAR = 0.5
            alike.tell("no disk")
        os._exit(1)
    start(rank, seed=7 if again else rank)
