"""A shared expert that adds nothing at first, for families that cannot be without one.

Qwen2-MoE has a shared expert in every MoE layer. It gets the dense FFN's first matrix and a second
one of zeros: its output is exactly 0, and its gradient is not.
"""

import argparse
import copy
from dataclasses import replace

import torch
from torch import Tensor

from ep_plugin.checkpoint.moe_layers import pattern
from ep_plugin.checkpoint.tensors import Source, TensorInfo

_HALVES = ("_w", "_v")


def with_silent_expert(
    moe: Source, dense: Source, args: argparse.Namespace
) -> tuple[Source, argparse.Namespace]:
    """Return `moe` with such an expert in each MoE layer, behind a gate [1, H] of zeros.

    Both have plain names; `dense` is what `moe` was made of.
    """
    args = copy.copy(args)
    args.moe_shared_expert_intermediate_size = args.ffn_hidden_size
    args.moe_shared_expert_gate = True
    copied: dict[str, str] = {}
    zeros: dict[str, TensorInfo] = {}
    for layer in (layer for layer, is_moe in enumerate(pattern(args)) if is_moe):
        old, new = (f"decoder.layers.{layer}.mlp.{part}" for part in ("", "shared_experts."))
        for half in _HALVES:
            copied[f"{new}linear_fc1.weight{half}"] = f"{old}linear_fc1.weight{half}"
        fc2 = dense.tensors[f"{old}linear_fc2.weight"]
        zeros[f"{new}linear_fc2.weight"] = fc2
        zeros[f"{new}gate_weight"] = TensorInfo((1, args.hidden_size), fc2.dtype)

    def read_tensor(name: str) -> Tensor:
        if name in zeros:
            return torch.zeros(zeros[name].shape, dtype=zeros[name].dtype)
        return dense.read_tensor(copied[name]) if name in copied else moe.read_tensor(name)

    infos = {name: dense.tensors[old] for name, old in copied.items()} | zeros
    return replace(moe, tensors=moe.tensors | infos, read_tensor=read_tensor), args
