"""A run that ends well is no failed start: `recipes/run.sh` counts those in a file it names."""

import os
from pathlib import Path

STARTS = "EP_PLUGIN_STARTS"  # the file's path; a line for each start since one ended well


def forget_starts() -> None:
    """Take the file of failed starts away; called when the script has ended with code 0.

    Not earlier: the last save and the end of those in the background come after training.
    """
    named = os.environ.get(STARTS)
    if named and os.environ.get("RANK", "0") == "0":
        try:
            Path(named).unlink(missing_ok=True)
        except OSError as error:
            why = error.strerror or type(error).__name__
            print(f"ep_plugin: {named} cannot be removed ({why}), so this run counts as failed")
