"""What a Hugging Face family can hold: a model is fitted to it before it is written as one."""

from dataclasses import replace
from typing import TYPE_CHECKING

from ep_plugin.checkpoint import family as families
from ep_plugin.checkpoint.adapt import fold_gemma
from ep_plugin.checkpoint.adapt.silent_expert import with_silent_expert

if TYPE_CHECKING:
    from ep_plugin.checkpoint.open import Format, Opened


def fit_family(
    model: "Opened", dense: "Opened", output: "Format", model_type: str | None
) -> "Opened":
    """Return the same function as a Hugging Face family has it; any other output keeps it as it is.

    `dense` is what `model` was before it got experts, or the same. Without `model_type`, the family
    is the source's, or the first whose models have these settings. Raises ConfigError for none.
    """
    if output != "hf":
        return model
    has_shared = getattr(model.args, "moe_shared_expert_intermediate_size", None)
    if model is not dense and getattr(model.args, "add_qkv_bias", False) and not has_shared:
        source, args = with_silent_expert(model.source, dense.source, model.args)
        model = replace(model, source=source, args=args)
    if fold_gemma.applies(model.args):
        source, args, lost = fold_gemma.fold(model.source, model.args)
        deviations = (*model.deviations, *lost)
        model = replace(model, source=source, args=args, deviations=deviations)
    chosen = families.load(model_type) if model_type else model.family
    return replace(model, family=chosen or families.recognise(model.args))
