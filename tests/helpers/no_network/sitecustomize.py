"""On PYTHONPATH: every Python process of a test may connect to this machine alone.

Each attempt is written into the file that EP_TEST_NETWORK names, and others than these are refused.
"""

import os
import sys
from typing import Any

LOCAL = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "")
EVENTS = {  # event -> which argument has the address, or the name that is looked up
    "socket.connect": 1,
    "socket.sendto": 1,
    "socket.sendmsg": 1,
    "socket.bind": 1,
    "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0,
    "socket.gethostbyaddr": 0,
    "urllib.Request": 0,
}


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if event not in EVENTS:
        return
    address = args[EVENTS[event]]
    if isinstance(address, str) and event in ("socket.connect", "socket.bind", "socket.sendto"):
        return  # a socket in the file system
    host = address[0] if isinstance(address, tuple) else address
    host = host.decode() if isinstance(host, bytes) else host
    if host is None or host in LOCAL:
        return
    with open(os.environ["EP_TEST_NETWORK"], "a") as stream:
        stream.write(f"{event} {address!r}\n")
    raise ConnectionRefusedError(f"{event} {address!r}: no connection but to this machine")


if os.environ.get("EP_TEST_NETWORK"):
    sys.addaudithook(_hook)
