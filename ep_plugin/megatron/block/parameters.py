"""Initial values and tags of the parameters, as Megatron gives them to its own experts.

The tags decide which ranks average a gradient and whether the gradient norm counts it once: a
missing one is silent. See `set_tags`.
"""

from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import (
    _initialize_affine_weight_cpu,
    _initialize_affine_weight_gpu,
)
from torch import Tensor, nn

from ep_plugin.moe.experts.experts import Experts
from ep_plugin.moe.groups import ExpertGroups, group_rank, group_size


def initialize_replicated(module: nn.Module, config: Any) -> None:
    """Fill a router [E, H] in fp32 on the CPU's generator, the same on every rank."""
    for _, parameter in sorted(module.named_parameters(), reverse=True):  # weight, then bias
        values = torch.empty(parameter.shape, dtype=torch.float32)
        config.init_method(values)
        parameter.data.copy_(values)


def initialize_experts(
    experts: Experts, config: Any, groups: ExpertGroups, *, grouped: bool = False
) -> None:
    """Fill each expert's fc1 and fc2 in Megatron's order: equal seeds give equal experts.

    `grouped`: Megatron's own would be Transformer Engine's, which draw every fc1 before any fc2.
    """
    gated = 2 if experts.gated else 1  # halves, each sharded for itself
    first, second = config.init_method, config.output_layer_init_method
    fc1 = [(weight, 0, gated, first) for weight in experts.linear_fc1.weight]
    fc2 = [(weight, 1, 1, second) for weight in experts.linear_fc2.weight]
    expert_by_expert = chain.from_iterable(zip(fc1, fc2, strict=True))
    for weight, dim, stride, init_method in (*fc1, *fc2) if grouped else expert_by_expert:
        _initialize_matrix(weight, dim, stride, init_method, config, groups)
    for linear in (experts.linear_fc1, experts.linear_fc2):
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


def share_values(experts: Experts, groups: ExpertGroups) -> None:
    """Give all ranks of `groups.copies` the values of its first; all of them must call it.

    Megatron's generators differ from rank to rank of an expert-parallel group.
    """
    if groups.copies is not None:
        for parameter in experts.parameters():
            dist.broadcast(parameter.data, group=groups.copies, group_src=0)


def are_grouped(submodules: Any) -> bool:
    """Whether the experts of Megatron's own MoE layer of these `MoESubmodules` are TEGroupedMLP."""
    builder = getattr(submodules, "experts", None)
    own = getattr(builder, "func", None) or getattr(builder, "module", None)  # from 0.17 on, before
    return getattr(own, "__name__", None) == "TEGroupedMLP"


def _initialize_matrix(
    weight: Tensor, dim: int, stride: int, init_method: Any, config: Any, groups: ExpertGroups
) -> None:
    """Fill one expert's `weight` [out, in], sharded over etp along `dim`, as Megatron does."""
    matrix = weight.detach()
    if not config.use_cpu_initialization:
        _initialize_affine_weight_gpu(matrix, init_method, dim, stride=stride, is_expert=True)
        return
    full = [
        size * (groups.etp_size if axis == dim else 1) for axis, size in enumerate(matrix.shape)
    ]
    _initialize_affine_weight_cpu(
        matrix,
        *full,
        matrix.shape[dim],
        dim,
        init_method,
        stride=stride,
        params_dtype=config.params_dtype,
        rank=groups.etp_rank,
        world_size=groups.etp_size,
    )


def set_tags(
    replicated: list[nn.Module], experts: Experts, config: Any, groups: ExpertGroups
) -> None:
    """Mark every parameter for Megatron's DDP, optimizer and gradient norm.

    `allreduce = False`: averaged over expert-data-parallel ranks alone, in a buffer of its own.
    `tensor_model_parallel = True`: no rank holds what another does, so each counts in the norm.
    `sequence_parallel = True`: the gradient is summed over tensor-parallel ranks, which saw other
    tokens.
    `shared = True`: another rank counts it in the norm, the first of those with copies of it.
    `copies`: those ranks, over which seams/copies.py sums the gradient.
    `holds_matrices`: of a stack of experts, whether it is one of matrices; see seams/matrices.py.
    """
    for module in replicated:
        for parameter in module.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    ep_size = groups.ep_size * group_size(groups.copies)
    own_groups = ep_size > 1 or groups.etp_size != config.tensor_model_parallel_size
    for linear, dim in ((experts.linear_fc1, 1), (experts.linear_fc2, 2)):
        for name, parameter in linear.named_parameters():
            sharded = name == "weight" or dim == 1  # the bias of fc2 is whole on every etp rank
            tags: dict[str, Any] = {
                "allreduce": not own_groups,
                "tensor_model_parallel": sharded or groups.etp_size == 1,
                "partition_dim": dim if sharded else -1,
                "partition_stride": 1,
                "holds_matrices": name == "weight",
            }
            if groups.copies is not None:
                tags |= {"copies": groups.copies, "shared": group_rank(groups.copies) > 0}
            for tag, value in tags.items():
                setattr(parameter, tag, value)


class MainGrads:
    """The gradient buffers of Megatron's DDP, where they are fp32, as `Totals` of `fused.py`.

    What apex's or Transformer Engine's fusion of gradient accumulation does for their own layers:
    a weight gradient is added to `main_grad` by the product that makes it, and DDP is told.
    """

    def __init__(self, experts: Experts) -> None:
        self.weights = (experts.linear_fc1.weight, experts.linear_fc2.weight)

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """Return both buffers [e, out, in]; None where DDP has none, or one in bf16."""
        first, second = map(_take_buffer, self.weights)
        return first, second


def _take_buffer(weight: Any) -> Tensor | None:
    buffer: Tensor | None = getattr(weight, "main_grad", None)
    known = hasattr(weight, "grad_added_to_main_grad")
    if buffer is None or not known or buffer.dtype != torch.float32:
        return None
    weight.grad_added_to_main_grad = True
    return buffer
