"""A setting in the user's words: the flag that was typed, or would be. No torch, no Megatron."""

import re
from collections.abc import Callable, Collection

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.table import BY_NAME, SWITCHES, Argument

# What storey 1 calls a fact of the model or the layout -> Megatron's flag for it.
THEIRS = {
    "hidden_size": "--hidden-size",
    "ffn_hidden_size": "--moe-ffn-hidden-size",
    "num_experts": "--num-experts",
    "activation": "--ep-expert-activation",
    "num_moe_layers": "--moe-layer-freq",
    "tp": "--tensor-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "cp": "--context-parallel-size",
    "ep": "--expert-model-parallel-size",
    "etp": "--expert-tensor-parallel-size",
}


def refusal(error: ConfigError, typed: Collection[str]) -> ConfigError:
    """Return `error` in the words of a command line that had the flags `typed`."""
    text = error.spelled(in_flags(typed))
    switched = {"True": "on", "False": "off"}
    return ConfigError(
        re.sub(r"(--ep-[\w-]+) \((True|False)\)", lambda m: f"{m[1]} ({switched[m[2]]})", text)
    )


def in_flags(typed: Collection[str]) -> Callable[[str, str | None], str]:
    """Return what spells a setting as a flag, for `ConfigError.spelled`; `typed` are those given.

    The one of several names that was typed; of none typed, Megatron's own where it has one.
    """

    def word(name: str, value: str | None) -> str:
        if name == "bias":
            return _bias(value)
        if name == "world_size":
            return "the number of ranks" if value is None else f"{value} ranks"
        if name == "order":
            return "the order of parallel groups" if value is None else "no --use-tp-pp-dp-mapping"
        if name in THEIRS:
            return _flag(THEIRS[name], value)
        row = BY_NAME.get(name)
        return _of_row(row, value, typed) if row is not None else _plain(name, value)

    return word


def _bias(value: str | None) -> str:
    if value is None:
        return "the experts' bias"
    return "no --disable-bias-linear" if value == "True" else "--disable-bias-linear"


def _of_row(row: Argument, value: str | None, typed: Collection[str]) -> str:
    if row.flag not in typed and row.cousin is not None and row.cousin in typed:
        found = row.cousin_values.get(value, value) if value is not None else None
        return row.cousin if found in (None, "") else f"{row.cousin} {found}"
    if row.twin_flag is not None and (row.twin_flag in typed or row.flag not in typed):
        if row.twin in SWITCHES and value is not None:
            return row.twin_flag if value == "True" else f"no {row.twin_flag}"
        return _flag(row.twin_flag, value)
    return _flag(row.flag, {"True": "on", "False": "off"}.get(value or "", value))


def _flag(flag: str, value: str | None) -> str:
    if value is None:
        return flag
    return f"no {flag}" if value == "None" else f"{flag} {value}"


def _plain(name: str, value: str | None) -> str:
    return name if value is None else f"{name}={value}"
