"""Multi-head latent attention without Transformer Engine, for models that are run on the CPU.

Megatron's local attention takes heads of keys and of values to be equally wide and does not know
the arguments its latent attention gives it. Only those are added here; the rest is Megatron's.
"""

from typing import Any

from megatron.core.transformer.dot_product_attention import DotProductAttention


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
