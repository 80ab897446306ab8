"""Which family a model is of, by the modules that its script imports or its parts come from."""

from collections.abc import Iterable
from typing import Any

MODELS, LEGACY = "megatron.core.models", "megatron.legacy.model"
GPT = (f"{MODELS}.gpt", "gpt_builders")
HYBRID = (f"{MODELS}.hybrid", "hybrid_builders")
# Unsupported family -> modules that its scripts import and that its models' classes come from.
FAMILIES = {
    "T5": (f"{MODELS}.T5", f"{LEGACY}.t5_model"),
    "BERT": (f"{MODELS}.bert", f"{LEGACY}.bert_model"),
    "multimodal": (f"{MODELS}.multimodal", f"{MODELS}.mimo"),
    "vision": (f"{MODELS}.vision", f"{LEGACY}.vision"),
    "retrieval": (f"{MODELS}.retro", f"{LEGACY}.biencoder_model", f"{LEGACY}.realm_model"),
    "Mamba": (f"{MODELS}.mamba", "mamba_builders"),
}


def family_of(modules: Iterable[Any]) -> str | None:
    """Return the first of FAMILIES that a part of the model belongs to; None of a GPT's parts, or a
    HybridModel's."""
    return family_named(type(part).__module__ for part in modules)


def family_named(names: Iterable[str]) -> str | None:
    """Return the first of FAMILIES that any of `names` belongs to; None if there is none."""
    given = list(names)
    found = (f for f, modules in FAMILIES.items() if any(is_in(name, modules) for name in given))
    return next(found, None)


def is_in(name: str, modules: Iterable[str]) -> bool:
    """Whether a module is one of `modules`, or lies below one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)
