"""What a training run does with --ep-teacher, on one rank: its checks, the model, the load."""

import argparse
import sys

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.distill.fits_student import check_teacher
from ep_plugin.megatron.distill.teacher import Teacher
from ep_plugin.megatron.workers import model_run, saved_model


def student(folder: str) -> argparse.Namespace:
    """Return the arguments of a run whose teacher is in `folder`."""
    own = {"ep_teacher": folder, "ep_teacher_layout": None, "seq_length": 8, "world_size": 1}
    return saved_model.plain(argparse.Namespace(padded_vocab_size=None, **own))


def main(folder: str) -> int:
    """Check, build and load a teacher; returns an exit code, with a sentence beside 2."""
    try:
        with model_run._one_rank(1):
            args = student(folder)
            plan = check_teacher(args)
            assert plan is not None
            made = Teacher(plan, args)
            print(sum(each.numel() for each in made.parameters()))
            made.release()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
