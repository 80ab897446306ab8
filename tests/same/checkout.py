"""A checkout of this project, and how its commands and scripts are run."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

HOST = "127.0.0.1"
CLI, RUN = ("-m", "ep_plugin.cli"), ("-m", "ep_plugin.run")


FINISHED = "finished"


class DidNotRun(Exception):
    """A case that is to be compared ended with an error."""


def each(names: Iterable[str], function: Callable[[str], dict[str, str]]) -> dict[str, str]:
    """Return NAME/KEY -> value of every case, and NAME/run: `finished`, or why it did not."""
    found = {}
    for name in names:
        found[f"{name}/run"] = FINISHED
        try:
            found |= {f"{name}/{key}": value for key, value in function(name).items()}
        except DidNotRun as error:
            found[f"{name}/run"] = str(error)
    return found


@dataclass(frozen=True)
class Done:
    """A finished run."""

    argv: tuple[str, ...]
    code: int
    out: str
    err: str

    def check(self) -> "Done":
        """Return self; raises DidNotRun unless the exit code is 0."""
        if self.code != 0:
            said = "\n".join((self.err or self.out).splitlines()[-4:])
            raise DidNotRun(f"{' '.join(self.argv[:6])} ... ended with {self.code}:\n{said}")
        return self


class Checkout:
    """One checkout with a folder of its own for what it writes.

    Runs are forked from a worker process that has imported Megatron and this checkout's package.
    """

    def __init__(self, root: Path, folder: Path, release: Path | None = None) -> None:
        self.root, self.folder = root.resolve(), folder
        folder.mkdir(parents=True)
        paths = [str(self.root), *([str(release)] if release else [])]
        self.environment = {
            **os.environ,
            "MODEL_CLASS": "gpt",  # what older checkouts train
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "EP_PLUGIN_DEVICE": "cpu",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
            "TQDM_DISABLE": "1",
            "COLUMNS": "100",
        }
        self._lock, self._runs = threading.Lock(), 0
        with (folder / "worker.err").open("w") as errors:
            self._worker = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("worker.py"))],
                cwd=folder,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ready(self) -> None:
        """Wait until the worker runs; raises DidNotRun when it has another package, or none."""
        said = self._worker.stdout.readline()
        expected = self.root / "ep_plugin" / "__init__.py"
        if not said or Path(json.loads(said)).resolve() != expected:
            errors = (self.folder / "worker.err").read_text()[-3000:]
            raise DidNotRun(f"{expected} could not be imported; got {said!r}\n{errors}")

    def close(self) -> None:
        """End the worker."""
        self._worker.stdin.close()
        self._worker.wait()

    def run(
        self,
        *argv: str,
        ranks: int = 0,
        cwd: Path | None = None,
        kill_at: int = 0,
        **environment: str,
    ) -> Done:
        """Run `python ARGV` and return what it said; `ranks` 0 starts it without torchrun's words.

        `kill_at` lets it kill itself when it has synced as many files.
        """
        store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False) if ranks else None
        if store is not None:
            environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
            environment |= {"MASTER_ADDR": HOST, "MASTER_PORT": str(store.port)}
            environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        with self._lock:
            self._runs += 1
            out, err = (self.folder / f"run{self._runs}.{name}" for name in ("out", "err"))
            out.touch()
            err.touch()
            task: dict[str, Any] = {"ranks": ranks or 1, "argv": argv, "kill_at": kill_at}
            task |= {"cwd": str(cwd or self.folder), "environment": environment}
            task |= {"out": str(out), "err": str(err)}
            self._worker.stdin.write(json.dumps(task) + "\n")
            self._worker.stdin.flush()
            code = json.loads(self._worker.stdout.readline())
        return Done(argv, code, self.plain(out.read_text()), self.plain(err.read_text()))

    def run_cold(self, *argv: str, cwd: Path | None = None) -> Done:
        """Run `python ARGV` in a process of its own, which may start others."""
        done = subprocess.run(
            [sys.executable, *argv],
            cwd=cwd or self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        return Done(argv, done.returncode, self.plain(done.stdout), self.plain(done.stderr))

    def plain(self, text: str) -> str:
        """Return `text` without where the checkout and its folder are."""
        return text.replace(str(self.folder), "FOLDER").replace(str(self.root), "CHECKOUT")
