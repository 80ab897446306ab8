"""Every flag of ours with the values to try it with, in Megatron's parser."""

import argparse
from functools import cache
from typing import Any

from loop import MODEL

from ep_plugin.megatron.arguments.parser import add_ep_arguments
from ep_plugin.megatron.arguments.table import BY_NAME, TABLE, Argument
from ep_plugin.moe.rules import said
from ep_plugin.registry import available

PLAIN = (
    *(*MODEL, "--num-experts", "8", "--expert-model-parallel-size", "2"),
    *("--hidden-size", "128", "--moe-ffn-hidden-size", "128"),
)
# Sample values of what is no choice of names: one to give, and one to compare with.
SAMPLES: dict[str, tuple[Any, Any]] = {
    "topk": (3, 2),
    "scaling_factor": (2.5, 1.0),
    "jitter_eps": (0.1, 0.0),
    "second_threshold": (0.5, 0.2),
    "num_groups": (4, 2),
    "group_topk": (1, 2),
    "group_score_topk": (1, 2),
    "bias_update_rate": (0.5, 0.001),
    "capacity_factor": (0.5, 1.0),
    "eval_capacity_factor": (0.5, 1.0),
    "min_capacity": (24, 0),
    "group_tokens": (8, 16),
    "aux_loss_coeff": (0.5, 0.0),
    "z_loss_coeff": (0.5, 0.0),
    "quantile_ema": (0.5, 0.0),
    "further_losses": ("sequence:0.25", "global:0.25"),
    "comm_sms": (8, 32),
    "rank_capacity": (0.25, 100.0),
    "ranks_per_node": (1, 2),
    "overlap_chunks": (1, 3),
    "experts_per_layer": ("4,8", "8,8"),
    "watch_ranks": (5, 20),
    "teacher": ("CKPT", "OTHER"),
    "teacher_layout": ("tp=2,ep=2", "tp=1"),
    "distill_temperature": (2.0, 1.5),
    "distill_weight": (0.5, 2.0),
    "distill_stop": (0.25, 1.0),
    "preset": ("mixtral-8x7b", "switch-base-8"),
}
# Values that say what is so anyway in the plain model, which has --swiglu and no bias.
SO_ANYWAY = {
    *(("dense_activation", "swiglu"), ("expert_activation", "swiglu"), ("shared_expert", "sum")),
    ("drop_policy", "probs"),  # where there is a capacity
    *(("router_bias", False), ("deterministic", False)),
}


@cache
def parser() -> argparse.ArgumentParser:
    """Return Megatron's parser with our flags."""
    from megatron.training import arguments

    return add_ep_arguments(arguments.add_megatron_arguments(argparse.ArgumentParser()))


def values(row: Argument) -> list[Any]:
    """Return the legal values of a row that are not its default, or a sample."""
    if row.name in SAMPLES:
        return [SAMPLES[row.name][0]]
    if row.kind is not None:
        found: tuple[Any, ...] = available(row.kind)
    else:
        found = (True, False) if row.hint is bool else row.legal or ()
    assert found, f"{row.flag} has no value to try: add one to SAMPLES"
    return [v for v in found if v != row.field_default and (row.name, v) not in SO_ANYWAY]


CASES = [(row.name, value) for row in TABLE for value in values(row)]


def given(name: str, value: Any) -> list[str]:
    """Return how the value is typed."""
    row = BY_NAME[name]
    return [row.flag] if row.default is False else [row.flag, said(value)]
