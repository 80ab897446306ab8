"""What the drills find of a run that left something behind."""

import os
import socket
import subprocess
import tempfile
from pathlib import Path

from left import SHARED, left, own_sockets, shared


def test_what_is_left_is_found_and_its_processes_are_ended(tmp_path: Path) -> None:
    before, sockets = shared(), own_sockets()
    process = subprocess.Popen(["sleep", "100"], start_new_session=True)
    (tmp_path / "sessions").write_text(f"{process.pid}\n")
    with socket.create_server(("127.0.0.1", 0)):
        (tmp_path / "sockets").write_text("\n".join(own_sockets() - sockets))
        with tempfile.NamedTemporaryFile(dir=SHARED) as held:
            descriptor, forgotten = tempfile.mkstemp(dir=SHARED)
            os.close(descriptor)
            found = left(tmp_path, before, patience=0.0)
            os.unlink(forgotten)
    assert f"process {process.pid}" in found
    assert forgotten in found
    assert held.name not in found
    assert len([text for text in found if text.endswith(" listens")]) == 1
    assert process.wait() < 0
    assert not {*left(tmp_path, before, patience=0.0)} & {*found}
