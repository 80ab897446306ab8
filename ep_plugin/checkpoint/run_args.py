"""A checkpoint's own run arguments: checked before anything is computed or made of them.

An argument that is asked for and not there is a ConfigError that names it.
"""

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ep_plugin.checkpoint.moe_layers import layers_of
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import shown

_LARGEST = 1 << 40
_MOST_LAYERS = 100_000
_AGAIN = "give a checkpoint that Megatron saved"
_COUNTS = [
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_router_topk",
    "padded_vocab_size",
    "seq_length",
    "max_position_embeddings",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "ep_group_score_topk",
    "vocab_size",
    "ep_vocab_size",
    "tiktoken_num_special_tokens",
    "original_max_position_embeddings",
    "yarn_original_max_position_embeddings",
]
_FLAGS = [
    "swiglu",
    "quick_geglu",
    "squared_relu",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "multi_latent_attention",
    "untie_embeddings_and_output_weights",
    "group_query_attention",
    "use_mup",
    "moe_router_pre_softmax",
    "moe_shared_expert_gate",
    "moe_router_enable_expert_bias",
    "layernorm_zero_centered_gamma",
    "use_rope_scaling",
    "bf16",
    "fp16",
]
_NUMBERS = [
    "layernorm_epsilon",
    "init_method_std",
    "rotary_base",
    "rope_scaling_factor",
    "rotary_scaling_factor",
    "mscale",
    "mscale_all_dim",
    "beta_fast",
    "beta_slow",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "moe_router_topk_scaling_factor",
    "moe_z_loss_coeff",
    "moe_input_jitter_eps",
    "mup_embedding_mult",
    "activation_func_clamp_value",
    "glu_linear_offset",
    "attention_dropout",
    "hidden_dropout",
]
_WORDS = [
    "transformer_impl",
    "normalization",
    "position_embedding_type",
    "rope_type",
    "moe_router_score_function",
    "ep_dense_activation",
    "ep_normalize",
    "ep_expert_activation",
    "ep_shared_expert",
    "ep_aux_loss_counts",
    "ep_aux_loss_layers",
    "tokenizer_model",
    "tokenizer_type",
    "tiktoken_pattern",
    "hybrid_layer_pattern",
    "hybrid_override_pattern",
    "heterogeneous_layers_config_path",
]
_LOSSES = ("moe_router_load_balancing_type", "moe_aux_loss_coeff")
_OF_THEIR_OWN = [
    "moe_layer_freq",
    "ep_experts_per_layer",
    "params_dtype",
    "window_size",
    "spec",
    *_LOSSES,
]
CHECKED = frozenset([*_COUNTS, *_FLAGS, *_NUMBERS, *_WORDS, *_OF_THEIR_OWN])
_NEEDED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
_NEVER_NONE = ("init_method_std", "layernorm_epsilon", "rotary_base")


class LacksArgument(ConfigError, AttributeError):
    """A run argument that is asked for is not there; `getattr` with a default does not raise it."""


class RunArgs(argparse.Namespace):
    """Run arguments of a checkpoint; what is not there raises LacksArgument."""

    def __getattr__(self, name: str) -> Any:
        raise LacksArgument(f"the checkpoint's run arguments have no {name}; {_AGAIN}")


def checked(args: argparse.Namespace, folder: Path) -> RunArgs:
    """Return the run arguments of `folder`; raises ConfigError for one of a wrong type or size."""
    for name in _COUNTS:
        value = getattr(args, name, None)
        most = _MOST_LAYERS if name in ("num_layers", "num_experts") else _LARGEST
        if value is not None and (type(value) is not int or not 0 <= value <= most):
            raise _wrong(folder, name, value, f"a whole number of at most {most}")
    for name in _NEEDED:
        if hasattr(args, name) and not getattr(args, name):
            raise _wrong(folder, name, getattr(args, name), "a whole number of at least 1")
    for name in _FLAGS:
        value = getattr(args, name, None)
        if value is not None and type(value) is not bool:
            raise _wrong(folder, name, value, "true or false")
    for name in _WORDS:
        value = getattr(args, name, None)
        if value is not None and type(value) is not str:
            raise _wrong(folder, name, value, "a word")
    for name in _NUMBERS:
        value = getattr(args, name, None)
        missing = value is None and name in _NEVER_NONE and hasattr(args, name)
        if missing or (value is not None and type(value) not in (int, float)):
            raise _wrong(folder, name, value, "a number")
        if value is not None and not math.isfinite(value):
            raise _wrong(folder, name, value, "a finite number")
    if (getattr(args, "init_method_std", None) or 0) < 0:
        raise _wrong(folder, "init_method_std", args.init_method_std, "a number of at least 0")
    if not isinstance(getattr(args, "params_dtype", torch.float32), torch.dtype):
        raise _wrong(folder, "params_dtype", args.params_dtype, "a dtype of torch")
    spec = getattr(args, "spec", None)
    if spec is not None and not (type(spec) is list and all(type(word) is str for word in spec)):
        raise _wrong(folder, "spec", spec, "a list of words")
    found = RunArgs(**vars(args))
    _check_losses(found, folder)
    _check_window(found, folder)
    _check_layers(found, folder)
    return found


