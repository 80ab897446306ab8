"""GLaM (arXiv:2112.06905, ICML 2022): two of 64 experts in the first layer of each pair.

Weights are g1 / (g1 + g2) and g2 / (g1 + g2), divided before anything is dropped. An expert takes
2 * S / E tokens (which is once a fair share for two choices), rounded down and then up to a
multiple of 4; all first choices are served before any second. The balancing loss is GShard's, over
first choices. Dense blocks are gated GELU with three matrices, experts have two: only so do the
sizes of table 4 come out. Heads times their dimension is 16384 for a hidden size of 8192.

Sources disagree. Experts are ReLU in the public code, the paper does not say; the other is
`--ep-expert-activation gelu`. The loss is summed over layers; one public configuration takes the
mean: `--ep-aux-loss-layers mean`. Rows of the scaling study fit a vocabulary of 32,000, the largest
one of 256,000. Table 4's total of 1.7B/32E (20B) does not fit its own shape, which has 14.0B.
"""

from dataclasses import replace

from ep_plugin.moe.routing_config import RoutingConfig
from ep_plugin.presets._model import Model, Preset

ROUTING = RoutingConfig(
    topk=2,
    capacity_factor=2.0,
    eval_capacity_factor=2.0,
    capacity_rounding="floor_x4",
    capacity_counts_topk=False,
    drop_policy="rank_position",
    aux_loss_coeff=0.01,
    aux_loss_counts="top1",
)
NOTE = "published with relative positions in each layer; the arguments have rotary ones"


def _model(layers: int, hidden: int, ffn: int, heads: int, head_dim: int, experts: int) -> Model:
    return Model(
        hidden=hidden,
        heads=heads,
        head_dim=head_dim,
        vocab=32_000,
        experts=(experts, 0) * (layers // 2) if experts else (0,) * layers,
        dense_ffn=ffn,
        dense_activation="geglu",
        expert_ffn=ffn,
        expert_activation="relu",
        tied=True,
        positions="relative_per_layer",
        norm_epsilon=1e-6,
    )


def _preset(name: str, model: Model, row: str) -> Preset:
    return Preset(
        name=name,
        system="GLaM",
        source=f"arXiv:2112.06905, table 4, {row}",
        model=model,
        routing=ROUTING,
        seq_length=1024,
        note=NOTE,
    )


PRESETS = (
    _preset("glam-0.1b-64e", _model(12, 768, 3072, 12, 64, 64), "0.1B/64E"),
    *(
        _preset(f"glam-1.7b-{e}e", _model(24, 2048, 8192, 16, 128, e), f"1.7B/{e}E")
        for e in (32, 64, 128, 256)
    ),
    _preset("glam-8b-64e", _model(32, 4096, 16384, 32, 128, 64), "8B/64E"),
    _preset("glam-137b-dense", _model(64, 8192, 65536, 128, 128, 0), "137B"),
    _preset(
        "glam-64b-64e", replace(_model(64, 8192, 32768, 128, 128, 64), vocab=256_000), "64B/64E"
    ),
    Preset(
        name="glam-nano",
        system="GLaM",
        source="the routing of glam-64b-64e at a size for tests",
        model=replace(_model(4, 64, 256, 4, 16, 8), vocab=256),
        routing=ROUTING,
        seq_length=64,
    ),
)
