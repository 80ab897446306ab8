"""`--rope-scaling-factor`, which Megatron 0.19 drops between its arguments and a GPT.

Its loop makes a GPT's configuration of the arguments, and takes `--use-rope-scaling` along without
the factor: the model is built with Megatron's default of 8, whatever was typed.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from ep_plugin.megatron.seams.patches import Patches

MODULE = "megatron.training.argument_utils"
CONFIG = "gpt_config_from_args"


def changes(patches: Patches) -> None:
    """Take the factor along where Megatron makes such a configuration; else do nothing."""
    if importlib.util.find_spec(MODULE) is None:
        return
    if hasattr(importlib.import_module(MODULE), CONFIG):
        patches.wrap(
            f"{MODULE}:{CONFIG}",
            _with_factor,
            "it takes --use-rope-scaling along and leaves --rope-scaling-factor at 8",
        )


def _with_factor(original: Callable[..., Any], args: Any, *rest: Any, **more: Any) -> Any:
    config = original(args, *rest, **more)
    if config.rope_scaling:
        config.rope_scaling_factor = args.rope_scaling_factor
    return config
