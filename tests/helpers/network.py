"""What connects to where: a process and all that it starts, seen from inside and from outside."""

import os
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HOOK = Path(__file__).parent / "no_network"
CALLS = "connect,sendto,sendmsg,sendmmsg,bind"
# What strace prints of an address that is not of this machine's own.
_ADDRESS = re.compile(r"sa_family=AF_INET6?.*?(?:inet_addr\(|inet_pton\(AF_INET6, )\"([^\"]+)\"")
_SOCKET = re.compile(r"(\d+) +\w+\((\d+),")
# As a query has them: 127.x.y.z the other way round, ::1, and the host's own name.
_OWN_NAMES = (r"\003127\7in-addr", r"\3ip6\4arpa", socket.gethostname(), r"\tlocalhost")
_LOCAL = re.compile(r"127\.|::1$|::ffff:127\.|0\.0\.0\.0$|::$")


@dataclass(frozen=True)
class Watched:
    """Where a run's connections are noted."""

    folder: Path

    def environment(self) -> dict[str, str]:
        """Return what makes Python refuse, and note, every connection to other machines."""
        path = os.pathsep.join(filter(None, (str(HOOK), os.environ.get("PYTHONPATH"))))
        return {"PYTHONPATH": path, "EP_TEST_NETWORK": str(self.folder / "refused")}

    def traced(self, name: str = "strace") -> list[str]:
        """Return what to put before a command: native code is seen by strace, where it is."""
        program = shutil.which("strace")
        if program is None:
            return []
        flags = (
            "-f",
            "--seccomp-bpf",
            "-qq",
            "-e",
            f"trace={CALLS}",
            "-e",
            "signal=none",
            "-s",
            "200",
        )
        return [program, *flags, "-o", str(self.folder / name)]

    def others(self) -> list[str]:
        """Return every attempt to reach another machine, one line each."""
        refused = self.folder / "refused"
        found = refused.read_text().splitlines() if refused.is_file() else []
        for trace in self.folder.glob("strace*"):
            found += _others_in(trace.read_text(errors="replace").splitlines())
        return found


def _others_in(lines: list[str]) -> Iterator[str]:
    """Yield the lines about other machines; torch asks for the names of this machine's addresses,
    which the C library may pass on to a name server."""
    name_servers = set[tuple[str, str]]()  # sockets: process, descriptor
    for line in lines:
        socket_of = _SOCKET.match(line)
        key = (socket_of[1], socket_of[2]) if socket_of else ("", "")
        if "connect(" in line or "bind(" in line:
            name_servers.discard(key)  # a descriptor is used again
        if "htons(53)" in line and "connect(" in line:
            name_servers.add(key)
        elif key in name_servers:
            if not any(own in line for own in _OWN_NAMES):
                yield line
        else:
            for address in _ADDRESS.findall(line):
                if not _LOCAL.match(address):
                    yield line
