"""`flags.txt`: a model as flags, for the recipes. `ep-plugin convert` writes it beside the weights.

    schedule=finetune      how the recipes train it, where nobody says otherwise
    --num-layers           then the model, one word a line
    4

It is data that may come from a stranger: it is read word by word and never run. A flag must be one
that describes a model: ours, or one of Megatron's that `convert` prints. None of these opens a
file. A value must be a number, a name, a list of whole numbers, NAME:NUMBER pairs, or a pattern of
layers that a GPT could have: no path, no module, no shell.

python -m ep_plugin.megatron.arguments.flags_file model|schedule FILE

prints the words after these checks, one a line; exit code 2: refused, in one sentence. `schedule`:
the same of the file in which recipes/run.sh keeps a run's schedule. No torch, no Megatron.
"""

import argparse
import copy
import os
import re
import stat
import sys
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.spell_model import LEGAL, PATTERN, UNSAID, model_flags
from ep_plugin.megatron.arguments.table import KINDS, automatic
from ep_plugin.registry import available

NAME = "flags.txt"
FIRST = "schedule="  # its first line, before how the recipes train the model
SCHEDULE = "finetune"
MAX_SEQUENCE = 4096  # tokens, of a model whose sequences in training nobody has said
MAX_BYTES = 1 << 16
# Named on the first line. published: of a model of recipes/models, which such a folder is not.
SCHEDULES = {"model": ("finetune", "own"), "schedule": ("published", "finetune", "own")}
SCHEDULE_FLAGS = (
    *("--micro-batch-size", "--global-batch-size", "--rampup-batch-size", "--train-iters"),
    *("--train-samples", "--lr", "--min-lr", "--lr-decay-style", "--lr-decay-iters"),
    *("--lr-decay-samples", "--lr-warmup-iters", "--lr-warmup-samples", "--lr-warmup-fraction"),
    *("--lr-wsd-decay-style", "--lr-wsd-decay-iters", "--lr-wsd-decay-samples", "--adam-beta1"),
    *("--adam-beta2", "--adam-eps", "--weight-decay", "--clip-grad"),
)
_NUMBER = r"-?\d+(\.\d*)?(e[+-]?\d+)?|-?\.\d+(e[+-]?\d+)?"
_LIST = r"-?\d+(,-?\d+)+|\[\d+(,\d+)*\]|\d+(\*\d+)?(,\d+(\*\d+)?)*"
_PAIR = rf"[a-z_]+:({_NUMBER})"
_VALUE = re.compile(rf"{_NUMBER}|{_LIST}|{_PAIR}(,{_PAIR})*|[A-Za-z][A-Za-z0-9_-]*", re.ASCII)
_LAYERS = re.compile(r"\|*([*+]\|*[-E]\|*)+")  # of a HybridModel
# Each flag that a file of a kind may have -> whether a value follows it.
FLAGS = {"model": LEGAL, "schedule": dict.fromkeys(SCHEDULE_FLAGS, True)}


def write_flags(folder: Path, args: argparse.Namespace, from_hf: bool) -> None:
    """Write `flags.txt` for a model with these arguments; nothing where `unsaid` names something.

    A Hugging Face model says how long its positions reach, and not how long sequences in training
    are: they get MAX_SEQUENCE at most.
    """
    if unsaid(args):
        return
    args = copy.copy(args)
    if from_hf:
        args.seq_length = min(args.seq_length, MAX_SEQUENCE)
    lines = [FIRST + SCHEDULE, *model_flags(args)]
    check(lines, "model", folder / NAME)
    (folder / NAME).write_text("".join(f"{line}\n" for line in lines))


def unsaid(args: argparse.Namespace) -> list[str]:
    """Return what of this model no file can say: arguments without a flag here, and flags with a
    value that `read` would refuse, such as a user's own code."""
    if found := [name for name in UNSAID if getattr(args, name, None)]:
        return found
    words = _by_flag(args)
    return [" ".join(flag) for flag in words if not _is_legal(flag)]


def _by_flag(args: argparse.Namespace) -> list[list[str]]:
    """Return the model's flags, each with its words."""
    found: list[list[str]] = []
    for word in model_flags(args):
        if word.startswith("--"):
            found.append([])
        found[-1].append(word)
    return found


