"""A HybridModel, where one symbol of `--hybrid-layer-pattern` is one layer and `E` one of experts.

Its layers are numbered by the pattern. A block knows its number and the model's configuration, and
which layers have experts stands in neither; so the pattern is kept with the configuration.
"""

import inspect
from collections.abc import Callable
from typing import Any

from ep_plugin.megatron.seams.patches import Patches

MODEL = "megatron.core.models.hybrid.hybrid_model:HybridModel.__init__"


def changes(patches: Patches) -> None:
    """Keep a model's pattern with its configuration."""
    patches.wrap(
        MODEL, _with_pattern, "layers are built here, whose numbers are those of the pattern"
    )


def _with_pattern(original: Callable[..., None], model: Any, *args: Any, **kwargs: Any) -> None:
    given = inspect.signature(original).bind(model, *args, **kwargs).arguments
    pattern = given.get("hybrid_layer_pattern") or given.get("hybrid_override_pattern")
    given["config"].hybrid_layer_pattern = pattern
    original(model, *args, **kwargs)
