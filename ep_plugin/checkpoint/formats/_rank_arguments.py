"""The run arguments that per-rank files are put together by, checked before they are used."""

import argparse
from pathlib import Path
from typing import Any

from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import shown

LARGEST = 1 << 20  # of a size or a number of ranks
COUNTS = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
MAYBE_COUNTS = (
    *("expert_model_parallel_size", "expert_tensor_parallel_size", "num_experts"),
    *("q_lora_rank", "kv_lora_rank", "qk_pos_emb_head_dim"),
)
SWITCHES = ("untie_embeddings_and_output_weights", "multi_latent_attention", "swiglu")
LATENT = ("kv_lora_rank", "qk_pos_emb_head_dim")


def check(args: argparse.Namespace, folder: Path, files: int) -> None:
    """Raise ConfigError for an argument that is missing or none of its type, or too many ranks.

    `files`: how many ranks the folder has files of.
    """
    for name in COUNTS:
        _need(args, name, folder, _is_count(getattr(args, name, None)), "a whole number from 1 on")
    for name in MAYBE_COUNTS:
        value = getattr(args, name, None)
        _need(args, name, folder, value is None or _is_count(value), "a whole number or None")
    for name in SWITCHES:
        _need(args, name, folder, type(getattr(args, name, None)) is bool, "True or False")
    impl = getattr(args, "transformer_impl", None)
    _need(args, "transformer_impl", folder, type(impl) is str, "a name")
    if args.multi_latent_attention:
        for name in LATENT:
            _need(args, name, folder, _is_count(getattr(args, name, None)), "a whole number")
    tp, pp = (getattr(args, name) for name in COUNTS)
    ep = getattr(args, "expert_model_parallel_size", None) or 1
    if tp * pp * ep > 2 * files + 8:
        raise ConfigError(
            f"the run arguments in {folder} say {tp} x {pp} x {ep} ranks, and there are files of "
            f"{files}; copy the checkpoint again"
        )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value <= LARGEST


def _need(args: argparse.Namespace, name: str, folder: Path, right: bool, legal: str) -> None:
    if not right:
        got = shown(getattr(args, name)) if hasattr(args, name) else "nothing"
        raise ConfigError(
            f"the run arguments in {folder} must have {name}, {legal}; got {got}; give a "
            "checkpoint that Megatron saved"
        )
