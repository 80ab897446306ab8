"""Multi-head latent attention without Transformer Engine, for models that are run on the CPU.

Megatron's local attention takes heads of keys and of values to be equally wide and does not know
the arguments its latent attention gives it. And over tensor-parallel ranks its local layers do not
sum the gradient of the keys' rotary part, of which each rank has its own heads' share. Only those
are added here; the rest is Megatron's.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor


class LatentDotProductAttention(DotProductAttention):  # type: ignore[misc]
    """Attention with keys of `k_channels` a head and values of `v_channels`.

    Megatron builds it twice: first without either, then with both.
    """

    def __init__(
        self,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition


def use_local_latent_attention(block_spec: Any) -> None:
    """Put it into every layer of a local block's specification, in place."""
    for layer in block_spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = LatentDotProductAttention


def sum_gradient_of_rotary_keys(attention: Any) -> None:
    """Let the keys' rotary part in latent `attention` get the gradient of all ranks' heads.

    Without it 1 / TP of the heads reach those rows of `linear_kv_down_proj`, and what lies before.
    """
    linear, config = attention.linear_kv_down_proj, attention.config
    if linear.tp_group.size() > 1:
        linear.register_forward_hook(
            lambda _, inputs, output: (_whole(output[0], linear.tp_group, config), output[1])
        )


def _whole(part: Tensor, group: Any, config: Any) -> Tensor:
    """Return latent and rotary key [S, B, R + P] of columns `part` [S, B, (R + P) / TP].

    With sequence parallelism it is [S / TP, B, R + P]: then Megatron itself gathers the rotary part
    over the ranks, and sums its gradient.
    """
    whole: Tensor = gather_from_tensor_model_parallel_region(part, group)
    if config.sequence_parallel:
        scattered: Tensor = scatter_to_sequence_parallel_region(whole, group)
        return scattered
    latent, rotary = whole.tensor_split([config.kv_lora_rank], dim=-1)
    return torch.cat([latent, _SumGradient.apply(rotary, group)], dim=-1)


class _SumGradient(torch.autograd.Function):
    """A tensor that all ranks of `group` have alike; its gradient is the sum of theirs.

    Megatron's own function for it loses the sum of a gradient that is not contiguous, until 0.18.
    """

    @staticmethod
    def forward(ctx: Any, alike: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return alike.view_as(alike)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
