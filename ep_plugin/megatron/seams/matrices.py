"""Muon and other optimizers of matrices: a stack of e experts counts as e matrices.

Megatron gives such an optimizer the parameters with two dimensions, and Adam all others. Each of
Megatron's own experts has matrices as weights and vectors as biases. Our experts are stacked:
weights are [e, out, in], biases [e, out]. They carry the tag `holds_matrices`, True for weights and
False for biases. By the tag, weights go to the optimizer of matrices and biases to Adam. Muon's
Newton-Schulz iteration takes the stack as a batch. The arithmetic is that of Megatron and of
emerging-optimizers.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

PACKAGE = "emerging-optimizers"  # Megatron's Muon is built on it
ELEMENTS = 2**27  # per batch: about 2 GiB of work memory, and products large enough for any GPU


def holds_matrices(parameter: Any) -> bool | None:
    """Return the tag: True for stacked weights, False for stacked biases, None for all others."""
    tag: bool | None = getattr(parameter, "holds_matrices", None)
    return tag


def package_version() -> tuple[int, int] | None:
    """Return the version of emerging-optimizers, such as (0, 3); None if it is not installed."""
    try:
        major, minor, *_ = version(PACKAGE).split(".")
    except PackageNotFoundError:
        return None
    return int(major), int(minor)


def orthogonalize(
    original: Callable[..., Tensor], muon: Any, p: Any, grad: Tensor, **kwargs: Any
) -> Tensor:
    """Return Muon's update of a parameter; a stack [e, out, in] is updated as e matrices.

    `original` is Megatron's method, which updates single matrices. `muon` is Megatron's optimizer,
    `p` the parameter or its fp32 copy, `grad` its momentum. With expert tensor parallelism each
    rank holds a part of every matrix, and the mode of `muon` says how the parts are combined.
    """
    if grad.dim() != 3:
        return original(muon, p, grad, **kwargs)
    groups = muon.pg_collection
    etp = groups.expt_tp if groups is not None else None
    mode = getattr(muon, "tp_mode", None) or muon.mode  # `mode` until Megatron 0.17
    sharded = etp is not None and etp.size() > 1 and mode != "blockwise"
    step = muon.scaled_orthogonalize_fn
    if (sharded and mode == "distributed") or (package_version() or (0, 0)) < (0, 3):
        # Distributed sums take one matrix at a time; packages before 0.3 take no batches.
        dim = p.partition_dim - 1 if sharded else None
        return torch.stack([step(matrix, etp, dim) for matrix in grad])
    dim = p.partition_dim - 3 if sharded else None
    together = max(1, ELEMENTS // grad[0].numel())
    steps = [step(part, etp, dim) for part in torch.split(grad, together)]
    return steps[0] if len(steps) == 1 else torch.cat(steps)
