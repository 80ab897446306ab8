"""One spelling of Megatron's names, with a tensor for every expert and half.

Megatron saves what is alike in one tensor, and names a norm by who computes it:

    plain                                               stored
    mlp.linear_fc1.weight_w, _v            [F, H]       mlp.linear_fc1.weight              [2F, H]
    mlp.experts.experts.3.linear_fc1.weight_w, _v       mlp.experts.experts.linear_fc1.weight
                                           [F, H]                                       [E, 2F, H]
    mlp.experts.experts.3.linear_fc2.weight [H, F]      mlp.experts.experts.linear_fc2.weight
    pre_mlp_layernorm.weight, in an MoE layer           the same, or with the local implementation
                                                        mlp.linear_fc1.layer_norm_weight

The plain one is what `singleton_local_shards` saves, under Transformer Engine's names. Families
speak it, so each of their tensors is one of Hugging Face's; `plain` and `stored` lead there and
back.
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

from torch import Tensor

from ep_plugin.checkpoint.family import gated
from ep_plugin.checkpoint.moe_layers import pattern
from ep_plugin.checkpoint.tensors import (
    NO_EXTRA_STATE,
    NewObject,
    NewTensor,
    Region,
    Source,
    TensorInfo,
)
from ep_plugin.errors import ConfigError

_FC1 = re.compile(r"(.+\.linear_fc1\.weight)(_w|_v)")
_WHOLE_FC1 = re.compile(r"decoder\.layers\.\d+\.mlp\.(.+\.)?linear_fc1\.weight")
_EXPERT = re.compile(r"(.+\.mlp\.experts\.experts\.)(\d+)\.(linear_fc[12]\.weight(?:_w|_v)?)")
_STACKED = re.compile(r"(.+\.mlp\.experts\.experts\.)(linear_fc[12]\.weight)")
_LEFT_OUT = re.compile(r"(chained_\d+\.)?optimizer\..+")  # moments of the run that ends here

_BEFORE_MLP, _IN_FC1 = "pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"
_LATENT_NORMS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


class Norm(NamedTuple):
    """One norm of a layer, by the beginning of its names below the layer."""

    module: str  # of a layer of the local implementation
    engine: str  # what Transformer Engine saves it as
    local: str  # what the local implementation saves it as


def norms(latent: bool, is_moe: bool) -> list[Norm]:
    """Return the norms that the two implementations name otherwise, in a layer of that kind.

    Transformer Engine fuses a norm into the linear layer behind it, the experts excepted. The local
    implementation saves the one before the MLP as if it were fused, but not under latent attention.
    """
    before = Norm(
        _BEFORE_MLP, _BEFORE_MLP if is_moe else _IN_FC1, _BEFORE_MLP if latent else _IN_FC1
    )
    return [*(Norm(m, fused, m) for m, fused in _LATENT_NORMS.items() if latent), before]


@dataclass(frozen=True)
class Place:
    """Where a plain tensor lies in a stored one: of which expert, and which half of fc1."""

    stored: str
    expert: int | None = None
    half: int | None = None


def plain(source: Source, args: argparse.Namespace) -> Source:
    """Return a checkpoint of Megatron's under plain names; a stored tensor is read once in a row.

    Optimizer state and objects are left out. Raises ConfigError for a tensor that cannot be cut.
    """
    renamed = {theirs: ours for ours, theirs in _local_names(args)} if _is_local(args) else {}
    read = lru_cache(maxsize=1)(source.read_tensor)
    tensors: dict[str, TensorInfo] = {}
    parts: dict[str, Place] = {}
    for stored, info in source.tensors.items():
        if _LEFT_OUT.fullmatch(stored):
            continue
        for name, part, shape in _cut(stored, info.shape, args):
            name = renamed.get(name, name)
            tensors[name], parts[name] = TensorInfo(shape, info.dtype), part

    def read_tensor(name: str) -> Tensor:
        part = parts[name]
        values = read(part.stored)
        if part.expert is not None:
            values = values[part.expert]
        return values if part.half is None else values.chunk(2)[part.half]

    return replace(source, tensors=tensors, objects=frozenset(), read_tensor=read_tensor)


def stored_name(name: str, args: argparse.Namespace) -> str:
    """Return the name under which Megatron saves what has this plain one."""
    return _place(dict(_local_names(args)).get(name, name) if _is_local(args) else name).stored


def stored(source: Source, args: argparse.Namespace) -> list[NewTensor | NewObject]:
    """Return the content of a checkpoint as Megatron saves it, from one with plain names."""
    renamed = dict(_local_names(args)) if _is_local(args) else {}
    groups: dict[str, list[tuple[str, Place]]] = {}
    for name in source.tensors:
        part = _place(renamed.get(name, name))
        groups.setdefault(part.stored, []).append((name, part))
    content: list[NewTensor | NewObject] = [
        NewTensor(name, _stored_info(members, source), partial(_regions, members, source))
        for name, members in groups.items()
    ]
    states = [state for name in groups for state in _extra_states(name, args)]
    if not _is_local(args):
        states += _states_of_transformer_engine(args)
    return [*content, *(NewObject(state, NO_EXTRA_STATE) for state in dict.fromkeys(states))]


def _is_local(args: argparse.Namespace) -> bool:
    return getattr(args, "transformer_impl", None) == "local"


def _local_names(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield (plain name, local implementation's name) wherever the two differ."""
    latent = bool(getattr(args, "multi_latent_attention", False))
    for layer, is_moe in enumerate(pattern(args)):
        for norm in norms(latent, is_moe):
            if norm.engine != norm.local:
                ours, theirs = (f"decoder.layers.{layer}.{n}weight" for n in norm[1:])
                yield ours, theirs