def said(args: argparse.Namespace, name: str) -> Any:
    """Return a run argument; None for one that says nothing: missing, False, 0 or empty."""
    value = getattr(args, name, None)
    is_plain = type(value) in (bool, int, float, str, list, tuple, dict)  # not so a tensor
    return None if is_plain and not value else value


def as_saved(args: argparse.Namespace) -> argparse.Namespace:
    """Return run arguments as Megatron saves them."""
    return argparse.Namespace(**vars(args))


def check_num_layers(args: argparse.Namespace, names: Iterable[str], folder: Path) -> None:
    """Raise ConfigError unless the tensors have the decoder layers that the arguments count."""
    found = {name.split(".")[2] for name in names if name.startswith("decoder.layers.")}
    if len(found) != args.num_layers:
        raise ConfigError(
            f"the run arguments in {folder} say num_layers = {args.num_layers}, and its tensors "
            f"are of {len(found)} layers; {_AGAIN}"
        )
    if strange := found - {str(layer) for layer in range(args.num_layers)}:
        raise ConfigError(
            f"the run arguments in {folder} say num_layers = {args.num_layers}, and a tensor is of "
            f"layer {shown(min(strange))}; {_AGAIN}"
        )


def check_counters(common: Mapping[str, Any], folder: Path) -> None:
    """Raise ConfigError where what is kept beside the run arguments is no number of its kind.

    Each of them may be absent.
    """
    kinds: dict[str, tuple[tuple[type, ...], float, str]] = {
        "iteration": ((int,), 2**62, "a number of iterations"),
        "checkpoint_version": ((int, float), 100, "a version number"),
        "num_floating_point_operations_so_far": ((int, float), 1e40, "a number of operations"),
    }
    for name, (types, most, wanted) in kinds.items():
        value = common.get(name)
        if value is not None and not (type(value) in types and 0 <= value <= most):
            raise ConfigError(
                f"{folder} has {name} = {shown(value)}, where {wanted} belongs; {_AGAIN}"
            )


def _check_losses(args: argparse.Namespace, folder: Path) -> None:
    """Raise ConfigError unless balancing losses are words, each with a number."""
    kinds, values = (getattr(args, name, None) for name in _LOSSES)
    words: Sequence[Any] = kinds if isinstance(kinds, list | tuple) else [kinds]
    numbers: Sequence[Any] = values if isinstance(values, list | tuple) else [values]
    if kinds is not None and not all(type(word) is str for word in words):
        raise _wrong(folder, _LOSSES[0], kinds, "a word or a list of words")
    if values is None:
        return
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise _wrong(folder, _LOSSES[1], values, "a finite number or a list of them")
    if isinstance(values, list | tuple) and len(numbers) != len(words):
        raise _wrong(folder, _LOSSES[1], values, "one number for each type of balancing loss")


def _check_window(args: argparse.Namespace, folder: Path) -> None:
    window = getattr(args, "window_size", None)
    is_pair = isinstance(window, list | tuple) and len(window) == 2
    if window is not None and not (is_pair and all(type(size) is int for size in window)):
        raise _wrong(folder, "window_size", window, "a pair of whole numbers")


def _check_layers(args: argparse.Namespace, folder: Path) -> None:
    if not getattr(args, "num_experts", None):
        return
    value = args.moe_layer_freq
    is_list = isinstance(value, list | tuple) and len(value) == args.num_layers
    is_list = is_list and all(type(entry) is int and entry in (0, 1) for entry in value)
    if not is_list and (type(value) is not int or value < 1):
        wanted = f"a number of at least 1, or {args.num_layers} of 0 and 1"
        raise _wrong(folder, "moe_layer_freq", value, wanted)
    topk = getattr(args, "moe_router_topk", None)
    if topk is not None and not 1 <= topk <= args.num_experts:
        raise _wrong(folder, "moe_router_topk", topk, f"a number from 1 to {args.num_experts}")
    counts = getattr(args, "ep_experts_per_layer", None)
    layers = sum(layers_of(args))
    if counts is not None and (
        not isinstance(counts, list | tuple)
        or len(counts) != layers
        or not all(type(count) is int and 0 < count <= _MOST_LAYERS for count in counts)
    ):
        raise _wrong(folder, "ep_experts_per_layer", counts, f"a list of {layers} counts")


def _wrong(folder: Path, name: str, value: Any, wanted: str) -> ConfigError:
    return ConfigError(
        f"the run arguments in {folder} have {name} = {shown(value)}, where {wanted} belongs; "
        f"{_AGAIN}"
    )
