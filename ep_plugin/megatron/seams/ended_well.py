"""A run that ends well is no failed start: `recipes/run.sh` counts those beside checkpoints."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ep_plugin.megatron.seams.patches import Patches

TRAINING = "megatron.training.training"
STARTS = "starts.txt"  # a line for each start since one ended well; recipes/run.sh writes it


def changes(patches: Patches) -> None:
    """Take the file of failed starts away when training ends by itself, or is asked to end."""
    training = importlib.import_module(TRAINING)

    def with_end(original: Callable[..., Any], *rest: Any, **settings: Any) -> Any:
        try:
            result = original(*rest, **settings)
        except SystemExit as end:  # --exit-interval, a limit of time, a signal that it handles
            if not end.code:
                _forget(training.get_args())
            raise
        _forget(training.get_args())
        return result

    patches.wrap(f"{TRAINING}:train", with_end, "a run whose training ends by itself did not fail")


def _forget(args: Any) -> None:
    if args.save and os.environ.get("RANK", "0") == "0":
        (Path(args.save) / STARTS).unlink(missing_ok=True)
