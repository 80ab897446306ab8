"""Run scripts in forked processes of one checkout, which its caller puts on PYTHONPATH.

Megatron is imported once: a rank's first ten seconds are imports. Each line of stdin is a task
as JSON; each line of the answer is its exit code. Only public names of the package are used.
"""

import atexit
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import runpy
import signal
import sys
import traceback
from importlib import import_module
from typing import Any

PRELOADED = (
    "megatron.core.datasets.blended_megatron_dataset_builder",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.models.gpt.fine_grained_callables",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.tokenizers.text",
    "megatron.training.checkpointing",
    "megatron.training.training",
    "torch.utils.tensorboard",
    "transformers",
)
GRACE = 5  # seconds between a rank's failure and the end of the others


def run_task(task: dict[str, Any]) -> int:
    """Run `python ARGV` on each rank; return the first exit code that is not 0, or 0."""
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(task, rank)) for rank in range(task["ranks"])]
    for process in ranks:
        process.start()
    code = 0
    while alive := [process for process in ranks if process.is_alive()]:
        multiprocessing.connection.wait([process.sentinel for process in alive])
        code = code or next((process.exitcode for process in ranks if process.exitcode), 0)
        for process in alive if code else ():
            process.join(GRACE)  # it may be about to say why
            process.terminate()
    return code or next((process.exitcode for process in ranks if process.exitcode), 0)


def run_rank(task: dict[str, Any], rank: int) -> None:
    """Be one rank: its variables, folder and output, then the script."""
    for path, stream in ((task["out"], sys.stdout), (task["err"], sys.stderr)):
        stream.flush()
        with open(path, "a") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.update(task["environment"])
    if "WORLD_SIZE" in task["environment"]:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    os.chdir(task["cwd"])
    atexit._clear()
    multiprocessing.set_start_method("fork", force=True)
    # Megatron's save would start a queue's server that imports everything once more.
    contexts: Any = multiprocessing.context
    contexts._concrete_contexts["spawn"] = multiprocessing.get_context("fork")
    if task["kill_at"]:
        kill_at_fsync(task["kill_at"])
    sys.exit(run_script(task["argv"]))


def run_script(argv: list[str]) -> int:
    """Run `-m MODULE ARGS` or `SCRIPT ARGS`; return the exit code."""
    code: Any = 0
    sys.path[0] = ""  # as python does for -m; a script replaces it by its folder
    sys.argv = argv[1:] if argv[0] == "-m" else argv
    try:
        if argv[0] == "-m":
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code)


def kill_at_fsync(count: int) -> None:
    """Let this process kill itself after `count` files are safe on disk."""
    original, seen = os.fsync, []

    def counting(descriptor: Any) -> None:
        original(descriptor)
        seen.append(descriptor)
        if len(seen) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = counting


def main() -> None:
    """Import, say from where, and run every task of stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    for name in PRELOADED:
        try:
            import_module(name)
        except ImportError:  # an older release
            print(f"worker: no {name} here", file=sys.stderr)
    package = import_module("ep_plugin")
    _ = package.MoELayer, import_module("ep_plugin.megatron").install
    print(json.dumps(package.__file__), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run_task(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
