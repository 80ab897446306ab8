"""ST-MoE (arXiv:2202.08906): top-2 of 64 experts in every fourth layer, with a router z-loss.

The z-loss (eq. 5), 1e-3 times the mean of logsumexp(logits)^2, keeps logits small enough for bf16.
Capacity is 1.25 times a fair share of both choices in training and 2.0 in evaluation; first choices
go first. Each sparse block has one more dense feed-forward block, a shared expert here.
The public code does not multiply capacity by the number of choices, and so needs twice the factor:
`--ep-capacity-counts-topk off` with it.
"""

from dataclasses import replace

from ep_plugin.config import RoutingConfig
from ep_plugin.presets._model import Model, Preset

ROUTING = RoutingConfig(
    topk=2,
    capacity_factor=1.25,
    eval_capacity_factor=2.0,
    min_capacity=4,
    capacity_rounding="round",
    drop_policy="rank_position",
    aux_loss_coeff=0.01,
    z_loss_coeff=1e-3,
)
EVERY_FOURTH = (0, 0, 0, 64)
MODEL = Model(
    hidden=5120,
    heads=64,
    head_dim=128,
    vocab=32_128,
    experts=EVERY_FOURTH * 6,
    encoder_experts=EVERY_FOURTH * 6,
    dense_ffn=20480,
    dense_activation="geglu",
    expert_ffn=20480,
    expert_activation="geglu",
    shared_ffn=20480,
    positions="relative",
)

PRESETS = (
    Preset(
        name="st-moe-32b",
        system="ST-MoE",
        source="arXiv:2202.08906, table 11, ST-MoE-32B",
        model=MODEL,
        routing=ROUTING,
        seq_length=512,
        note="published as encoder and decoder; the arguments are its decoder",
    ),
    Preset(
        name="st-moe-nano",
        system="ST-MoE",
        source="the routing of st-moe-32b at a size for tests",
        model=replace(
            MODEL,
            hidden=64,
            heads=4,
            head_dim=16,
            vocab=256,
            experts=(0, 0, 0, 8),
            encoder_experts=(),
            dense_ffn=256,
            expert_ffn=256,
            shared_ffn=256,
            positions="rope",
        ),
        routing=ROUTING,
        seq_length=64,
    ),
)
