"""GShard (arXiv:2006.16668): top-2 whose second expert is sent by chance.

Weights are g1 / (g1 + g2) and g2 / (g1 + g2); the second choice is sent with probability
min(1, 2 * g2) (algorithm 1), and one that is not takes no room. An expert takes 2 * S / E tokens
of a group. Algorithm 1 counts overflow too and divides its loss by E instead of multiplying; this
is the form of the public code, 1 when balanced. The 600B of table 1 are 618B by its shape.

Table 1 counts encoder and decoder layers together. Not published, and assumed here: a vocabulary of
64,000, sequences of 1,024 tokens, no biases, T5's relative positions; together under 0.2 % of the
parameters.
"""

from dataclasses import replace

from ep_plugin.moe.routing_config import RoutingConfig
from ep_plugin.presets._model import Model, Preset

ROUTING = RoutingConfig(
    topk=2,
    second_expert="random",
    second_threshold=0.5,
    capacity_factor=2.0,
    eval_capacity_factor=2.0,
    capacity_rounding="floor_x4",
    capacity_counts_topk=False,
    drop_policy="rank_position",
    aux_loss_coeff=0.01,
    aux_loss_counts="top1",
)
MODEL = Model(
    hidden=1024,
    heads=16,
    head_dim=128,
    vocab=64_000,
    experts=(0, 2048) * 9,
    encoder_experts=(0, 2048) * 9,
    dense_ffn=8192,
    dense_activation="relu",
    expert_ffn=8192,
    expert_activation="relu",
    tied=True,
    positions="relative",
    norm_epsilon=1e-6,
)

PRESETS = (
    Preset(
        name="gshard-600b",
        system="GShard",
        source="arXiv:2006.16668, table 1, MoE(2048E, 36L)",
        model=MODEL,
        routing=ROUTING,
        seq_length=1024,
        note="published as encoder and decoder; the arguments are its decoder, positions rotary",
    ),
    Preset(
        name="gshard-nano",
        system="GShard",
        source="the routing of gshard-600b at a size for tests",
        model=replace(
            MODEL,
            hidden=64,
            heads=4,
            head_dim=16,
            vocab=256,
            experts=(0, 8) * 2,
            encoder_experts=(),
            dense_ffn=256,
            expert_ffn=256,
            positions="rope",
        ),
        routing=ROUTING,
        seq_length=64,
    ),
)
