"""Hopper GPUs, and the sizes that our own kernels for bf16 take there."""

import torch

ALIGNED = 8  # features in bf16; rows that TMA reads start at multiples of 16 bytes


def on_hopper() -> bool:
    """Whether the current device is a Hopper GPU, for which those kernels were measured."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
