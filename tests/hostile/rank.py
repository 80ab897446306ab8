"""The rank that `ep-plugin generate` starts, run in the watched process itself.

A process of its own would be out of the hook's sight. What is put in place of `subprocess` knows
one command line, that of a rank, and refuses every other.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Mapping
from importlib import import_module
from types import SimpleNamespace
from typing import Any, BinaryIO

start: Any = import_module("ep_plugin.commands.generate.start")  # the package's is a function


def here() -> None:
    """Let `generate` run its rank in this process, from now on."""
    start.subprocess = SimpleNamespace(Popen=InThisProcess)


class InThisProcess:
    """What `subprocess.Popen` gives, of a rank that has ended when it is there."""

    def __init__(self, command: list[str], stderr: BinaryIO, env: Mapping[str, str]) -> None:
        *known, job = command
        if known != [sys.executable, "-m", start.LOADER, start.WORKER] or env["WORLD_SIZE"] != "1":
            raise AssertionError(f"generate starts {command}")
        before = dict(os.environ)
        os.environ.update(env)
        kept = os.dup(2)
        sys.stderr.flush()
        os.dup2(stderr.fileno(), 2)
        try:
            self.returncode: int = import_module(start.WORKER).main([job])
        except BaseException:
            traceback.print_exc()
            self.returncode = 1
        finally:
            with contextlib.suppress(OSError):
                sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            for name in os.environ.keys() - before.keys():
                del os.environ[name]
            os.environ.update(before)

    def poll(self) -> int:
        return self.returncode

    def wait(self) -> Any:
        return self.returncode

    def kill(self) -> None:
        """Nothing is left of it."""
