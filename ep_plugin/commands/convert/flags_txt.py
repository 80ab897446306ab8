"""The step of a conversion that leaves `flags.txt` beside the weights, for the recipes."""

import copy
from pathlib import Path

from ep_plugin.checkpoint.target import Target
from ep_plugin.commands.convert.request import Request
from ep_plugin.megatron.arguments import flags_file
from ep_plugin.megatron.arguments.spell_model import model_flags, unsaid

SCHEDULE = "finetune"
MAX_SEQUENCE = 4096  # tokens, of a model whose sequences in training nobody has said


def write_flags(request: Request, target: Target, folder: Path) -> None:
    """Write `flags.txt` into `folder`, where a recipe can run what is there (`why_not`)."""
    if why_not(request, target) is None:
        flags_file.write(folder / flags_file.NAME, SCHEDULE, flags_of(target))


def why_not(request: Request, target: Target) -> str | None:
    """Return why the result has no `flags.txt`; None where it has one."""
    if request.format != "megatron":
        return "it is for Megatron alone"
    if names := unsaid(target.args):
        return f"it cannot say {', '.join(names)}"
    return None


def flags_of(target: Target) -> list[str]:
    """Return the flags of the whole model.

    A Hugging Face model says how long its positions reach, and not how long sequences in training
    are: they get MAX_SEQUENCE at most.
    """
    args = copy.copy(target.args)
    if target.model.family is not None:
        args.seq_length = min(args.seq_length, MAX_SEQUENCE)
    return model_flags(args)
