"""Optimizers that step matrices, such as Muon: a stack of experts is as many matrices as experts.

Megatron gives them its parameters of two dimensions, and all others to Adam. Each of its own
experts has matrices for weights and vectors for biases; ours are stacks, weights [e, out, in] and
biases [e, out], and carry the tag `holds_matrices` (True, False). So weights go where a matrix goes
and biases where a vector goes, and Muon's Newton-Schulz iteration takes the stack in one batch.
The arithmetic is Megatron's and that of emerging-optimizers: nothing here multiplies.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

PACKAGE = "emerging-optimizers"  # what Megatron's Muon is made of
ELEMENTS = 2**27  # of matrices at once: some 2 GiB of work memory, and long products on any GPU


def holds_matrices(parameter: Any) -> bool | None:
    """Whether a parameter of stacked experts is a stack of matrices; None for all others."""
    tag: bool | None = getattr(parameter, "holds_matrices", None)
    return tag


def package_version() -> tuple[int, int] | None:
    """Return the installed package's version, such as (0, 3); None where it is not installed."""
    try:
        major, minor, *_ = version(PACKAGE).split(".")
    except PackageNotFoundError:
        return None
    return int(major), int(minor)


def orthogonalize(
    original: Callable[..., Tensor], muon: Any, p: Any, grad: Tensor, **kwargs: Any
) -> Tensor:
    """Return the update [e, out, in] of a stack of experts as of e matrices; of others Megatron's.

    `muon` is Megatron's optimizer, `p` the parameter or its fp32 copy, `grad` its momentum. With
    expert tensor parallelism `muon` says how the parts of a matrix become one.
    """
    if grad.dim() != 3:
        return original(muon, p, grad, **kwargs)
    groups = muon.pg_collection
    etp = groups.expt_tp if groups is not None else None
    mode = getattr(muon, "tp_mode", None) or muon.mode  # the latter until 0.17
    sharded = etp is not None and etp.size() > 1 and mode != "blockwise"
    step = muon.scaled_orthogonalize_fn
    if (sharded and mode == "distributed") or (package_version() or (0, 0)) < (0, 3):
        # Sums over ranks are those of one matrix, and older packages take no batches.
        dim = p.partition_dim - 1 if sharded else None
        return torch.stack([step(matrix, etp, dim) for matrix in grad])
    dim = p.partition_dim - 3 if sharded else None
    together = max(1, ELEMENTS // grad[0].numel())
    steps = [step(part, etp, dim) for part in torch.split(grad, together)]
    return steps[0] if len(steps) == 1 else torch.cat(steps)