def _is_legal(words: list[str]) -> bool:
    """Whether a file may have a flag with these words."""
    try:
        check([FIRST + SCHEDULE, *words], "model", Path(NAME))
    except ConfigError:
        return False
    return True


def read(path: Path, kind: str) -> list[str]:
    """Return the lines of a file of kind "model" or "schedule"; raises ConfigError.

    The first is `schedule=NAME`, each other a flag or a value.
    """
    lines = _text(path).removesuffix("\n").split("\n")
    check(lines, kind, path)
    return lines


def check(lines: Sequence[str], kind: str, path: Path) -> None:
    """Raise ConfigError unless the lines are as this module's docstring says."""
    names = SCHEDULES[kind]
    if lines[0] not in [FIRST + name for name in names]:
        legal = " or ".join(FIRST + name for name in names)
        raise ConfigError(
            f"the first line of {path} must be {legal}; got {_shown(lines[0])}; use "
            f"{FIRST}{names[0]}"
        )
    takes_value, seen, flag = FLAGS[kind], set[str](), ""
    for number, (word, following) in enumerate(pairwise([*lines[1:], "--"]), start=2):
        where = f"line {number} of {path}"
        if word.startswith("--"):
            _check_flag(word, takes_value, seen, where)
            flag = word
            seen.add(flag)
            if takes_value[flag] and following.startswith("--"):
                raise ConfigError(f"{where} is {flag}, which needs its value on the next line")
        else:
            _check_value(word, flag, takes_value, where)


def _check_flag(
    word: str, takes_value: Mapping[str, bool], seen: Collection[str], where: str
) -> None:
    if word not in takes_value:
        raise ConfigError(
            f"{where} must be a flag that describes what the file is for; got {_shown(word)}; use "
            "that flag behind the script, and leave the line out"
        )
    if word in seen:
        raise ConfigError(f"{where} gives {word} a second time; leave one of them out")


def _check_value(word: str, flag: str, takes_value: Mapping[str, bool], where: str) -> None:
    if not (_LAYERS if flag == PATTERN else _VALUE).fullmatch(word):
        raise ConfigError(
            f"{where} must be one flag, number, plain name, list of whole numbers, "
            f"NAME:NUMBER pairs or, for {PATTERN}, pattern such as *E*E; got "
            f"{_shown(word)}; use what convert wrote there, or give it behind the script"
        )
    if not takes_value.get(flag, False):
        raise ConfigError(
            f"{where} is a value, {_shown(word)}, but no flag that takes one stands before it; "
            "leave that line out"
        )
    for row in (row for row in KINDS if row.flag == flag):
        names = (*automatic(str(row.kind)), *available(str(row.kind)))
        if word not in names:
            raise ConfigError(
                f"{where} gives {flag} {_shown(word)}; a file may name one of {', '.join(names)}; "
                f"use {flag} behind the script for code of your own"
            )


def _text(path: Path) -> str:
    """Return what is in a plain file; raises ConfigError for anything else."""
    try:
        # Not through a link, and without waiting where it is a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as stream:
            data = (
                stream.read(MAX_BYTES + 1) if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
            )
    except OSError as error:
        raise ConfigError(
            f"{path} must be a plain file ({error.strerror}); use a folder that `ep-plugin "
            "convert` wrote"
        ) from error
    if data is None:
        raise ConfigError(
            f"{path} must be a plain file; use a folder that `ep-plugin convert` wrote"
        )
    if len(data) > MAX_BYTES:
        raise ConfigError(
            f"{path} must have at most {MAX_BYTES} bytes; use a folder that `ep-plugin convert` "
            "wrote"
        )
    return data.decode("utf-8", "backslashreplace")


def _shown(word: str) -> str:
    """Return a word of a stranger's for a message: quoted, escaped, and short."""
    return ascii(word if len(word) <= 60 else f"{word[:60]}...")


def main(argv: Sequence[str]) -> int:
    """Print the words of `argv`, (kind, file); returns the exit code."""
    kind, path = argv
    try:
        print("\n".join(read(Path(path), kind)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
