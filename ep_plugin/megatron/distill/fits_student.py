"""What can be known of a teacher before ranks communicate: its arguments, its sizes, its layout.

Its run arguments are read as data; nothing of the checkpoint is run.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ep_plugin.checkpoint.formats.megatron_dist import iteration_folder, read_common
from ep_plugin.checkpoint.moe_layers import pattern
from ep_plugin.checkpoint.run_args import checked, said
from ep_plugin.errors import ConfigError, largest_divisor
from ep_plugin.megatron.arguments.spell_model import UNSAID
from ep_plugin.megatron.arguments.table import KINDS
from ep_plugin.megatron.distill.teacher_layout import Layout, layout_of
from ep_plugin.untrusted import shown

_CUT = (  # a run argument, what it counts, and which ranks share it evenly
    ("num_attention_heads", "attention heads", "tp"),
    ("num_query_groups", "query groups", "tp"),
    ("ffn_hidden_size", "rows in a feed-forward block", "tp"),
    ("moe_shared_expert_intermediate_size", "rows in a shared expert", "tp"),
    ("padded_vocab_size", "entries in its vocabulary", "tp"),
    ("moe_ffn_hidden_size", "rows in an expert", "etp"),
)
_PACKS = ("sft", "rl_use_sequence_packing", "hybrid_context_parallel")


@dataclass(frozen=True)
class Plan:
    """A teacher that fits this run."""

    folder: Path  # of its iteration
    args: argparse.Namespace  # its run arguments
    layout: Layout
    vocabulary: int  # entries that both models have and that do not pad


def check_teacher(args: Any) -> Plan | None:
    """Return the teacher that validated arguments ask for; None without one.

    Raises ConfigError for a checkpoint or a layout that cannot teach this student.
    """
    if getattr(args, "ep_teacher", None) is None:
        return None
    folder = iteration_folder(Path(args.ep_teacher))
    teacher = checked_teacher(read_common(folder).get("args"), folder, args)
    layout = layout_of(args)
    check_sizes(teacher, layout, args)
    _check_packing(layout, args)
    return Plan(folder, teacher, layout, _vocabulary(teacher, args))


def checked_teacher(found: Any, folder: Path, args: Any) -> argparse.Namespace:
    """Return the run arguments that a teacher's checkpoint holds; raises ConfigError."""
    if not isinstance(found, argparse.Namespace):
        raise ConfigError(
            f"--ep-teacher {args.ep_teacher} holds no run arguments; give a checkpoint that "
            "Megatron saved"
        )
    teacher = checked(found, folder)
    _check_kind(teacher, args)
    return teacher


def _check_kind(teacher: argparse.Namespace, args: Any) -> None:
    word = f"--ep-teacher {args.ep_teacher}"
    for name in UNSAID:
        if (value := said(teacher, name)) is not None:
            raise ConfigError(
                f"{word} was trained with {name} = {shown(value)}, and a teacher is a plain "
                "decoder; use one without it"
            )
    for kind in KINDS:
        value = getattr(teacher, kind.dest, None)
        if value is not None and (type(value) is not str or "." in value):
            raise ConfigError(
                f"{word} was trained with {kind.dest} = {shown(value)}, a module that would be "
                "imported; use a teacher without one"
            )
    theirs, ours = getattr(teacher, "transformer_impl", None), args.transformer_impl
    if theirs == "local" and ours != "local":
        raise ConfigError(
            f"{word} has the names of --transformer-impl local, and this run is of {ours}; use "
            "--transformer-impl local, or a teacher that was saved with the other"
        )


def check_sizes(teacher: argparse.Namespace, layout: Layout, args: Any) -> None:
    """Raise ConfigError for a layout that does not cut the teacher evenly.

    `args`: ep_teacher, seq_length.
    """
    word = f"--ep-teacher {args.ep_teacher}"
    for name, what, size in _CUT:
        value = getattr(teacher, name, None)
        ranks = getattr(layout, size)
        few = name == "num_query_groups" and value and ranks % value == 0  # each on several ranks
        if value and value % ranks and not few:
            raise ConfigError(
                f"{word} has {value} {what}, which {size} ({ranks}) of --ep-teacher-layout must "
                f"divide; use --ep-teacher-layout {size}=1"
            )
    positions = getattr(teacher, "max_position_embeddings", None)
    learned = getattr(teacher, "position_embedding_type", None) == "learned_absolute"
    if learned and positions is not None and positions < args.seq_length:
        raise ConfigError(
            f"{word} has {positions} positions, and --seq-length is {args.seq_length}; use "
            f"--seq-length {positions}"
        )
    if not any(pattern(teacher)):
        return
    largest = teacher.num_experts
    if largest % layout.ep:
        raise ConfigError(
            f"{word} has {largest} experts, which ep ({layout.ep}) of --ep-teacher-layout must "
            f"divide; use --ep-teacher-layout ep={largest_divisor(largest, layout.ep)}"
        )


def _check_packing(layout: Layout, args: Any) -> None:
    """Raise ConfigError where Megatron's flags pack sequences that would have to be exchanged."""
    students = args.tensor_model_parallel_size
    for name in _PACKS:
        if layout.tp > students and getattr(args, name, False):
            raise ConfigError(
                f"--{name.replace('_', '-')} packs sequences, and a teacher of a larger tp "
                f"({layout.tp}) would have to exchange them; use --ep-teacher-layout tp={students}"
            )


def _vocabulary(teacher: argparse.Namespace, args: Any) -> int:
    """Return how many entries count: all that do not pad, which both must have alike."""
    theirs = getattr(teacher, "ep_vocab_size", None)
    rows = int(teacher.padded_vocab_size)
    typed = getattr(args, "vocab_size", None)
    if theirs is not None and typed == theirs - 1:
        typed = theirs  # a tokenizer may add a word to --vocab-size; it is asked once it is there
    ours = getattr(args, "ep_vocab_size", None) or typed
    size = ours or theirs or min(rows, args.padded_vocab_size or rows)
    if (theirs is not None and theirs != size) or rows < size:
        raise ConfigError(
            f"--ep-teacher {args.ep_teacher} has a vocabulary of {theirs or rows}, and the student "
            f"one of {size}; use a teacher that was trained with the student's tokenizer"
        )
    return int(size)
