"""What a piece of Python did while it ran: an audit hook writes down every act that matters.

A hook cannot be taken away, so it is installed in a forked child,
or switched on and off by `Watch`.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

import torch

from tests.hostile import pickles

STARTS = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "os.fork", "os.forkpty",
    "pty.spawn", "subprocess.Popen",
)  # fmt: skip
# Acts that no reading of a file needs. Where a healthy run does one, it is allowed by its name.
ACTS = (
    *STARTS, "ctypes.dlopen", "webbrowser.open", "urllib.Request",
    "pickle.find_class", "cpython.run_command", "cpython.run_file", "cpython.run_module",
    "code.__new__", "function.__new__", "builtins.input", "os.putenv", "os.kill",
    "signal.pthread_kill",
    "sys.addaudithook", "sys.settrace", "sys.setprofile", "ftplib.connect", "smtplib.connect",
)  # fmt: skip
SOCKETS = (
    "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
    "socket.sendmsg", "socket.gethostbyaddr", "socket.getnameinfo", "http.client.connect",
)  # fmt: skip
# Event -> which of its arguments are paths that change, each with that of the folder it is in.
CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.remove": ((0, 1),), "os.rename": ((0, 2), (1, 3)), "os.mkdir": ((0, 2),), "os.rmdir": ((0,
    1),),
    "os.symlink": ((1, 2),), "os.link": ((1, 3),), "os.truncate": ((0, None),), "os.chmod": ((0,
    2),),
    "os.chown": ((0, 3),), "os.utime": ((0, 3),), "os.setxattr": ((0, None),),
    "shutil.rmtree": ((0, 1),), "shutil.move": ((0, None), (1, None)), "shutil.copyfile": ((1,
    None),),
    "shutil.unpack_archive": ((1, None),),
}  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MANY = 2000  # acts that are kept of one case
HARMLESS = ("/dev/null", "/dev/tty")
# how a text is spelled: what the codecs of encodings import
CODECS = re.compile(r"(encodings|stringprep|unicodedata|_multibytecodec|_codecs_\w+)(\.|$)")


@dataclass
class Watch:
    """Acts that were seen, each as (what, words); `allowed` has those of healthy runs."""

    writable: tuple[Path, ...] = ()
    allowed: frozenset[tuple[str, str]] = frozenset()
    active: bool = False
    seen: list[tuple[str, str]] = field(default_factory=list)
    opened: set[str] = field(default_factory=set)

    def install(self) -> None:
        """Add the hook to this process, for good."""
        sys.addaudithook(self._hook)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Write down what happens inside."""
        self.active = True
        try:
            yield
        finally:
            self.active = False

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        self.active = False  # looking must not be looked at
        try:
            self._look(event, args)
        finally:
            self.active = True

    def _look(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            self._open(*args)
        elif event == "os.mkdir" and os.path.isdir(args[0]):
            return  # which fails
        elif event in CHANGES:
            for path, folder in CHANGES[event]:
                inside = args[folder] if folder is not None and folder < len(args) else -1
                self._change(event, args[path], inside)
        elif event == "pickle.find_class" and is_dtype(*args):
            return  # in `.metadata` that we wrote anew
        elif event in ACTS or event in SOCKETS:
            self._note(event, _words(event, args))
        elif event == "import":
            self._import(args[0])
        elif event == "compile" and _is_planted(args[0], args[1]):
            self._note("compile", pickles.MARK)
        elif event == "exec" and _is_planted_code(args[0]):
            self._note("exec", pickles.MARK)

    def _note(self, what: str, words: str) -> None:
        act = (what, words[:200])
        if act not in self.allowed and act not in self.seen and len(self.seen) < MANY:
            self.seen.append(act)

    def _open(self, path: Any, mode: Any, flags: Any) -> None:
        if isinstance(path, int):
            return
        if os.path.isdir(path):
            return  # to write it fails, or makes a file without a name, gone when it is closed
        if isinstance(flags, int) and flags & WRITING:
            self._change("open", path)
        else:
            self.opened.add(os.path.abspath(os.fsdecode(path)))

    def _change(self, event: str, path: Any, folder: Any = -1) -> None:
        if isinstance(path, int):
            return
        text = os.fsdecode(path)
        if isinstance(folder, int) and folder >= 0:
            text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
        if text in HARMLESS or "\0" in text:
            return
        real = Path(os.path.realpath(text))
        if event in ("os.remove", "os.rename", "os.symlink"):  # of the link itself
            real = Path(os.path.realpath(os.path.dirname(os.path.abspath(text)))) / Path(text).name
        if not any(real == place or place in real.parents for place in self.writable):
            self._note(f"write by {event}", str(real))

    def _import(self, name: str) -> None:
        if name.split(".")[0] == "ep_plugin" or CODECS.match(name):
            return
        self._note("import", name)


def _words(event: str, args: tuple[Any, ...]) -> str:
    if event == "pickle.find_class":
        return f"{args[0]}.{args[1]}"
    if event in ("function.__new__", "code.__new__"):
        return ""
    if event == "os.putenv":
        return repr(args[0])
    return repr(args[0] if args and not event.startswith("socket") else args)


def is_dtype(module: str, name: str) -> bool:
    """Whether a name is that of a dtype, which runs nothing."""
    return module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)


def _is_planted(source: Any, filename: Any) -> bool:
    return any(pickles.MARK.encode() in _bytes(part) for part in (source, filename))


def _is_planted_code(code: Any) -> bool:
    """Whether code that is about to run names the mark; the project's own modules are known."""
    if not isinstance(code, CodeType) or "hostile" in code.co_filename:
        return False
    return pickles.MARK in repr((code.co_consts, code.co_names, code.co_filename))


def _bytes(part: Any) -> bytes:
    if isinstance(part, bytes | bytearray):
        return bytes(part)
    return part.encode("utf-8", "replace") if isinstance(part, str) else b""


def listing(folder: Path, without: tuple[Path, ...] = ()) -> dict[str, tuple[Any, ...]]:
    """Return everything below a folder, links not followed: kind, size and time of change."""
    found: dict[str, tuple[Any, ...]] = {}
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                path = Path(entry.path)
                if path in without:
                    continue
                state = entry.stat(follow_symlinks=False)
                plain = (state.st_size, state.st_mtime_ns)
                is_folder = entry.is_dir(follow_symlinks=False)
                found[entry.path] = (state.st_mode, *(() if is_folder else plain))
                if is_folder:
                    waiting.append(path)
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return what is new, gone or other, one line each."""
    return [
        f"{'new' if path not in before else 'gone' if path not in after else 'changed'}: {path}"
        for path in sorted({*before, *after})
        if before.get(path) != after.get(path)
    ]
