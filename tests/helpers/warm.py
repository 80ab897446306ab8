"""Start a script on gloo ranks as torchrun does, from a process that has imported Megatron.

A rank's first ten seconds are imports; here they are forked. What torchrun itself does to a script
is seen by `test_applied.py`, `test_releases.py`, `test_parity.py` and the quickstart.
"""

import atexit
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from spawn import preload
from torch.distributed import TCPStore

HOST = "127.0.0.1"
GRACE = 5  # seconds between a rank's failure and the end of the others

preload(
    "ep_plugin.megatron.block.adapter",
    "ep_plugin.checkpoint.whole",
    "ep_plugin.megatron.arguments.checks",
    "ep_plugin.megatron.seams.install",  # and all that installs; nothing is installed yet
    "ep_plugin.moe.dispatcher.alltoall",
    "ep_plugin.moe.experts.gemm.loop",
    "ep_plugin.moe.router.topk",
    "ep_plugin.moe.schedule.serial",
    "megatron.core.datasets.blended_megatron_dataset_builder",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.models.gpt.fine_grained_callables",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.tokenizers.text",  # imports transformers
    "megatron.training.checkpointing",
    "megatron.training.training",
    "torch.utils.tensorboard",
)


def run_script(ranks: int, argv: list[str], environment: dict[str, str]) -> "Done":
    """Run `python ARGV` on each rank; a rank that fails ends the others.

    `argv` begins with a path, or with -m and a module. The exit code is the first that is not 0.
    """
    # As torchrun's agent does: a port that is only looked up may be another's when rank 0 listens.
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    world = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "TORCHELASTIC_USE_AGENT_STORE": True}
    world |= {"MASTER_ADDR": HOST, "MASTER_PORT": store.port}
    common = environment | {name: str(value) for name, value in world.items()}
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        processes = []
        for rank in range(ranks):
            own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(context.Process(target=_rank, args=(argv, own, str(out), str(err))))
            processes[-1].start()
        code = 0
        while alive := [process for process in processes if process.is_alive()]:
            multiprocessing.connection.wait([process.sentinel for process in alive])
            code = code or next((p.exitcode for p in processes if p.exitcode), 0)
            if code:
                for process in alive:
                    process.join(GRACE)  # it may be about to say why
                    process.terminate()
        code = code or next((p.exitcode for p in processes if p.exitcode), 0)
        return Done(argv, code, out.read_text(), err.read_text())


Done = subprocess.CompletedProcess[str]


def torchrun(command: list[str], env: dict[str, str], **_: Any) -> Done:
    """Stand in for `subprocess.run` of torchrun on one node, its output captured."""
    ranks = command.index("--nproc-per-node") + 1
    return run_script(int(command[ranks]), command[ranks + 1 :], env)


def _rank(argv: list[str], environment: dict[str, str], out: str, err: str) -> None:
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        stream.flush()
        with open(path, "a") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    # What a new process would have.
    atexit._clear()
    multiprocessing.set_start_method("fork", force=True)
    # Each rank that saves spawns a queue's server, which would import the script once more.
    contexts: Any = multiprocessing.context
    contexts._concrete_contexts["spawn"] = multiprocessing.get_context("fork")
    code = 1
    try:
        _run(argv)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)  # multiprocessing then ends what the script started


def _run(argv: list[str]) -> None:
    sys.path.insert(0, "")  # which scripts replace by their folder
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
