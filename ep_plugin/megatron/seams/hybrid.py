"""A HybridModel, where one symbol of `--hybrid-layer-pattern` is one layer and `E` one of experts.

Its layers are numbered by the pattern. A block knows its number and the model's configuration, and
which layers have experts stands in neither; so the pattern is kept with the configuration, until
`uninstall`.
"""

import inspect
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ep_plugin.megatron.seams.patches import Patches

MODEL = "megatron.core.models.hybrid.hybrid_model:HybridModel.__init__"
NAME = "hybrid_layer_pattern"
_ABSENT = object()


class KeptPatterns:
    """Takes patterns from configurations again when it is left."""

    def __init__(self) -> None:
        self.kept: list[tuple[weakref.ref[Any], Any]] = []  # configuration, what it had before

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self.kept:
            reference, before = self.kept.pop()
            config = reference()
            if config is None:
                continue
            if before is not _ABSENT:
                setattr(config, NAME, before)
            elif NAME in vars(config):
                delattr(config, NAME)

    def with_pattern(
        self, original: Callable[..., None], model: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Build a HybridModel whose configuration has its pattern."""
        given = inspect.signature(original).bind(model, *args, **kwargs).arguments
        config = given["config"]
        self.kept.append((weakref.ref(config), vars(config).get(NAME, _ABSENT)))
        setattr(config, NAME, given.get(NAME) or given.get("hybrid_override_pattern"))
        original(model, *args, **kwargs)


def changes(patches: Patches) -> None:
    """Keep a model's pattern with its configuration."""
    kept = KeptPatterns()
    why = "layers are built here, whose numbers are those of the pattern"
    patches.wrap(MODEL, kept.with_pattern, why)
    patches.enter(kept, f"{why}; takes them from configurations again")
