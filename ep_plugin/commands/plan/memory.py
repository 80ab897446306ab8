"""Whether a model fits the GPUs of a layout: parameters exactly, activations by what is kept.

Assumptions:

- The decoder of a preset, as `ep-plugin presets NAME` gives it to Megatron; an embedding on the
  first stage, the output's matrix and one micro-batch of logits (bf16, and fp32 twice) on the last.
- bf16 weights, fp32 gradients, and Adam with fp32 weights and both moments (12 bytes) spread over
  the data-parallel ranks: dense ones over dp * cp, experts over edp.
- A layer's experts are spread over the most of the ep ranks that divide them; the others hold
  copies, with optimizer state of their own.
- 1F1B: stage s of pp keeps the activations of pp - s micro-batches.
- Attention and dense blocks keep their input, its norm, what their matrices make of it, and no
  matrix of scores (flash attention); sequence parallelism with tp. `recompute` keeps each layer's
  input, and one layer at a time.
- Experts keep the tokens as they came and the pre-activations, nothing else; routing is balanced
  and drops nothing.
- Not counted: CUDA, NCCL and workspaces, which take about a tenth of a GPU's memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ep_plugin.commands.plan.network import Traffic, received
from ep_plugin.errors import ConfigError
from ep_plugin.moe.config import GATED
from ep_plugin.moe.parallel import ParallelConfig, check_experts_over_ranks, degree
from ep_plugin.presets import Model, Preset, layer_params

WEIGHT, GRADIENT, ADAM = 2, 4, 12  # bytes of a parameter
USABLE = 0.9  # of a GPU's memory; the rest is what is not counted
LOGIT = 2 + 4 + 4


@dataclass(frozen=True)
class Memory:
    """What one GPU of a pipeline stage holds: numbers of parameters, and bytes."""

    stage: int
    dense_params: int
    expert_params: int
    weights: int  # with their gradients
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.activations


def split_layers(num_layers: int, pp: int) -> list[int]:
    """Return the layers of each stage, as even as they go, one more in the middle first."""
    each, rest = divmod(num_layers, pp)
    first = (pp - rest) // 2
    return [each + (first <= stage < first + rest) for stage in range(pp)]


def stage_memory(
    preset: Preset,
    parallel: ParallelConfig,
    layers: Sequence[int],
    *,
    micro_batch: int = 1,
    seq_length: int | None = None,
    recompute: bool = False,
    dedup: bool = False,
) -> list[Memory]:
    """Return what a GPU of each stage holds, of which `layers` says how many layers it has.

    Raises ConfigError when the largest layer's experts do not divide over the ranks, or stages and
    layers differ.
    """
    model = preset.model
    if model.positions != "learned":
        model = replace(model, positions="rope")
    if any(model.experts):
        check_experts_over_ranks(max(model.experts), parallel.ep)
    if len(layers) != parallel.pp or sum(layers) != len(model.experts):
        raise ConfigError(
            f"layers must name the {len(model.experts)} layers of {preset.name} in {parallel.pp} "
            f"stages; got {list(layers)}; use "
            f"{split_layers(len(model.experts), parallel.pp)}"
        )
    length = preset.seq_length if seq_length is None else seq_length
    tokens = micro_batch * length // (parallel.cp * parallel.tp)
    found, start = [], 0
    for stage, count in enumerate(layers):
        mine = model.experts[start : start + count]
        start += count
        dense, routed = _params(model, parallel, mine, stage)
        kept = [tokens * kept_in_layer(preset, parallel, experts, dedup) for experts in mine]
        flight = parallel.pp - stage
        if recompute:
            activations = flight * count * tokens * 2 * model.hidden + max(kept, default=0)
        else:
            activations = flight * sum(kept)
        if stage == parallel.pp - 1:
            activations += tokens * model.vocab * LOGIT
        found.append(
            Memory(
                stage=stage,
                dense_params=dense,
                expert_params=routed,
                weights=(dense + routed) * (WEIGHT + GRADIENT),
                optimizer=ADAM * dense // (parallel.dp * parallel.cp)
                + ADAM * routed // parallel.edp,
                activations=round(activations),
            )
        )
    return found


def _params(
    model: Model, parallel: ParallelConfig, mine: Sequence[int], stage: int
) -> tuple[int, int]:
    """Return the dense and the routed parameters of one GPU of a stage with layers `mine`."""
    layers = [layer_params(model, experts) for experts in mine]
    dense = sum(layer.tensor // parallel.tp + layer.replicated for layer in layers)
    table = model.vocab * model.hidden // parallel.tp
    first, last = stage == 0, stage == parallel.pp - 1
    if first:
        dense += table + (model.max_positions * model.hidden if model.positions == "learned" else 0)
    if last:
        dense += model.hidden * (2 if model.layer_norm else 1)  # the last norm
        if not (first and model.tied):
            dense += table
    routed = sum(
        layer.experts // degree(parallel.ep, experts)
        for layer, experts in zip(layers, mine, strict=True)
        if experts
    )
    return dense, routed // parallel.expert_tp


def kept_in_layer(preset: Preset, parallel: ParallelConfig, experts: int, dedup: bool) -> float:
    """Return the bytes a layer keeps for a token of this GPU; bf16."""
    model = preset.model
    if model.latent is not None:
        latent = model.latent
        query = model.heads * (latent.nope_dim + latent.rope_dim)
        value = model.heads * latent.value_dim
        narrow = latent.q_rank + latent.kv_rank + latent.rope_dim
        attention = 2 * narrow + 2 * query + 2 * value
    else:
        wide, keys = model.heads * model.head_dim, (model.kv_heads or model.heads) * model.head_dim
        attention = 2 * wide + 2 * keys + (wide + keys if model.qk_norm else 0)
    values = 2 * model.hidden + attention + 2 * model.hidden  # inputs and norms of both blocks
    if not experts:
        return 2.0 * (values + ffn_values(model.dense_ffn, model.dense_activation, 1))
    if model.shared_ffn:
        values += ffn_values(model.shared_ffn, model.dense_activation, 1)
    topk = min(preset.routing.topk, experts)
    traffic = Traffic(1, topk, model.hidden, experts)
    came = received(traffic, degree(parallel.ep, experts), dedup)
    values += round(came * model.hidden)
    routed = kept_by_experts(topk, model.expert_ffn, model.expert_activation)
    return 2.0 * values + routed + 2 * 4 * experts  # logits and scores, fp32


def kept_by_experts(rows: int, ffn: int, activation: str) -> int:
    """Return the bytes of the pre-activations of `rows` rows, in bf16."""
    return 2 * rows * ffn_values(ffn, activation, 0)


def ffn_values(size: int, activation: str, kept_output: int) -> int:
    """Return the pre-activations of a block of `size`, and its activation where that is kept."""
    return size * ((2 if activation in GATED else 1) + kept_output)
