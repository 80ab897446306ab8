"""Megatron's own upcycling, called by hand: it knows Megatron's experts alone, by other names."""

from collections.abc import Callable
from typing import Any

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.seams.patches import Patches

UPCYCLE = "megatron.core.transformer.moe.upcycling_utils:upcycle_state_dict"
WHY = "it writes the names of Megatron's own experts; a model with ours is refused"


def changes(patches: Patches) -> None:
    """Refuse models with our experts."""
    patches.wrap(UPCYCLE, _refuse_ours, WHY)


def _refuse_ours(original: Callable[..., Any], moe_model: Any, dense_model: Any) -> Any:
    from ep_plugin.moe.experts.experts import Experts

    models = moe_model if isinstance(moe_model, list) else [moe_model]
    if any(isinstance(part, Experts) for model in models for part in model.modules()):
        raise ConfigError(
            "upcycle_state_dict makes the weights of Megatron's own experts, and this model has "
            "ep_plugin's; run ep-plugin convert --from DENSE --to EXPERTS --num-experts 8 --topk 2 "
            "on the saved dense model, then load EXPERTS"
        )
    return original(moe_model, dense_model)
