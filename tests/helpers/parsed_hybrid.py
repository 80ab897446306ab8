"""Arguments of a small HybridModel, as Megatron's parser and ours read them."""

import argparse
from typing import Any

from loop import SHAPE

from ep_plugin.megatron.arguments.parser import add_ep_arguments

EXPERTS = ("--num-experts", "4")


def parsed(*flags: str) -> Any:
    from megatron.training import arguments

    parser = add_ep_arguments(arguments.add_megatron_arguments(argparse.ArgumentParser()))
    shape = [*SHAPE[2:], "--micro-batch-size", "2", "--lr", "1e-3"]  # without --num-layers
    args = parser.parse_args([*shape, *flags])
    args.world_size = 2
    return args
