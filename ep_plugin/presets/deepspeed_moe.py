"""DeepSpeed-MoE (arXiv:2201.05596, ICML 2022): one expert per token, random token selection.

Top-1 with the probability itself as weight; an expert takes its fair share of the rank's tokens,
rounded up, at least 4, and when more want it a random draw decides, so that late tokens do as well
as early ones. MoE in the second layer of each pair of a GPT-2. Every expert of a layer starts from
the same values there and from its own here.

PR-MoE is a pyramid with a residual: later layers have more experts, and each token's dense
feed-forward block is weighed against its expert by a learned softmax of two. (The paper adds the
two; the code weighs them, as here. `--ep-shared-expert sum` is the paper's.) MoS is a student of
PR-MoE with 21 of 24 layers, distilled for the first 70 % of its tokens: `--ep-teacher CKPT`, whose
defaults are its weight, temperature and stop.

With top-2 the second expert is drawn from the softmax without the first, in evaluation too, and
weights are divided by the sum of those that were not dropped. Table 6 prints 30 and 40 layers for
the two largest models but one; only swapped do they give its sizes, as here.
"""

from dataclasses import replace

from ep_plugin.moe.routing_config import RoutingConfig
from ep_plugin.presets._model import Model, Preset

ROUTING = RoutingConfig(
    topk=1,
    normalize="none",
    capacity_factor=1.0,
    eval_capacity_factor=1.0,
    min_capacity=4,
    drop_policy="random",
    aux_loss_coeff=0.01,
    aux_loss_counts="top1",
)
TOP2 = replace(
    ROUTING,
    topk=2,
    normalize="after_drop",
    second_expert="sampling",
    drop_policy="rank_position",
)
INFERENCE = replace(ROUTING, min_capacity=1, drop_policy="position")
MOS = "the student's model; --ep-teacher CKPT distils it, by default as published"


def _model(layers: int, hidden: int, heads: int, counts: tuple[int, ...], residual: bool) -> Model:
    """Return a GPT-2 whose second layer of each pair has the next of `counts` experts."""
    upcoming = iter(counts)
    experts = tuple(next(upcoming) if layer % 2 else 0 for layer in range(layers))
    return Model(
        hidden=hidden,
        heads=heads,
        head_dim=hidden // heads,
        vocab=50_304,
        experts=experts,
        dense_ffn=4 * hidden,
        dense_activation="gelu",
        expert_ffn=4 * hidden,
        expert_activation="gelu",
        shared_ffn=4 * hidden if residual else 0,
        shared_expert="learned" if residual else "sum",
        tied=True,
        positions="learned",
        max_positions=2048,
        biases=True,
        layer_norm=True,
    )


def _preset(
    name: str,
    table: str,
    model: Model,
    routing: RoutingConfig = ROUTING,
    note: str = "",
    init_std: float | None = 0.014,
) -> Preset:
    return Preset(
        name=name,
        system="DeepSpeed-MoE",
        source=f"arXiv:2201.05596, {table}",
        model=model,
        routing=routing,
        seq_length=2048,
        init_std=init_std,
        dropout=0.1,  # Megatron's default, which its scripts keep
        note=note,
    )


def _inference(name: str, layers: int, hidden: int, heads: int) -> Preset:
    """Return one of table 6; its heads (dimension 128) and initial values are not published."""
    model = _model(layers, hidden, heads, (128,) * (layers // 2), False)
    return _preset(name, "table 6", model, INFERENCE, init_std=None)


def _nano(name: str, like: str, counts: tuple[int, ...], residual: bool, layers: int = 4) -> Preset:
    model = _model(layers, 64, 4, counts, residual)
    return Preset(
        name=name,
        system="DeepSpeed-MoE",
        source=f"the routing of {like} at a size for tests",
        model=replace(model, vocab=256, max_positions=64),
        routing=ROUTING,
        seq_length=64,
    )


PRESETS = (
    _preset("ds-125m-moe64", "section 3", _model(12, 768, 12, (64,) * 6, False)),
    _preset("ds-350m-moe128", "table 2", _model(24, 1024, 16, (128,) * 12, False)),
    _preset("ds-1.3b-moe128", "table 2", _model(24, 2048, 16, (128,) * 12, False)),
    _preset("ds-350m-prmoe-32-64", "table 4", _model(24, 1024, 16, (32,) * 10 + (64,) * 2, True)),
    _preset("ds-1.3b-prmoe-64-128", "table 4", _model(24, 2048, 16, (64,) * 10 + (128,) * 2, True)),
    _preset(
        *("ds-350m-mos-l21", "table 5", _model(21, 1024, 16, (32,) * 8 + (64,) * 2, True)),
        note=MOS,
    ),
    _preset(
        *("ds-1.3b-mos-l21", "table 5", _model(21, 2048, 16, (64,) * 8 + (128,) * 2, True)),
        note=MOS,
    ),
    _preset("ds-top2", "section 3", _model(24, 1024, 16, (128,) * 12, False), TOP2),
    _inference("ds-infer-52b", 24, 2048, 16),
    _inference("ds-infer-107b", 16, 3584, 28),
    _inference("ds-infer-349b", 40, 4096, 32),
    _inference("ds-infer-1t", 30, 8192, 64),
    _inference("ds-infer-2t", 58, 8192, 64),
    _nano("dsmoe-nano", "ds-350m-moe128", (8, 8), False),
    _nano("prmoe-nano", "ds-350m-prmoe-32-64", (4, 8), True),
    _nano("mos-nano", "ds-350m-mos-l21", (8,), True, layers=3),
)
