"""What torchrun's own report says of a rank that ended with a sentence of ours.

The report is pages long, and the last that a user sees. torchrun names each rank a file, and ends
its report with what the first rank that failed left there.
"""

import contextlib
import json
import os
import time
from pathlib import Path

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # set by torchrun, and by what starts ranks as it does


def leave_for_torchrun(sentence: str) -> None:
    """Leave why this rank ends, in the form that torch's `record` has; nothing without torchrun."""
    file = os.environ.get(ERROR_FILE)
    if not file:
        return
    extra = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):  # the sentence is on the screen all the same
        Path(file).write_text(json.dumps({"message": {"message": sentence, "extraInfo": extra}}))