def _place(name: str) -> Place:
    """Return where a plain tensor lies in a stored one."""
    half = None
    if (match := _FC1.fullmatch(name)) is not None:
        name, half = match[1], ("_w", "_v").index(match[2])
    if (match := _EXPERT.fullmatch(name)) is not None:
        return Place(match[1] + match[3], int(match[2]), half)
    return Place(name, None, half)


def _cut(
    name: str, shape: tuple[int, ...], args: argparse.Namespace
) -> Iterator[tuple[str, Place, tuple[int, ...]]]:
    """Yield (plain name, where it lies, its shape) for all that a stored tensor holds."""
    stacked = _STACKED.fullmatch(name)
    experts: tuple[int, ...] | tuple[None] = (None,)
    if stacked is not None:
        experts, shape = tuple(range(shape[0])), shape[1:]
    for expert in experts:
        ours = name if stacked is None else f"{stacked[1]}{expert}.{stacked[2]}"
        if not (_WHOLE_FC1.fullmatch(name) and gated(name, args)):
            yield ours, Place(name, expert), shape
            continue
        if shape[0] % 2:
            raise ConfigError(f"{name} {shape} has no two halves; is the model gated (--swiglu)?")
        for half, suffix in enumerate(("_w", "_v")):
            yield ours + suffix, Place(name, expert, half), (shape[0] // 2, *shape[1:])


def _stored_info(members: list[tuple[str, Place]], source: Source) -> TensorInfo:
    info = source.tensors[members[0][0]]
    shape = info.shape
    if members[0][1].half is not None:
        shape = (2 * shape[0], *shape[1:])
    experts = {part.expert for _, part in members}
    if experts != {None}:
        shape = (len(experts), *shape)
    return TensorInfo(shape, info.dtype)


def _regions(members: list[tuple[str, Place]], source: Source) -> Iterator[Region]:
    for name, part in members:
        values = source.read_tensor(name)
        offsets = [0] * values.dim()
        if part.half:
            offsets[0] = values.shape[0]
        if part.expert is not None:
            values, offsets = values.unsqueeze(0), [part.expert, *offsets]
        yield Region(tuple(offsets), values)


def _extra_states(name: str, args: argparse.Namespace) -> Iterator[str]:
    """Yield the empty objects that Megatron's linear layers insist on finding."""
    module, _, kind = name.rpartition(".")
    if kind != "weight" or ".linear_" not in module:
        return
    if ".experts.experts." in module:
        for expert in range(args.num_experts):
            yield f"{module}._extra_state/shard_{expert}_{args.num_experts}"
    else:
        yield f"{module}._extra_state/shard_0_1"


def _states_of_transformer_engine(args: argparse.Namespace) -> list[str]:
    """Return those that modules without a linear map have there too; unknown ones are not read."""
    modules = ["decoder.final_layernorm"]
    for layer, is_moe in enumerate(pattern(args)):
        below = ["self_attention.core_attention"]
        below += ["pre_mlp_layernorm"] if is_moe else []
        below += ["input_layernorm"] if getattr(args, "multi_latent_attention", False) else []
        if getattr(args, "qk_layernorm", False):
            below += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
        modules += [f"decoder.layers.{layer}.{name}" for name in below]
    return [f"{module}._extra_state/shard_0_1" for module in modules]
