"""A compact Megatron pretrain script for GPT; it knows nothing of the plugin.

torchrun --nproc-per-node 2 recipes/pretrain_gpt.py MEGATRON_ARGS ...
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_cp_rank
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


def get_batch(data_iterator: Iterator[dict[str, Tensor]], vp_stage: int | None) -> dict[str, Any]:
    """Return this rank's part of the next micro-batch; tensors [B, S] on the device.

    Every tensor-parallel rank reads the same samples for itself, so nothing is broadcast.
    """
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(KEYS)
    samples = next(data_iterator)
    batch = {key: samples[key].cuda(non_blocking=True) for key in KEYS if key in samples}
    batch = get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )
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


if __name__ == "__main__":
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "SentencePieceTokenizer"})
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )
