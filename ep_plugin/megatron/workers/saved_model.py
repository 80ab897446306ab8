"""A model of a checkpoint's own run arguments: what it is built with, and its weights."""

import argparse
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.training import arguments as megatron_arguments

from ep_plugin.checkpoint.names import norms
from ep_plugin.megatron.arguments.table import TABLE
from ep_plugin.megatron.cpu.latent_attention import use_local_latent_attention

# One rank, float32, no fused kernel, no dropout: what every model is built with.
_PLAIN: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "tensor_parallel_num_weight_shards": None,
    "expert_tensor_parallel_num_weight_shards": None,
    "gtp_weight_remat_size": 1,
    "expert_gtp_weight_remat_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "tp_comm_overlap": False,
    "overlap_moe_expert_parallel_comm": False,
    "delay_wgrad_compute": False,
    "overlap_dispatch_backward_with_experts_wgrad": False,
    "params_dtype": torch.float32,
    "bf16": False,
    "fp16": False,
    "fp8": None,
    "fp4": None,
    "fp32_residual_connection": False,
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "perform_initialization": False,
    "cpu_offloading": False,
    "cuda_graph_impl": "none",
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "apply_rope_fusion": False,
    "bias_dropout_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "no_persist_layer_norm": True,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
    "moe_token_dispatcher_type": "alltoall",
    "moe_enable_deepep": False,
    "moe_flex_dispatcher_backend": "deepep",
    "ep_gemm": "auto",
    "ep_save": None,
    # Files that Megatron would read or write.
    "config_logger_dir": "",
    "heterogeneous_layers_config_path": None,
    "heterogeneous_layers_config_encoded_json": None,
    "kitchen_config_file": None,
    "kitchen_recipe_number": None,
    "te_precision_config_file": None,
    **{row.dest: row.default for row in TABLE if row.group in ("dispatch", "overlap", "fp8")},
}


def plain(args: argparse.Namespace) -> argparse.Namespace:
    """Return the run arguments, defaults where there are none, for one plain rank."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    megatron_arguments.add_megatron_arguments(parser)  # with ours: the plugin is installed
    values = vars(parser.parse_args([])) | vars(args)
    window = values["window_size"]
    if window and window[0] < 0 and values["transformer_impl"] == "transformer_engine":
        values["window_size"] = None  # no end on the left, where local attention would see nothing
    return argparse.Namespace(**(values | _PLAIN))


def build(args: argparse.Namespace) -> Any:
    """Return the model of plain run arguments, of local layers, with weights that are not set."""
    config = megatron_arguments.core_transformer_config_from_args(args)
    if args.num_experts:
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=args.normalization
        )
        if config.multi_latent_attention:
            use_local_latent_attention(spec)
    else:
        spec = get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
            normalization=args.normalization,
        )
    return of_layers(spec, config, args)


def of_layers(spec: Any, config: Any, args: argparse.Namespace) -> Any:
    """Return the model of these layers, and of run arguments for what lies outside of them."""
    with _without_warning():
        return GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
            rotary_percent=args.rotary_percent,
            rotary_base=args.rotary_base,
            rope_scaling=args.use_rope_scaling,
            rope_scaling_factor=args.rope_scaling_factor,
            seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        )


@contextmanager
def _without_warning() -> Iterator[None]:
    """Megatron warns of the class GPTModel, which is our choice here and not the user's."""
    logger = logging.getLogger(GPTModel.__module__)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def load_weights(
    model: Any,
    folder: Path,
    metadata: dict[str, Any],
    fused_norm_kept: bool,
    layers: Collection[int] | None = None,
) -> None:
    """Load the weights of some layers, with none those outside of layers; None: all.

    Raises Megatron's CheckpointingException when a parameter has no tensor.
    """
    with only_layers(model.decoder, layers):
        state = sharded_state(model, metadata)
    inside = tuple(f"decoder.layers.{layer}." for layer in layers or ())
    if layers:
        state = {name: value for name, value in state.items() if name.startswith(inside)}
    if not fused_norm_kept:
        _rename_norms(model, state)
    whole = layers is None  # Megatron can check that each part of a tensor is asked for once
    loaded = dist_checkpointing.load(
        {"model": state}, str(folder), validate_access_integrity=whole
    )["model"]
    missing, unknown = model.load_state_dict(loaded, strict=whole)
    lacking = [
        name
        for name in missing
        if name.startswith(inside or ("embedding.", "output_layer.", "decoder.final_"))
        and not name.endswith("_extra_state")
    ]
    assert not lacking + unknown, (lacking, unknown)


def sharded_state(model: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state: dict[str, Any] = model.sharded_state_dict(metadata={**metadata, "dp_cp_group": group})
    return state


@contextmanager
def only_layers(decoder: Any, layers: Collection[int] | None) -> Iterator[None]:
    """Let the decoder name the tensors of these layers alone; None: of all."""
    every = decoder.layers
    if layers is not None:
        decoder.layers = torch.nn.ModuleList(every[number] for number in layers)
    try:
        yield
    finally:
        decoder.layers = every


def _rename_norms(model: Any, state: dict[str, Any]) -> None:
    """Name norms as Transformer Engine does, which fuses others into what follows than we do."""
    latent = model.config.multi_latent_attention
    for number, layer in enumerate(model.decoder.layers):
        for norm in norms(latent, hasattr(layer.mlp, "router")):
            for kind in ("weight", "bias"):
                tensor = state.get(f"decoder.layers.{number}.{norm.module}{kind}")
                if tensor is not None:
                    tensor.key = f"decoder.layers.{number}.{norm.engine}{kind}"
