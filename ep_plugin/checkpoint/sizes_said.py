"""Have a model's tensors the sizes that its run arguments say? `audit` and `convert` ask it.

Only for layers of a GPT and those of a HybridModel that are a GPT's too, and only where the
argument is there: what else a release or a family has is not known here.
"""

import argparse
import re
from collections.abc import Iterator, Mapping

from ep_plugin.checkpoint.family import gated, query_groups
from ep_plugin.checkpoint.required import OTHER_LAYERS
from ep_plugin.checkpoint.run_args import said
from ep_plugin.checkpoint.tensors import TensorInfo

_FFN = re.compile(
    r"decoder\.layers\.\d+\.mlp\.(experts\.experts\.(?:\d+\.)?|shared_experts\.)?"
    r"linear_fc([12])\.weight(_[wv])?"
)
_QKV = re.compile(r"decoder\.layers\.\d+\.self_attention\.linear_qkv\.weight")
_TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")


def wrong_sizes(
    tensors: Mapping[str, TensorInfo], args: argparse.Namespace
) -> Iterator[tuple[str, str]]:
    """Yield a parameter whose size is not that of the run arguments, and what they say."""
    if any(said(args, name) is not None for name in (*OTHER_LAYERS, "spec")):
        return
    rows = said(args, "padded_vocab_size")
    attention = _rows_of_attention(args)
    for name, info in tensors.items():
        if name in _TABLES:
            yield from _unlike(name, info, 0, rows, "padded_vocab_size")
        elif _QKV.fullmatch(name):
            sizes = "num_attention_heads, num_query_groups, kv_channels"
            yield from _unlike(name, info, 0, attention, sizes)
        elif (match := _FFN.fullmatch(name)) is not None and hasattr(args, "swiglu"):
            argument = _argument(match[1] or "", args)
            size = said(args, argument)
            twice = match[2] == "1" and match[3] is None and gated(name, args)
            axis = -2 if match[2] == "1" else -1
            yield from _unlike(name, info, axis, size and (1 + twice) * size, argument)


def _argument(module: str, args: argparse.Namespace) -> str:
    """Return which argument says how wide an FFN is; Megatron's own fallback where it is None."""
    if module.startswith("shared"):
        return "moe_shared_expert_intermediate_size"
    own = module and said(args, "moe_ffn_hidden_size") is not None
    return "moe_ffn_hidden_size" if own else "ffn_hidden_size"


def _rows_of_attention(args: argparse.Namespace) -> int | None:
    heads, width = (said(args, name) for name in ("num_attention_heads", "kv_channels"))
    if heads is None or width is None or said(args, "attention_output_gate") is not None:
        return None
    return int((heads + 2 * query_groups(args)) * width)


def _unlike(
    name: str, info: TensorInfo, axis: int, size: int | None, argument: str
) -> Iterator[tuple[str, str]]:
    if size is not None and len(info.shape) > 1 and info.shape[axis] != size:
        text = f"has shape {list(info.shape)}, and the run arguments ask for {size} ({argument})"
        yield name, text
