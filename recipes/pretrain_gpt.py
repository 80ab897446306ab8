"""A compact Megatron pretrain script; of the plugin it asks which class a new run's model has.

A new run trains a HybridModel of the layers that the flags describe, where Megatron has one (from
0.18 on) and it can have them; a checkpoint goes on as what it is. MODEL_CLASS=gpt or hybrid, in the
environment, chooses; so does --hybrid-layer-pattern. Without ep_plugin the flags alone decide. It
runs on Megatron 0.16 (a checkout; its wheel has no megatron.training) to 0.19.

torchrun --nproc-per-node 2 recipes/pretrain_gpt.py MEGATRON_ARGS ...
"""

import inspect
import os
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import arguments, get_args, pretrain
from megatron.training.global_vars import set_global_variables
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

try:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
except ImportError:  # 0.16
    from megatron.core.tokenizers.text.utils.build_tokenizer import build_tokenizer

KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


def get_batch(data_iterator: Iterator[dict[str, Tensor]], vp_stage: int | None) -> dict[str, Any]:
    """Return this rank's part of the next micro-batch; tensors [B, S] on the device.

    Every tensor-parallel rank reads the same samples for itself, so nothing is broadcast.
    """
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(KEYS)
    samples = next(data_iterator)
    batch = {key: samples[key].cuda(non_blocking=True) for key in KEYS if key in samples}
    asked = inspect.signature(get_batch_on_this_cp_rank).parameters
    more = {"is_hybrid_cp": False} if "is_hybrid_cp" in asked else {}  # from 0.18 on
    batch = get_batch_on_this_cp_rank(batch, cp_group=mpu.get_context_parallel_group(), **more)
    return {**dict.fromkeys(KEYS), **batch}


def loss_func(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the summed loss [], the number of tokens [] and both for the log."""
    mask = loss_mask.flatten().float()
    loss = (losses.flatten().float() * mask).sum()
    num_tokens = mask.sum().detach().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def forward_step(
    data_iterator: Any, model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    """Run the model on one micro-batch; return the losses [B, S] and how to sum them.

    Megatron's schedule for two micro-batches at a time asks for the plan of a run instead of a run.
    """
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    loss_mask = batch.pop("loss_mask")
    run = model.build_schedule_plan if return_schedule_plan else model
    losses = run(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=loss_mask,
    )
    return losses, partial(loss_func, loss_mask)


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> Any:
    """Return the training, validation and test sets of the data on the command line."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        full_validation=args.full_validation,
        multiple_validation_sets=args.multiple_validation_sets,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    return BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
        num_samples,
        lambda: is_first_or_last_pipeline_stage(vp_stage),
        config,
    ).build()


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron asks: every rank builds


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> Any:
    """Return one pipeline stage of the model. 0.19 builds it itself, from the same arguments."""
    args = get_args()
    config = config or arguments.core_transformer_config_from_args(args)
    if getattr(args, "hybrid_layer_pattern", None):
        return hybrid_model(config, pre_process, post_process, vp_stage, pg_collection)
    te = args.transformer_impl == "transformer_engine"
    decoder = get_gpt_decoder_block_spec(
        config, te, args.normalization, qk_l2_norm=args.qk_l2_norm, vp_stage=vp_stage
    )
    mtp = None
    if args.mtp_num_layers:
        mtp = get_gpt_mtp_block_spec(config, decoder, te, vp_stage=vp_stage)
    return GPTModel(
        config,
        decoder,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        mtp_block_spec=mtp,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )


def hybrid_model(
    config: Any, pre_process: bool, post_process: bool, vp_stage: int | None, pg_collection: Any
) -> Any:
    """Return one pipeline stage of a HybridModel."""
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    args = get_args()
    return HybridModel(
        config,
        hybrid_stack_spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        hybrid_layer_pattern=args.hybrid_layer_pattern,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )


def read_arguments(defaults: dict[str, Any]) -> Any:
    """Return Megatron's arguments, of a HybridModel where one is to be trained; from 0.18 on."""
    args = arguments.parse_args()
    if find_spec("ep_plugin") is None or args.use_checkpoint_args or args.yaml_cfg:
        return arguments.parse_and_validate_args(args_defaults=defaults)
    from ep_plugin.model_class import choose_model_class

    choose_model_class(args)
    arguments.validate_args(args, defaults)
    set_global_variables(args)
    return args


def main() -> None:
    """Train, as the installed Megatron wants to be started."""
    defaults = {"tokenizer_type": "SentencePieceTokenizer"}
    steps = (ModelType.encoder_or_decoder, forward_step)
    if "cfg_container" not in inspect.signature(pretrain).parameters:  # 0.16 and 0.17
        if os.environ.get("MODEL_CLASS") == "hybrid":
            raise SystemExit("MODEL_CLASS=hybrid needs megatron-core 0.18 or newer; use gpt")
        pretrain(datasets_provider, model_provider, *steps, args_defaults=defaults)
        return
    from megatron.training import argument_utils

    args = read_arguments(defaults)
    container = argument_utils.pretrain_cfg_container_from_args
    if hasattr(argument_utils, "gpt_config_from_args"):  # 0.19
        hybrid = getattr(args, "hybrid_layer_pattern", None)
        kind = "hybrid" if hybrid else "gpt"
        model = getattr(argument_utils, f"{kind}_config_from_args")(args)
        config = container(args, model)
        pretrain(config, datasets_provider, *steps)
    else:
        pretrain(container(args), datasets_provider, model_provider, *steps)


if __name__ == "__main__":
    main()
