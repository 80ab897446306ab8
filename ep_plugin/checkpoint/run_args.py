"""Are the run arguments of a checkpoint of the kinds that the conversion reckons with?"""

import argparse
from pathlib import Path

from ep_plugin.checkpoint.tensors import Damaged
from ep_plugin.untrusted import cut, shown

_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size")  # every model has them
_OPTIONAL = (
    *("num_attention_heads", "num_query_groups", "kv_channels", "padded_vocab_size", "seq_length"),
    *("max_position_embeddings", "num_experts", "moe_ffn_hidden_size", "moe_router_topk"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"),
    *("expert_tensor_parallel_size", "q_lora_rank", "kv_lora_rank"),
)
_LARGEST = 1 << 40


def check_run_args(args: argparse.Namespace, folder: Path) -> None:
    """Raise Damaged for a size that is none."""
    for name in (*_SIZES, *_OPTIONAL):
        value = getattr(args, name, None)
        if value is None and name in _OPTIONAL:
            continue
        least = 1 if name in _SIZES else 0
        if type(value) is not int or not least <= value <= _LARGEST:
            words = (
                shown(value) if isinstance(value, (int, float, str, type(None))) else "an object"
            )
            raise Damaged(
                f"the run arguments of {folder} say {name} = {cut(words, 60)}, which is no size; "
                "give a checkpoint that Megatron saved"
            )
