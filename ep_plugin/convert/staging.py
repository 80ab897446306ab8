"""Write beside the target and rename last, so that a failure leaves nothing half-written behind."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ep_plugin.config import ConfigError


def check_free(target: Path) -> None:
    """Raise ConfigError unless `target` is missing or an empty folder."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"output {target} exists and is not empty; {_sibling(target)} would do")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `target` when the block ends without an error.

    Any exception, KeyboardInterrupt too, removes it.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sibling(target: Path) -> Path:
    candidates = (target.with_name(f"{target.name}-{number}") for number in range(2, 1_000_000))
    return next(path for path in candidates if not path.exists())
