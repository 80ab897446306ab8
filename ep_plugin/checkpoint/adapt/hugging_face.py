"""Hugging Face's names to Megatron's plain ones and back, one tensor at a time.

Query, key and value projections are one matrix in Megatron, query group by query group. With two
groups of two query heads each, rows are

    Hugging Face   q: q0 q1 q2 q3      k: k0 k1      v: v0 v1
    Megatron       q0 q1 k0 v0 q2 q3 k1 v1
"""

import argparse
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ep_plugin.checkpoint.adapt.against_config import check_names, check_tensors
from ep_plugin.checkpoint.family import Config, Family, Pair, pairs, query_groups
from ep_plugin.checkpoint.patterns import compile_pattern
from ep_plugin.checkpoint.tensors import Source, TensorInfo
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import shown

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_DTYPES = ("float32", "bfloat16", "float16")
_WORDS = "embedding.word_embeddings.weight"


def to_megatron(source: Source, family: Family, args: argparse.Namespace) -> Source:
    """Return a Hugging Face model as a checkpoint with plain names; `args` are its arguments.

    Raises ConfigError that lists every name too many or missing, and for shapes that contradict
    config.json.
    """
    table = {pair.megatron: pair for pair in pairs(family, args)}
    names = set(source.tensors) - left_out(source, family)
    _check_head(names, source, args)
    names.discard(_HEAD if not args.untie_embeddings_and_output_weights else "")
    check_names(names, (name for pair in table.values() for name in pair.hf), family, args)
    check_tensors(source.tensors, table.values(), family, args, args.params_dtype)
    tensors = {name: _merged_info(pair, source, args) for name, pair in table.items()}

    def read_tensor(name: str) -> Tensor:
        pair = table[name]
        parts = [source.read_tensor(part) for part in pair.hf]
        return parts[0] if pair.operation == "copy" else _merge_qkv(parts, query_groups(args))

    return replace(
        source,
        folder=Path("release"),  # Megatron's word for weights of no iteration
        common={"args": args, "checkpoint_version": 3.0, "iteration": 0},
        tensors=tensors,
        read_tensor=read_tensor,
    )


def to_hf(source: Source, family: Family, args: argparse.Namespace) -> Source:
    """Return a checkpoint with plain names as a Hugging Face model, its config.json in `common`.

    Raises ConfigError that lists every name too many or missing, or says what the family lacks.
    """
    config = family.config(args)
    table = {name: pair for pair in pairs(family, args) for name in pair.hf}
    check_names(source.tensors, (pair.megatron for pair in table.values()), family, args)
    _check_vocabulary(source.tensors[_WORDS], args)
    config["torch_dtype"] = str(source.tensors[_WORDS].dtype).removeprefix("torch.")
    read = lru_cache(maxsize=1)(source.read_tensor)
    tensors = {name: _split_info(name, pair, source, args) for name, pair in table.items()}
    check_tensors(tensors, {id(pair): pair for pair in table.values()}.values(), family, args, None)

    def read_tensor(name: str) -> Tensor:
        pair = table[name]
        values = read(pair.megatron)
        if pair.operation == "copy":
            return values
        return _split_qkv(values, args)[pair.hf.index(name)]

    return replace(source, common={"config": config}, tensors=tensors, read_tensor=read_tensor)


def arguments(config: Config, family: Family) -> argparse.Namespace:
    """Return Megatron's arguments for config.json, its dtype included."""
    if config.get("quantization_config"):
        raise ConfigError(
            "config.json has a quantization_config; give the weights in bf16, fp16 or fp32"
        )
    key = "dtype" if config.get("dtype") else "torch_dtype"
    word = str(config.get(key) or "float32").removeprefix("torch.")
    if word not in _DTYPES:
        raise ConfigError(
            f"config.json has {key} = {shown(config[key])}, which no run of Megatron's has; give "
            f"the weights in {', '.join(_DTYPES)}"
        )
    args = family.args(config)
    args.params_dtype = getattr(torch, word)
    args.ep_vocab_size = args.padded_vocab_size  # no row pads it
    args.bf16, args.fp16 = word == "bfloat16", word == "float16"
    return args


def with_dtype(config: Config, source: Source) -> Config:
    """Return config.json with the dtype of the weights where it says none, as transformers does."""
    if config.get("dtype") or config.get("torch_dtype") or _EMBEDDING not in source.tensors:
        return config
    return config | {"dtype": str(source.tensors[_EMBEDDING].dtype)}


