"""What a preset holds, and how its parameters are counted."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ep_plugin.moe.config import GATED, Activation, Option, SharedExpert, Size
from ep_plugin.moe.routing_config import MOST_EXPERTS, RoutingConfig, Tokens
from ep_plugin.typed import Typed, Within

Positions = Literal["rope", "learned", "relative", "relative_per_layer"]
Or0 = Annotated[int, Within(0, 1 << 24)]  # a size, 0 for none
Experts = Annotated[int, Within(0, MOST_EXPERTS)]
RELATIVE_BUCKETS = 32  # T5's table of relative positions: one value per bucket and head


@dataclass(frozen=True, kw_only=True)
class LatentAttention(Typed):
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""

    q_rank: Or0
    kv_rank: Size
    nope_dim: Size  # of each head's query and key, without position
    rope_dim: Size  # the part with position; one key for all heads
    value_dim: Size


@dataclass(frozen=True, kw_only=True)
class Model(Typed):
    """A published architecture, as far as its parameters go."""

    hidden: Size
    heads: Size
    head_dim: Size
    vocab: Size
    experts: tuple[Experts, ...]  # of each decoder layer, 0 = dense
    encoder_experts: tuple[Experts, ...] = ()  # of each encoder layer, where there is one
    kv_heads: Size | None = None  # None: as many as heads
    dense_ffn: Or0
    dense_activation: Activation = "swiglu"
    expert_ffn: Or0
    expert_activation: Activation = "swiglu"
    shared_ffn: Or0 = 0  # beside the routed experts of each MoE layer
    shared_expert: SharedExpert = "sum"
    tied: bool = False  # one matrix for embedding and output
    positions: Positions = "rope"
    max_positions: Or0 = 0  # learned ones
    biases: bool = False
    layer_norm: bool = False  # with a bias; else RMS norm
    norm_epsilon: float = 1e-5
    qk_norm: bool = False
    latent: LatentAttention | None = None
    rotary_base: int = 10_000


@dataclass(frozen=True, kw_only=True)
class Preset(Typed):
    """A published system: its model, its routing, and where both come from."""

    name: str
    system: str
    source: str
    model: Model
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    router: Option = "topk"
    seq_length: Tokens
    init_std: float | None = None
    dropout: float = 0.0
    note: str = ""


def total_params(preset: Preset) -> int:
    """Return all parameters of the published model: embeddings, routers and norms too."""
    return _count(preset, None)


def active_params(preset: Preset) -> int:
    """Return the parameters one token meets: all but the experts it is not sent to."""
    return _count(preset, preset.routing.topk)


def _count(preset: Preset, chosen: int | None) -> int:
    """Count with all experts (None) or with `chosen` of each layer."""
    model = preset.model
    stacks = [(model.experts, bool(model.encoder_experts))]  # its decoder reads the encoder
    if model.encoder_experts:
        stacks.append((model.encoder_experts, False))
    total = model.vocab * model.hidden * (1 if model.tied else 2)
    if model.positions == "learned":
        total += model.max_positions * model.hidden
    if preset.routing.expert_bias:
        total += sum(model.experts)  # one value each, not trained by gradients
    for stack, cross in stacks:
        layers = [layer_params(model, experts, chosen, cross) for experts in stack]
        total += sum(layer.total for layer in layers)
        total += _norm(model)
        if model.positions == "relative":
            total += RELATIVE_BUCKETS * model.heads
    return total


@dataclass(frozen=True)
class LayerParams:
    """Parameters of a layer or a part of it, by the ranks that share them."""

    tensor: int = 0  # over tensor-parallel ranks
    replicated: int = 0  # norms, router, biases behind a sum
    experts: int = 0  # over expert-parallel ranks, with their biases

    def __add__(self, other: "LayerParams") -> "LayerParams":
        return LayerParams(
            self.tensor + other.tensor,
            self.replicated + other.replicated,
            self.experts + other.experts,
        )

    @property
    def total(self) -> int:
        return self.tensor + self.replicated + self.experts


def layer_params(
    model: Model, experts: int, chosen: int | None = None, cross: bool = False
) -> LayerParams:
    """Return the parameters of a layer with `experts` experts (0: dense), `chosen` of them counted.

    `cross` adds the block that reads an encoder.
    """
    attention = _latent(model, model.latent) if model.latent else _attention(model)
    total = attention + LayerParams(replicated=2 * _norm(model))
    if cross:
        total += attention + LayerParams(replicated=_norm(model))
    if model.positions == "relative_per_layer":
        total += LayerParams(replicated=RELATIVE_BUCKETS * model.heads)
    if not experts:
        return total + _ffn(model, model.dense_ffn, model.dense_activation)
    if model.shared_ffn:
        total += _ffn(model, model.shared_ffn, model.dense_activation)
        if model.shared_expert == "learned":
            total += LayerParams(replicated=2 * model.hidden + 2)
    one = _ffn(model, model.expert_ffn, model.expert_activation).total
    counted = experts if chosen is None else min(chosen, experts)
    return total + LayerParams(replicated=experts * model.hidden, experts=one * counted)


def _attention(model: Model) -> LayerParams:
    width, kv_width = model.heads * model.head_dim, (model.kv_heads or model.heads) * model.head_dim
    tensor = model.hidden * (2 * width + 2 * kv_width)
    replicated = 2 * model.head_dim if model.qk_norm else 0
    if model.biases:
        tensor += width + 2 * kv_width
        replicated += model.hidden
    return LayerParams(tensor, replicated)


def _latent(model: Model, latent: LatentAttention) -> LayerParams:
    query = model.heads * (latent.nope_dim + latent.rope_dim)
    key_value = model.heads * (latent.nope_dim + latent.value_dim)
    down = model.hidden * (latent.q_rank + latent.kv_rank + latent.rope_dim)
    up = latent.q_rank * query + latent.kv_rank * key_value
    output = model.heads * latent.value_dim * model.hidden
    norms = latent.q_rank + latent.kv_rank
    return LayerParams(up + output, down + norms)  # as Transformer Engine's layers do


def _ffn(model: Model, size: int, activation: Activation) -> LayerParams:
    rows = size * (2 if activation in GATED else 1)
    if not model.biases:
        return LayerParams(model.hidden * (rows + size))
    return LayerParams(model.hidden * (rows + size) + rows, model.hidden)


def _norm(model: Model) -> int:
    return model.hidden * (2 if model.layer_norm else 1)


def of_each_layer(coefficient: float, topk: int, layers: int) -> float:
    """Return Megatron's coefficient of each layer's balancing loss for one of the whole model.

    That one's loss adds up all choices and is the mean over layers. Returned to 12 digits, which
    `convert` writes.
    """
    return float(f"{coefficient * topk / layers:.12g}")
