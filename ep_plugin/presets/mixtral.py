"""Mixtral (arXiv:2401.04088): top-2 of 8 experts in every layer, nothing dropped.

Weights are the softmax of the two chosen logits, which equals both probabilities divided by their
sum. The balancing loss counts both choices. The published configurations, meant for fine-tuning,
have router_aux_loss_coef 0.02 (8x7B v0.1) and 0.001 (8x22B Instruct v0.1) of a loss that adds up
both choices and is taken once, as the mean over layers; ours is 1 when balanced and is added in
each layer. So the same strength is 2 / layers times theirs. The coefficient of pretraining is not
published. 8x22B Instruct v0.1 and v0.3 have the same weights, with a vocabulary of 32768; those of
v0.3 are published without a coefficient.
"""

from dataclasses import replace

from ep_plugin.moe.routing_config import RoutingConfig
from ep_plugin.presets._model import Model, Preset, of_each_layer

MODEL = Model(
    hidden=4096,
    heads=32,
    head_dim=128,
    kv_heads=8,
    vocab=32_000,
    experts=(8,) * 32,
    dense_ffn=14336,
    expert_ffn=14336,
    rotary_base=1_000_000,
)
LARGE = replace(
    MODEL,
    hidden=6144,
    heads=48,
    vocab=32_768,
    experts=(8,) * 56,
    dense_ffn=16384,
    expert_ffn=16384,
)


def _preset(
    name: str, model: Model, source: str, seq_length: int, coefficient: float = 0.02
) -> Preset:
    """Return a preset; `coefficient` is the published one, of the whole model."""
    balance = of_each_layer(coefficient, 2, len(model.experts))
    routing = RoutingConfig(topk=2, aux_loss_coeff=balance)
    return Preset(
        name=name,
        system="Mixtral",
        source=source,
        model=model,
        routing=routing,
        seq_length=seq_length,
    )


PRESETS = (
    _preset("mixtral-8x7b", MODEL, "arXiv:2401.04088, table 1", 32_768),
    _preset("mixtral-8x22b", LARGE, "the configuration of 8x22B Instruct v0.1", 65_536, 0.001),
    _preset(
        "mixtral-nano",
        replace(
            MODEL,
            hidden=64,
            heads=4,
            head_dim=16,
            kv_heads=2,
            vocab=256,
            experts=(8,) * 4,
            dense_ffn=256,
            expert_ffn=256,
        ),
        "the routing of mixtral-8x7b at a size for tests",
        64,
    ),
)
