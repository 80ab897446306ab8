"""Three gloo ranks that run a layer and watch each other, one of them with a fault."""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from spawn import preload

from ep_plugin import MoEConfig, MoELayer, ParallelConfig, RoutingConfig, create_expert_groups
from ep_plugin.moe import watch
from ep_plugin.moe.watch.place import Phase, here

RANKS, FAULTY, ITERATIONS = 3, 20, 30  # the iteration of the fault: dispatches are unchecked
LIMIT = 60  # seconds for what takes two
BUSY = 1.2  # shorter than the time after which a rank that does not move speaks

preload("ep_plugin.moe.watch")


def drill(kind: str, victim: int, output: Path, *, keeps_store: bool) -> list[int | None]:
    """Return the exit codes; what ranks wrote is in `output`.

    `kind` is a signal, or another fault of `_fail`. After `STOP` the victim is woken once it is
    named. With `abort` it is not: the others enter a few places more once it is named, and are
    aborted after a time, as by NCCL's watchdog. Where one does `die` the others are busy, and no
    exchange tells them until later.

    With `keeps_store` rank 0 keeps the rendezvous store, as without torchrun.
    """
    store = None if keeps_store else dist.TCPStore("127.0.0.1", 0, is_master=True)
    world = {"WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    world |= {"MASTER_PORT": free_port() if store is None else store.port}
    world |= {"TORCHELASTIC_USE_AGENT_STORE": store is not None}
    environment = {name: str(value) for name, value in world.items()}
    output.touch()
    context = multiprocessing.get_context("forkserver")
    ranks = [
        context.Process(target=_main, args=(rank, environment, str(output), kind, victim))
        for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    try:
        if kind == "STOP":
            _wait_for("is stopped", output)
            os.kill(ranks[victim].pid or 0, signal.SIGCONT)
        for process in ranks:
            if kind != "abort" or process is not ranks[victim]:
                process.join(LIMIT)
        return [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.join()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _wait_for(words: str, file: Path) -> None:
    end = time.monotonic() + LIMIT
    while words not in file.read_text():
        assert time.monotonic() < end, file.read_text()
        time.sleep(0.05)


def _main(rank: int, environment: dict[str, str], output: str, kind: str, victim: int) -> None:
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment, RANK=str(rank))
    torch.set_num_threads(1)
    code = 0
    try:
        if kind == "abort" and rank != victim:
            timer = threading.Timer(8, os.abort)
            timer.daemon = True
            timer.start()
            threading.Thread(target=_enter_more, args=(Path(output),), daemon=True).start()
        _train(kind, rank == victim)
    except SystemExit:
        pass
    except BaseException:
        traceback.print_exc()
        code = 1
    watch.stop()  # as Python does when it ends; multiprocessing does not
    sys.stderr.flush()
    os._exit(code)


def _enter_more(output: Path) -> None:
    _wait_for("is stopped", output)
    for _ in range(4):
        here.enter(Phase.STEP)


def _train(kind: str, is_victim: bool) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
    watch.start(after=2.0)
    config = MoEConfig(
        hidden_size=8, ffn_hidden_size=8, num_experts=RANKS, routing=RoutingConfig(topk=2)
    )
    layer = MoELayer(config, create_expert_groups(ParallelConfig(world_size=RANKS, ep=RANKS)))
    try:
        for iteration in range(1, ITERATIONS):
            here.begin(iteration)
            if iteration == FAULTY and is_victim:
                time.sleep(0.3)  # the others are waiting, or busy
                _fail(kind)
            elif iteration == FAULTY and kind == "die":
                time.sleep(BUSY)
            layer(torch.randn(4, 8)).sum().backward()
        time.sleep(0.5)  # for the word that the run goes on
    except Exception as error:
        watch.failed(error)
        raise


def _fail(kind: str) -> None:
    if kind == "sleep":
        time.sleep(3.5)
    elif kind == "end":
        sys.exit(0)
    elif kind == "raise":
        raise MemoryError("no room")
    elif kind == "abort":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        os.kill(os.getpid(), getattr(signal, f"SIG{kind}"))
