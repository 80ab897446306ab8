"""The drills: a fault on one of two ranks, what is said, and what the next start has lost.

Each is a run of Megatron's loop on gloo ranks, EP 2, that ends or goes on, and a second one that
resumes from what it saved. `whole` is the run without a fault that both are compared with.
"""

import json
import os
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from left import left, shared
from loop import MOE, RUN, SCRIPT, SHAPE
from warm import run_script

from ep_plugin.commands.report.events import TRAIN, Series, read_run

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
LAST, SAVES = 8, 4  # iterations of a run, and from save to save
# Checks of the first dispatches have ended: an iteration has two of each layer.
FAULTY = 6
WATCHED = ("--ep-watch-ranks", "1")


@dataclass(frozen=True)
class Fault:
    """What goes wrong, on which rank, where."""

    kind: str
    where: str
    iteration: int = FAULTY
    rank: int = 1
    measures: bool = False


@dataclass(frozen=True)
class Drill:
    """A fault, and what must come of it."""

    name: str
    title: str  # for the table
    fault: Fault
    says: str  # a pattern
    comes: str  # of it, for the table
    goes_on: bool = False
    flags: tuple[str, ...] = ()


DISPATCH, COMBINE = "in dispatch of layer 2", "in combine of layer 2"
NAMED = r"rank 1 \(\S+, pid \d+\) {}, iteration {}"
DRILLS = (
    Drill(
        "kill_in_dispatch",
        "SIGKILL in a dispatch",
        Fault("kill", DISPATCH),
        NAMED.format("died; it was last in dispatch of layer 2", FAULTY),
        "the run ends; rank, layer and phase are named at once, and below the others' traces",
    ),
    Drill(
        "kill_in_combine",
        "SIGKILL in a combine",
        Fault("kill", COMBINE),
        NAMED.format("died; it was last in combine of layer 2", FAULTY),
        "the same",
    ),
    Drill(
        "kill_in_a_save",
        "SIGKILL in a save, files half-written",
        Fault("kill_in_a_save", "in a save", LAST),
        NAMED.format("died; it was last in a save", LAST),
        "the same, with `in a save`; the tracker names the checkpoint before",
    ),
    Drill(
        "kill_between_saves",
        "SIGKILL between saves, of rank 0, while it waits for data",
        Fault("kill", "waiting for data", rank=0),
        NAMED.format("died; it was last waiting for data", FAULTY).replace("rank 1", "rank 0"),
        "the same, with `waiting for data`",
    ),
    Drill(
        "stop",
        "SIGSTOP for 3 s in the experts, then SIGCONT",
        Fault("stop", "in the experts of layer 2"),
        NAMED.format("is stopped; it was last in the experts of layer 2", FAULTY),
        "after `--ep-watch-ranks` seconds (1 here) the sentence names rank, layer and phase",
        goes_on=True,
        flags=WATCHED,
    ),
    Drill(
        "full_disk",
        "no room for a file of a save",
        Fault("fill_disk", "in a save", LAST),
        r"CheckpointException ranks:.*\[1\]|ep_plugin: error: .*rank 1",
        "no rank takes the save for whole; the tracker names the checkpoint before",
    ),
    Drill(
        "nan",
        "NaN in a weight of one rank's experts",
        Fault("nan", "in a save", LAST),
        r"ep_plugin: error: .*nan",
        "nothing is saved (`--ep-check-save`); the tracker names the checkpoint before",
    ),
    Drill(
        "data_ends_early",
        "data that ends early on one rank",
        Fault("end_data", "waiting for data"),
        NAMED.format("failed with StopIteration waiting for data", FAULTY),
        "the rank's own error, and the sentence on the others",
    ),
)


@dataclass(frozen=True)
class Ended:
    """A run that is over."""

    code: int
    text: str  # both streams
    folder: Path
    losses: Series = field(default_factory=list)
    seconds: float = 0.0  # from the fault to the end
    left: tuple[str, ...] = ()  # processes, sockets that listen, shared memory

    @property
    def saved(self) -> Path:
        return self.folder / "saved"

    @property
    def newest(self) -> int:
        """The iteration that the next start resumes from."""
        return int((self.saved / "latest_checkpointed_iteration.txt").read_text())


NO_FAULT = Fault("", "", -1, -1)


def train(
    folder: Path,
    fault: Fault = NO_FAULT,
    *flags: str,
    ranks: int = 2,
    ep: int = 2,
    last: int = LAST,
    saves: int = SAVES,
    load: Path | None = None,
) -> Ended:
    """Run until it ends, and look at what it leaves behind."""
    folder.mkdir(parents=True)
    where = ("--save", str(folder / "saved"), "--save-interval", str(saves))
    where += ("--tensorboard-dir", str(folder / "losses"))
    where += () if load is None else ("--load", str(load))
    shape = ("--train-iters", str(last), "--expert-model-parallel-size", str(ep))
    environment = {
        **os.environ,
        **{"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        **{"DRILL": json.dumps(asdict(fault)), "DRILL_FOLDER": str(folder)},
    }
    script = ["-m", "ep_plugin.run", str(HERE / "faulty.py"), SCRIPT]
    # What is not decayed has the same rates in a shorter run.
    constant = ("--lr-decay-style", "constant", "--eval-iters", "0")
    before = shared()
    done = run_script(
        ranks, [*script, *RUN, *SHAPE, *MOE, *shape, *where, *constant, *flags], environment
    )
    end, at = time.time(), folder / "fault"
    seconds = end - float(at.read_text()) if at.exists() else 0.0
    text = done.stdout + done.stderr
    events = [*(folder / "losses").glob("*tfevents*")] if done.returncode == 0 else []
    losses = read_run(folder / "losses").series(TRAIN) if events else []
    return Ended(done.returncode, text, folder, losses, seconds, left(folder, before))


def said(drill: Drill, ended: Ended) -> str | None:
    """Return the line in which a run says what happened; None if it does not."""
    lines = [line for line in ended.text.splitlines() if re.search(drill.says, line)]
    return lines[0] if lines else None
