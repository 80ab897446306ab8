"""Qwen3 MoE (arXiv:2505.09388): top-8 of 128 small experts, balanced over the global batch.

Weights are divided by their sum (`norm_topk_prob`), nothing is dropped, no shared expert. The
balancing loss takes its fractions over all micro-batches and data-parallel ranks of a step
(arXiv:2501.11873). The published configurations have router_aux_loss_coef 1e-3 of a loss that adds
up all choices and is taken once, as the mean over layers; ours is 1 when balanced and is added in
each layer. So the same strength is topk / layers times theirs.
"""

from dataclasses import replace

from ep_plugin.moe.routing_config import RoutingConfig
from ep_plugin.presets._model import Model, Preset, of_each_layer

COEFFICIENT = 1e-3  # of the whole model
SMALL = Model(
    hidden=2048,
    heads=32,
    head_dim=128,
    kv_heads=4,
    vocab=151_936,
    experts=(128,) * 48,
    dense_ffn=6144,
    expert_ffn=768,
    qk_norm=True,
    rotary_base=1_000_000,
    norm_epsilon=1e-6,
)
LARGE = replace(SMALL, hidden=4096, heads=64, experts=(128,) * 94, dense_ffn=12288, expert_ffn=1536)


def _preset(name: str, model: Model, source: str, seq_length: int, topk: int = 8) -> Preset:
    coefficient = of_each_layer(COEFFICIENT, topk, len(model.experts))
    return Preset(
        name=name,
        system="Qwen3 MoE",
        source=source,
        model=model,
        routing=RoutingConfig(topk=topk, aux_loss_coeff=coefficient, aux_loss_scope="global"),
        seq_length=seq_length,
    )


PRESETS = (
    _preset("qwen3-30b-a3b", SMALL, "arXiv:2505.09388, table 2, Qwen3-30B-A3B", 4096),
    _preset("qwen3-235b-a22b", LARGE, "arXiv:2505.09388, table 2, Qwen3-235B-A22B", 4096),
    _preset(
        "qwen3-nano",
        replace(
            SMALL,
            hidden=64,
            heads=4,
            head_dim=32,
            kv_heads=2,
            vocab=256,
            experts=(8,) * 4,
            dense_ffn=256,
            expert_ffn=64,
        ),
        "the routing of qwen3-30b-a3b at a size for tests",
        64,
        topk=4,
    ),
)
