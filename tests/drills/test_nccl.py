"""Under NCCL: a stopped rank is named before the watchdog aborts the process that waits for it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from fault import COMBINE, HERE, ROOT, Fault
from loop import LOCAL, MOE, RUN, SCRIPT, SHAPE

pytestmark = [
    *(pytest.mark.multi_gpu, pytest.mark.megatron),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
]
FAR = 20  # the iteration of the fault
WATCHDOG = "Watchdog caught collective operation timeout"


@pytest.mark.parametrize("watch", [(), ("--ep-watch-ranks", "10")])
def test_the_sentence_comes_before_the_watchdog(watch: tuple[str, ...], tmp_path: Path) -> None:
    fault = Fault("stop_for_good", COMBINE, FAR)
    flags = ("--train-iters", "40", "--expert-model-parallel-size", "2", "--eval-iters", "0")
    flags += ("--bf16", "--distributed-timeout-minutes", "1", *LOCAL)
    script = [str(HERE / "faulty.py"), SCRIPT, *RUN, *SHAPE, *MOE, *flags, *watch]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    drill = {"DRILL": json.dumps(asdict(fault)), "DRILL_FOLDER": str(tmp_path)}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, **drill}
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *launcher, "-m", "ep_plugin.run", *script],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        # How long torch takes to end the process after its message is its own.
        text = until(process, log, WATCHDOG)
        assert (tmp_path / "sessions").is_file(), text[-6000:]
    finally:
        sessions = tmp_path / "sessions"
        for line in sessions.read_text().split() if sessions.is_file() else ():
            try:
                os.killpg(int(line), signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.kill()
        process.wait()
    said = re.search(
        r"rank 1 \(\S+, pid \d+\) (is stopped|has not been heard of for \d+ s); "
        rf"it was last {COMBINE}, iteration {FAR}; "
        r"rank 0 waits for it in (dispatch|combine) of layer \d",
        text,
    )
    assert said, text[-6000:]
    assert WATCHDOG in text, text[-6000:]
    assert said.start() < text.index(WATCHDOG)


def until(process: subprocess.Popen[bytes], log: Path, words: str) -> str:
    """Return what is in the log once the words are, or the process has ended."""
    while True:
        ended = process.poll() is not None
        text = log.read_text(errors="replace")
        if ended or words in text:
            return text
        time.sleep(1)
