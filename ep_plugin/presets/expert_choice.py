"""Expert choice (arXiv:2202.09368): each expert takes its best 2 * S / E tokens.

Load is even without any loss, a token may meet no expert or many, and weights are the softmax over
experts as it is. Whether a token is taken depends on later ones, so a causal model would see its
future: published for encoders, and here only because the preset forces it.
"""

from dataclasses import replace

from ep_plugin.moe.routing_config import RoutingConfig
from ep_plugin.presets._model import Model, Preset

ROUTING = RoutingConfig(
    topk=2, capacity_factor=2.0, capacity_rounding="floor", force_expert_choice=True
)
MODEL = Model(
    hidden=4096,
    heads=32,
    head_dim=128,
    vocab=32_000,
    experts=(64, 0) * 16,
    dense_ffn=16384,
    dense_activation="geglu",
    expert_ffn=16384,
    expert_activation="relu",
    tied=True,
    positions="relative_per_layer",
    norm_epsilon=1e-6,
)

PRESETS = (
    Preset(
        name="ec-8b-64e",
        system="Expert choice",
        source="arXiv:2202.09368, table 1, 8B/64E",
        model=MODEL,
        routing=ROUTING,
        router="expert_choice",
        seq_length=1024,
        note="not causal: see what --ep-force-expert-choice means before you train a GPT with it",
    ),
    Preset(
        name="ec-nano",
        system="Expert choice",
        source="the routing of ec-8b-64e at a size for tests",
        model=replace(
            MODEL,
            hidden=64,
            heads=4,
            head_dim=16,
            vocab=256,
            experts=(8, 0) * 2,
            dense_ffn=256,
            expert_ffn=256,
            positions="rope",
        ),
        routing=ROUTING,
        router="expert_choice",
        seq_length=64,
    ),
)
