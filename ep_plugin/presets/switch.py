"""Switch Transformer (arXiv:2101.03961; JMLR 23, 2022): one expert per token.

The weight is the chosen expert's probability, never divided by itself: that is the router's only
gradient (eq. 2). The input is cast to fp32 and multiplied by U[0.99, 1.01] in training (appendix
C). Each routing group of tokens fills experts in order of arrival, 1.25 times a fair share in
training and 2.0 in evaluation, at least 4; the rest pass by on the residual. The balancing loss
(eq. 4) counts choices before anything is dropped, group by group.

Sources disagree. Capacity is rounded down in Mesh TensorFlow and to the nearest in T5X: down here,
`--ep-capacity-rounding round` is the other. Groups have 1024 tokens in Mesh TensorFlow, those of
T5X are here. Experts of Base and Large are 2-matrix ReLU in T5X as here, GEGLU of two thirds the
width in the paper: the same size. Table 9 prints 64 experts for XXL; only 128 gives its 395B.
"""

from dataclasses import replace

from ep_plugin.moe.routing_config import RoutingConfig
from ep_plugin.presets._model import Model, Preset

ROUTING = RoutingConfig(
    topk=1,
    normalize="none",
    jitter_eps=0.01,
    capacity_factor=1.25,
    eval_capacity_factor=2.0,
    min_capacity=4,
    capacity_rounding="floor",
    drop_policy="position",
    group_tokens=8192,
    aux_loss_coeff=0.01,
    aux_loss_counts="top1",
    aux_loss_scope="group",
)
EVERY_SECOND = (0, 128)
BASE = Model(
    hidden=768,
    heads=12,
    head_dim=64,
    vocab=32128,
    experts=EVERY_SECOND * 6,
    encoder_experts=EVERY_SECOND * 6,
    dense_ffn=3072,
    dense_activation="relu",
    expert_ffn=3072,
    expert_activation="relu",
    tied=True,
    positions="relative",
    norm_epsilon=1e-6,
)
LARGE = replace(
    BASE,
    hidden=1024,
    heads=16,
    dense_ffn=4096,
    expert_ffn=4096,
    experts=EVERY_SECOND * 12,
    encoder_experts=EVERY_SECOND * 12,
)
XXL = replace(
    LARGE,
    hidden=4096,
    heads=64,
    dense_ffn=10240,
    dense_activation="geglu",
    expert_ffn=10240,
    expert_activation="geglu",
    tied=False,
)
C = replace(
    BASE,
    hidden=2080,
    heads=32,
    dense_ffn=6144,
    expert_ffn=6144,
    experts=(2048,) * 15,
    encoder_experts=(2048,) * 15,
)
NANO = Model(
    hidden=64,
    heads=4,
    head_dim=16,
    vocab=256,
    experts=(0, 8) * 2,
    dense_ffn=256,
    dense_activation="relu",
    expert_ffn=256,
    expert_activation="relu",
    tied=True,
    norm_epsilon=1e-6,
)
NOTE = "published as encoder and decoder with relative positions; the arguments are its decoder"


def _preset(name: str, model: Model, routing: RoutingConfig, table: str) -> Preset:
    return Preset(
        name=name,
        system="Switch Transformer",
        source=f"arXiv:2101.03961, {table}",
        model=model,
        routing=routing,
        seq_length=512,
        note=NOTE,
    )


PRESETS = (
    _preset("switch-base-128", BASE, ROUTING, "table 9, Switch-Base"),
    _preset(
        "switch-large-128", LARGE, replace(ROUTING, group_tokens=4096), "table 9, Switch-Large"
    ),
    _preset(
        "switch-xxl-128",
        XXL,
        replace(ROUTING, eval_capacity_factor=4.0, min_capacity=2, group_tokens=4096),
        "table 9, Switch-XXL",
    ),
    _preset(
        "switch-c-2048",
        C,
        replace(ROUTING, capacity_factor=1.0, min_capacity=2, group_tokens=2048),
        "table 9, Switch-C",
    ),
    Preset(
        name="switch-nano",
        system="Switch Transformer",
        source="the routing of switch-base-128 at a size for tests",
        model=NANO,
        routing=replace(ROUTING, group_tokens=64),
        seq_length=64,
    ),
)
