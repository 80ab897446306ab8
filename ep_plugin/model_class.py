"""For a script of your own that can build a GPT and a HybridModel: which of them a run trains."""

from typing import Any


def choose_model_class(args: Any) -> None:
    """Make parsed arguments of a GPT those of a HybridModel, where one is to be trained.

    Call it between Megatron's `parse_args` and `validate_args`, as recipes/pretrain_gpt.py does.
    Rank 0 prints which class it is. What cannot be ends every rank with one sentence and code 2.
    """
    from ep_plugin.megatron.arguments.chosen_class import choose_or_refuse

    choose_or_refuse(args)