def left_out(source: Source, family: Family) -> set[str]:
    """Return the names of a Hugging Face model that are none of its decoder's weights.

    They are what the family ignores, and layers for multi-token prediction behind the last one.
    """
    config = source.common["config"]
    first, extra = config["num_hidden_layers"], config.get("num_nextn_predict_layers") or 0
    behind = range(first, first + min(extra, len(source.tensors)))
    beyond = tuple(f"model.layers.{layer}." for layer in behind)
    ignored = [compile_pattern(pattern) for pattern in family.ignored]
    return {
        name
        for name in source.tensors
        if name.startswith(beyond) or any(pattern.fullmatch(name) for pattern in ignored)
    }


def _check_head(names: set[str], source: Source, args: argparse.Namespace) -> None:
    """Raise ConfigError unless config.json and the weights agree on tied embeddings."""
    untied = args.untie_embeddings_and_output_weights
    if untied and _HEAD not in names and _EMBEDDING in names:
        raise ConfigError(
            f"config.json says tie_word_embeddings = false, and there is no {_HEAD}; set "
            "tie_word_embeddings to true in config.json"
        )
    if untied or _HEAD not in names:
        return
    same = source.tensors[_HEAD] == source.tensors[_EMBEDDING] and torch.equal(
        source.read_tensor(_HEAD), source.read_tensor(_EMBEDDING)
    )
    if not same:
        raise ConfigError(
            f"config.json says tie_word_embeddings = true, and {_HEAD} differs from {_EMBEDDING}; "
            "set tie_word_embeddings to false in config.json"
        )


def _check_vocabulary(info: TensorInfo, args: argparse.Namespace) -> None:
    if info.shape != (args.padded_vocab_size, args.hidden_size):
        raise ConfigError(
            f"the embedding is {list(info.shape)}, and the settings say vocabulary "
            f"{args.padded_vocab_size} (padded), hidden size {args.hidden_size}; "
            "give the settings that belong to these weights"
        )


def _merged_info(pair: Pair, source: Source, args: argparse.Namespace) -> TensorInfo:
    parts = [source.tensors[name] for name in pair.hf]
    if pair.operation == "copy":
        return parts[0]
    groups, width = query_groups(args), args.kv_channels
    rows = [args.num_attention_heads * width, groups * width, groups * width]
    if [part.shape[0] for part in parts] != rows or len({part.dtype for part in parts}) > 1:
        found = ", ".join(f"{list(part.shape)} {part.dtype}" for part in parts)
        raise ConfigError(
            f"{', '.join(pair.hf)} are {found}; config.json asks for {rows} rows of one dtype "
            f"({args.num_attention_heads} heads, {groups} of keys and values, of {width}); "
            "give the config.json that came with the weights"
        )
    return TensorInfo((sum(rows), *parts[0].shape[1:]), parts[0].dtype)


def _split_info(name: str, pair: Pair, source: Source, args: argparse.Namespace) -> TensorInfo:
    info = source.tensors[pair.megatron]
    if pair.operation == "copy":
        return info
    groups, width = query_groups(args), args.kv_channels
    heads = args.num_attention_heads
    if info.shape[0] != (heads + 2 * groups) * width:
        raise ConfigError(
            f"{pair.megatron} is {list(info.shape)}; the run arguments ask for "
            f"{(heads + 2 * groups) * width} rows ({heads} heads, {groups} of keys and values, "
            f"of {width})"
        )
    rows = (heads if pair.hf.index(name) == 0 else groups) * width
    return TensorInfo((rows, *info.shape[1:]), info.dtype)


def _merge_qkv(parts: list[Tensor], groups: int) -> Tensor:
    """Return [(heads + 2 groups) * width, ...] from q, k and v."""
    grouped = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _split_qkv(values: Tensor, args: argparse.Namespace) -> tuple[Tensor, ...]:
    """Return q, k and v of a merged tensor."""
    groups, width = query_groups(args), args.kv_channels
    queries = args.num_attention_heads // groups * width
    grouped = values.reshape(groups, queries + 2 * width, *values.shape[1:])
    return tuple(
        part.flatten(0, 1) for part in torch.split(grouped, [queries, width, width], dim=1)
    )
