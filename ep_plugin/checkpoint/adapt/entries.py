"""What each dense tensor or object becomes, and what the dense model has no counterpart of."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ep_plugin.checkpoint.adapt.ffn import ExpertMaker, FfnTensor, router_rows
from ep_plugin.checkpoint.adapt.optimizer_state import State
from ep_plugin.checkpoint.adapt.upcycling import Upcycling
from ep_plugin.checkpoint.patterns import COEFFICIENT, ROUTER, Match
from ep_plugin.checkpoint.tensors import (
    NO_EXTRA_STATE,
    NewObject,
    NewTensor,
    Region,
    Source,
    TensorInfo,
    one_region,
)


@dataclass(frozen=True)
class EntryBuilder:
    """Makes the entries of one conversion."""

    source: Source
    settings: Upcycling
    maker: ExpertMaker
    args: argparse.Namespace

    def entries(self, match: Match, prefix: str, moments: bool) -> Iterator[NewTensor | NewObject]:
        """Yield what one dense tensor or object becomes; `prefix` names a state of its optimizer.

        moments: that state is copied; a master copy of the weight is treated as the weight.
        """
        if match.rule.operation == "experts":
            yield from self._expert_entries(match, prefix, moments)
            if self.settings.shared_expert != "none":
                yield from self._shared_entries(match, prefix, moments)
        elif prefix + match.name in self.source.tensors:
            yield self._as_it_is(prefix + match.name, prefix + match.target)
        else:
            yield NewObject(match.target, self.source.read_object(match.name))

    def new_parameters(self, layer: int) -> Iterator[NewTensor]:
        """Yield what the dense model has no counterpart of: router and coefficient of one layer."""
        weights = [f"decoder.layers.{layer}.mlp.linear_fc1.weight{half}" for half in ("", "_w")]
        tensors, settings = self.source.tensors, self.settings
        dtype = next(tensors[name].dtype for name in weights if name in tensors)
        shape = (settings.num_experts, self.args.hidden_size)
        draw = partial(
            router_rows,
            init=settings.router_init,
            shape=shape,
            granularity=settings.granularity,
            std=self.args.init_method_std,
            seed=settings.seed,
            layer=layer,
        )
        router = partial(ROUTER.format, layer=layer)
        yield _computed(router(kind="weight"), TensorInfo(shape, dtype), draw)
        if self.args.add_bias_linear:
            yield _zeros(router(kind="bias"), TensorInfo(shape[:1], dtype))
        if settings.gates.expert_bias:
            yield _zeros(router(kind="expert_bias"), TensorInfo(shape[:1], torch.float32))
        if settings.shared_expert == "learned":
            name = partial(COEFFICIENT.format, layer=layer)
            yield _zeros(name(kind="weight"), TensorInfo((2, self.args.hidden_size), dtype))
            yield _zeros(name(kind="bias"), TensorInfo((2,), dtype))

    def _part(self, match: Match) -> FfnTensor:
        return FfnTensor(
            layer=int(match.fields["layer"]),
            fc=int(match.fields["fc"]),
            is_weight=match.fields["kind"] == "weight",
            gated=self.maker.gated,
            half=match.fields["half"],
        )

    def _as_it_is(self, name: str, target: str) -> NewTensor:
        read = partial(self.source.read_tensor, name)
        return _computed(target, self.source.tensors[name], read)

    def _expert_entries(
        self, match: Match, prefix: str, moments: bool
    ) -> Iterator[NewTensor | NewObject]:
        num_experts = self.settings.num_experts
        key_per_expert = "{expert}" in match.target
        targets = [match.target.replace("{expert}", str(expert)) for expert in range(num_experts)]
        if prefix + match.name not in self.source.tensors:
            for expert, target in enumerate(targets):
                place = "0_1" if key_per_expert else f"{expert}_{num_experts}"
                yield NewObject(f"{target}/shard_{place}", NO_EXTRA_STATE)
            return
        info, part = self.source.tensors[prefix + match.name], self._part(match)
        one = TensorInfo(_shard_shape(info.shape, part, self.settings.granularity), info.dtype)
        read = partial(self.source.read_tensor, prefix + match.name)
        regions = partial(self.maker.regions, read, part, moments)
        if key_per_expert:
            for expert, target in enumerate(targets):
                single = partial(regions, expert)
                yield NewTensor(prefix + target, one, single)
            return
        stacked = TensorInfo((num_experts, *one.shape), info.dtype)
        yield NewTensor(prefix + match.target, stacked, regions)

    def _shared_entries(
        self, match: Match, prefix: str, moments: bool
    ) -> Iterator[NewTensor | NewObject]:
        target = match.rule.source.replace(".mlp.", ".mlp.shared_experts.").format(**match.fields)
        if prefix + match.name not in self.source.tensors:
            yield NewObject(target, self.source.read_object(match.name))
            return
        make = partial(self._shared, prefix + match.name, self._part(match), moments)
        yield _computed(prefix + target, self.source.tensors[prefix + match.name], make)

    def _shared(self, name: str, part: FfnTensor, moments: bool) -> Tensor:
        return self.maker.shared_expert(self.source.read_tensor(name), part, moments)


def _shard_shape(shape: tuple[int, ...], part: FfnTensor, granularity: int) -> tuple[int, ...]:
    if granularity == 1 or part.channel_dim is None:
        return shape
    dim = part.channel_dim
    return (*shape[:dim], shape[dim] // granularity, *shape[dim + 1 :])


def _computed(name: str, info: TensorInfo, compute: Callable[[], Tensor]) -> NewTensor:
    return NewTensor(name, info, partial(one_region, info, compute))


def _zeros(name: str, info: TensorInfo) -> NewTensor:
    return _computed(name, info, partial(torch.zeros, info.shape, dtype=info.dtype))


def new_states(entry: NewTensor, states: tuple[State, ...]) -> Iterator[NewTensor]:
    """Yield the optimizer state of a new parameter: zero moments, and its value as master copy."""
    if entry.name.endswith("expert_bias"):
        return  # a buffer
    for state in states:
        info = TensorInfo(entry.info.shape, state.dtype)
        if state.is_moment:
            yield _zeros(state.prefix + entry.name, info)
        else:
            yield NewTensor(state.prefix + entry.name, info, partial(_cast, entry, state.dtype))


def _cast(entry: NewTensor, dtype: torch.dtype) -> Iterator[Region]:
    for region in entry.regions():
        yield Region(region.offsets, region.values.to(dtype))
