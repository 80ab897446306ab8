"""What all ranks must have set alike, as one short text that they can compare.

Imports neither torch nor Megatron.
"""

import hashlib
import json
from typing import Any

from ep_plugin.megatron.arguments.parser import TYPED
from ep_plugin.megatron.arguments.table import TABLE

# Of one process: which it is, and how it logs.
OWN = frozenset(
    {
        *("rank", "local_rank", "logging_level", "profile_ranks", TYPED),
        *("wandb_entity", "wandb_exp_name", "one_logger_project", "one_logger_run_name"),
    }
)
# Places, which hosts may know by other names; whether one is given must be alike.
PLACES = frozenset({"save", "load", "bert_load", "ict_load", "ckpt_convert_save", "wandb_project"})
PLACE_ENDINGS = ("_path", "_dir", "_file")


def digest(args: Any) -> str:
    """Return a hash of `alike(args)`: equal in every process and run that has these arguments."""
    text = json.dumps(alike(args), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def alike(args: Any) -> dict[str, str]:
    """Return by name what ranks must have alike, of Megatron's arguments with ours among them."""
    own = OWN | {row.dest for row in TABLE if not row.alike}
    return {
        name: "given" if _is_place(name) and value is not None else _text(value)
        for name, value in vars(args).items()
        if name not in own
    }


def _is_place(name: str) -> bool:
    return name in PLACES or name.endswith(PLACE_ENDINGS)


def _text(value: Any) -> str:
    """Return a value as text without addresses in memory."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(_text, value)))}}}"
    if isinstance(value, dict):
        return _text(sorted((str(key), _text(part)) for key, part in value.items()))
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text
