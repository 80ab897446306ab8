"""ST-MoE (arXiv:2202.08906): top-2 of 64 experts in every fourth layer, with a router z-loss.

The z-loss (eq. 5), 1e-3 times the mean of logsumexp(logits)^2, keeps logits small enough for bf16.
An expert takes 1.25 * S / E of the 4096 tokens of a group in training and 2 * S / E in evaluation,
whatever the number of choices: 0.63 and once a fair share of two. First choices go first. Each
sparse block has one more dense feed-forward block after it, a shared expert beside it here.

Sources disagree. Weights are divided by their sum in Mesh TensorFlow's top-2, as here, and not in
T5X: `--ep-normalize none`. T5X's loss is 2 when balanced, twice the one here:
`--ep-aux-loss-coeff 0.02`. Its jitter is off. A capacity of 1.25 times both choices:
`--ep-capacity-counts-topk on`.
"""

from dataclasses import replace

from ep_plugin.moe.routing_config import RoutingConfig
from ep_plugin.presets._model import Model, Preset

ROUTING = RoutingConfig(
    topk=2,
    capacity_factor=1.25,
    eval_capacity_factor=2.0,
    min_capacity=4,
    capacity_rounding="round",
    capacity_counts_topk=False,
    drop_policy="rank_position",
    group_tokens=4096,
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
    norm_epsilon=1e-6,
)

PRESETS = (
    Preset(
        name="st-moe-32b",
        system="ST-MoE",
        source="arXiv:2202.08906, table 11, ST-MoE-32B",
        model=MODEL,
        routing=ROUTING,
        seq_length=512,
        note="published as encoder and decoder; the arguments are its decoder, with rotary "
        "positions and the extra dense block of a sparse layer beside its experts, not after them",
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
        routing=replace(ROUTING, group_tokens=64),
        seq_length=64,
    ),
)
