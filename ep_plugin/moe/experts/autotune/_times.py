"""The file that keeps what was measured: key -> milliseconds of each backend, as JSON."""

import json
import logging
import os
import tempfile
from pathlib import Path

Times = dict[str, float]

logger = logging.getLogger(__name__)


def path() -> Path:
    """Return $EP_PLUGIN_CACHE/gemm.json, or ~/.cache/ep_plugin/gemm.json."""
    folder = os.environ.get("EP_PLUGIN_CACHE") or Path.home() / ".cache" / "ep_plugin"
    return Path(folder) / "gemm.json"


def read(file: Path) -> dict[str, Times]:
    """Return the times of every key; none, with a warning, if the file cannot be read or parsed."""
    try:
        kept = json.loads(file.read_text())
        return {
            key: {name: float(milliseconds) for name, milliseconds in times.items()}
            for key, times in kept.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        logger.warning("gemm auto: %s is ignored (%s: %s)", file, type(error).__name__, error)
        return {}


def write(file: Path, key: str, times: Times) -> None:
    """Add `times` to the file atomically, so that no reader sees half of it.

    If ranks write at the same moment, the last one wins; the next start measures again what was
    lost. If the file cannot be written, there is a warning.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(read(file) | {key: times}, indent=1)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
            new.write(text)
        os.replace(new.name, file)
    except OSError as error:
        logger.warning("gemm auto: times are not kept, so each start measures (%s)", error)
