"""The model, the data and the step that `core_loop.py` trains at every layout."""

import itertools
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

HIDDEN, VOCAB, LENGTH, EXPERTS = 32, 64, 16, 8


@dataclass(frozen=True)
class Case:
    """A model and how it is spread."""

    name: str
    world: int = 1
    sequences: int = 4  # of an iteration, each a micro-batch of its own
    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    etp: int = 1
    distributed_optimizer: bool = False
    recompute: str | None = None  # selective: the MoE layers; full
    per_token: bool = False  # --calculate-per-token-loss, and some tokens masked out
    masked: float = 1 / 3  # share of them
    counted: int = 0  # every so many tokens alone, where not 0
    padded: bool = False  # what is masked out is padding, and the model is told so
    values: int = 3  # that the loss function returns: 2 leaves out the number of tokens
    layers: int = 4
    dense_layers: int = 0  # the first ones
    bias: bool = False  # everywhere; with a shared expert, and nobody chooses the second half
    latent: str = ""  # attention: "plain" has a latent for keys and values, "queries" one for each
    sequence: bool = True  # sequence parallelism with TP
    combined: bool = False  # Megatron's combined 1F1B schedule
    experts: tuple[int, ...] = ()  # of each MoE layer, where they differ
    overlap: bool = False  # of gradient reduction with the backward
    pattern: str = ""  # of a HybridModel; its twin on one rank is a GPT
    block: str = "ours"  # stock: Megatron's own; untagged: ours without its tags for the norm

    def alone(self) -> "Case":
        """Return the same model on one rank."""
        return Case(
            f"one rank: {self.sequences}, {self.per_token}, {self.layers}, {self.dense_layers}, "
            f"{self.bias}, {self.padded}, {self.latent}, {self.masked}, {self.experts}",
            sequences=self.sequences,
            per_token=self.per_token,
            masked=self.masked,
            padded=self.padded,
            layers=self.layers,
            dense_layers=self.dense_layers,
            bias=self.bias,
            latent=self.latent,
            experts=self.experts,
        )


def transformer_config(case: Case) -> Any:
    """Return Megatron's configuration of the case's model."""
    from megatron.core.transformer.transformer_config import (
        MLATransformerConfig,
        TransformerConfig,
    )

    attention, config_type = {}, TransformerConfig
    if case.latent:
        config_type = MLATransformerConfig
        attention = {
            "multi_latent_attention": True,
            "q_lora_rank": 8 if case.latent == "queries" else None,
            "kv_lora_rank": 16,
            "qk_head_dim": 8,
            "qk_pos_emb_head_dim": 4,
            "v_head_dim": 8,
        }
    recompute: dict[str, Any] = {}
    if case.recompute == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    elif case.recompute == "full":
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    symbols = case.pattern.replace("|", "")
    layers = case.layers, [int(layer >= case.dense_layers) for layer in range(case.layers)]
    num_layers, frequency = (len(symbols), 1) if symbols else layers
    config = config_type(
        num_layers=num_layers,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        ffn_hidden_size=48,
        moe_ffn_hidden_size=32,
        num_moe_experts=max(case.experts, default=EXPERTS),
        moe_router_topk=2,
        moe_layer_freq=frequency,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=2e-2,
        moe_z_loss_coeff=1e-3,
        moe_token_dispatcher_type="alltoall",
        moe_shared_expert_intermediate_size=16 if case.bias else None,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=case.bias,
        normalization="RMSNorm",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=case.tp,
        sequence_parallel=case.tp > 1 and case.sequence,
        context_parallel_size=case.cp,
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.vpp,
        overlap_p2p_comm=case.vpp is not None,  # as Megatron's arguments: two stages mix up batched
        batch_p2p_comm=case.vpp is None,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=case.etp,
        calculate_per_token_loss=case.per_token,
        pipeline_dtype=torch.float32,
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        **recompute,
        **attention,
    )
    # Megatron asks for bf16 with it; in fp32 it can be compared.
    config.overlap_moe_expert_parallel_comm = case.combined
    config.pattern = case.pattern
    return config


def build(config: Any, stage: int | None) -> Any:
    """Return one pipeline stage of a GPT, or one virtual stage."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    if _pattern(config):
        return _hybrid(config, stage)
    where = {"ignore_virtual": stage is None, "vp_stage": stage}
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=stage
    )
    if config.context_parallel_size > 1:
        from context_parallel import GatheredAttention

        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = GatheredAttention
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(**where),
        post_process=parallel_state.is_pipeline_last_stage(**where),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        vp_stage=stage,
    )
    model.model_type = "encoder_or_decoder"
    return model


def _hybrid(config: Any, stage: int | None) -> Any:
    """Return one pipeline stage of a HybridModel."""
    from megatron.core import parallel_state
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    where = {"ignore_virtual": stage is None, "vp_stage": stage}
    return HybridModel(
        config=config,
        hybrid_stack_spec=hybrid_stack_spec,
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        hybrid_layer_pattern=config.pattern,
        pre_process=parallel_state.is_pipeline_first_stage(**where),
        post_process=parallel_state.is_pipeline_last_stage(**where),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        vp_stage=stage,
    )


def _pattern(config: Any) -> str:
    return getattr(config, "pattern", "")  # a script's own configuration has none


def in_gpt(name: str, pattern: str) -> str:
    """Return what a tensor of a HybridModel, or a scalar of one of its layers, is in its GPT twin.

    An attention and the block behind it are one layer there. Keys count layers from 0, scalars from
    1 ("layer_2").
    """
    if not pattern:
        return name
    attentions = list(itertools.accumulate(symbol in "*+" for symbol in pattern.replace("|", "")))
    name = re.sub(r"\blayers\.(\d+)", lambda m: f"layers.{attentions[int(m[1])] - 1}", name)
    name = re.sub(r"\blayer_(\d+)", lambda m: f"layer_{attentions[int(m[1]) - 1]}", name)
    if "+" not in pattern:  # local GPT layers save this norm as a part of the map behind it
        name = name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
    return name.replace("final_norm", "final_layernorm")


@torch.no_grad()
def fill(model: Any) -> None:
    """Give every parameter the values that its key and its place in the whole tensor stand for."""
    numbers = 0
    for piece in _pieces(model):
        key = in_gpt(piece.key, _pattern(model.config))
        piece.data.copy_(_whole(key, piece.global_shape)[_place(piece)])
        numbers += piece.data.numel()
    assert numbers == sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def magnitudes(models: list[Any], what: str) -> dict[str, float]:
    """Return of each tensor of the whole model the sum of its magnitudes, weighed by their places.

    `what` is `weight`, or `grad` for `main_grad`. Each number counts where it would be saved.
    """
    found: dict[str, float] = {}
    for model in models:
        values = {parameter: parameter.data.clone() for parameter in model.parameters()}
        if what == "grad":
            for parameter in values:
                parameter.data.copy_(parameter.main_grad)
        for piece in _pieces(model):
            if all(part == 0 for part in _flat(piece.replica_id)):
                name = f"{what} {in_gpt(piece.key, _pattern(model.config))}"
                weights = 1 + _whole(name, piece.global_shape)[_place(piece)].abs()
                share = float((piece.data.abs() * weights).double().sum())
                found[name] = found.get(name, 0.0) + share
        for parameter, value in values.items():
            parameter.data.copy_(value)
    every: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(every, found)
    return {name: sum(part.get(name, 0.0) for part in every) for name in set().union(*every)}


def _flat(replica_id: Any) -> tuple[int, ...]:
    return replica_id if isinstance(replica_id, tuple) else (replica_id,)


def _pieces(model: Any) -> Iterator[Any]:
    """Yield the ShardedTensors of a model, those of our experts cut as they are saved."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for entry in model.sharded_state_dict().values():
        pieces = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
        if isinstance(pieces, dict):
            pieces = list(pieces.values())
        for piece in pieces if isinstance(pieces, list) else [pieces]:
            if isinstance(piece, ShardedTensor):
                yield piece


def _whole(key: str, shape: tuple[int, ...]) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if key.endswith("norm.weight"):
        return 1 + 0.1 * values
    if key.endswith("router.bias"):
        values[..., values.shape[-1] // 2 :] -= 1000.0
        return values
    return values * (0.3 if ".experts." in key else 0.1)


def _place(piece: Any) -> tuple[Any, ...]:
    prepended = piece.prepend_axis_num
    sizes = (*[1] * prepended, *piece.local_shape)
    return tuple(
        first if axis < prepended else slice(first, first + size)
        for axis, (first, size) in enumerate(zip(piece.global_offset, sizes, strict=True))
    )


def places(cp_rank: int, cp: int) -> Tensor:
    """Return the positions [S / CP] that Megatron gives a context-parallel rank: two pieces, so
    that causal attention costs each the same."""
    pieces = torch.arange(LENGTH).chunk(2 * cp)
    return torch.cat([pieces[cp_rank], pieces[2 * cp - 1 - cp_rank]])


def batches(
    case: Case, iteration: int, dp_rank: int, dp: int, cp_rank: int
) -> Iterator[dict[str, Any]]:
    """Yield this rank's micro-batches of its part of one sequence; tensors [1, S / CP]."""
    generator = torch.Generator().manual_seed(iteration // 2)
    tokens = torch.randint(VOCAB, (case.sequences, LENGTH + 1), generator=generator)
    masked = case.masked if case.per_token else 0
    kept = torch.rand(case.sequences, LENGTH, generator=generator) > masked
    if case.counted:
        kept = (torch.arange(LENGTH) % case.counted == 0).expand(case.sequences, -1)
    here = places(cp_rank, case.cp)
    for index in range(dp_rank, case.sequences, dp):
        yield {
            "tokens": tokens[index : index + 1, here],
            "labels": tokens[index : index + 1, here + 1],
            "mask": kept[index : index + 1, here].float(),
            "values": torch.tensor(case.values),
            "padding": kept[index : index + 1, here] == 0 if case.padded else None,
        }


def forward_step(
    data: Iterator[dict[str, Any]], model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    """Run the model on a micro-batch; return its losses [1, S] and how to sum them.

    Or the plan of such a run, as the combined schedule wants it.
    """
    batch = next(data)
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    positions = torch.arange(LENGTH)[None]
    padding = {} if batch["padding"] is None else {"padding_mask": batch["padding"]}
    run = model.build_schedule_plan if return_schedule_plan else model
    losses = run(batch["tokens"], positions, hidden, labels=batch["labels"], **padding)

    def loss_func(losses: Tensor) -> tuple[Any, ...]:
        loss, tokens = (losses * batch["mask"]).sum(), batch["mask"].sum()
        said = {"lm loss": torch.stack([loss.detach(), tokens])}
        return (loss, tokens.int(), said) if batch["values"] == 3 else (loss / tokens, said)

    return losses, loss_func
