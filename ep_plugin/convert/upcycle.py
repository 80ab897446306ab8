"""Sparse upcycling (arXiv:2212.05055): every expert begins as a copy of the dense FFN.

Why the output is kept. An MoE layer computes

    y = sum over the chosen experts i of p_i * FFN_i(x)

With FFN_i = FFN for all i, y = (sum of p_i) * FFN(x). Megatron's default routing takes the softmax
over the k chosen logits, so the p_i sum to 1 and y = FFN(x), whatever the router says. Routing that
takes the softmax over all experts first (--moe-router-pre-softmax, which Megatron demands for
top-1) gives sum p_i < 1: the dense output would be scaled down token by token, so it is refused
here.

Why the router is random. The router is the only thing in which the experts differ at the start. A
zero router gives every expert the same logit: top-k then breaks the tie by index, the same k
experts see every token, and the others get no gradient. Small random rows (the checkpoint's
init_method_std) spread the tokens; from then on each expert sees other tokens and the copies drift
apart.
"""

import argparse
import copy
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ep_plugin.config import ConfigError
from ep_plugin.convert.families import megatron_gpt
from ep_plugin.convert.layers import moe_layers, parse_layers
from ep_plugin.convert.names import Match, compile_pattern, match_names
from ep_plugin.convert.stream import NewObject, NewTensor, Region, Source, TensorInfo

_KEPT_COMMON = ("checkpoint_version", "iteration", "num_floating_point_operations_so_far")


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """What to make of the dense model. Raises ConfigError when settings contradict."""

    num_experts: int
    topk: int
    layers: str = "all"
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.num_experts < 2:
            raise ConfigError(f"--num-experts must be at least 2; got {self.num_experts}")
        if self.topk > self.num_experts:
            raise ConfigError(
                f"--topk ({self.topk}) must be at most --num-experts ({self.num_experts}); "
                f"--topk {self.num_experts} would do"
            )
        if self.topk < 2:
            raise ConfigError(
                f"--topk must be at least 2; got {self.topk}: Megatron's top-1 takes the "
                "softmax over all experts, which scales the dense output down; --topk 2 would do"
            )


@dataclass(frozen=True)
class Plan:
    """The new checkpoint, not computed yet."""

    content: tuple[NewTensor | NewObject, ...]
    common: dict[str, Any]
    name_map: tuple[tuple[str, str], ...]  # (dense name, new name); "" where there is none
    dropped: int
    moe_layers: tuple[bool, ...]

    @property
    def num_bytes(self) -> int:
        return sum(entry.info.num_bytes for entry in self.content if isinstance(entry, NewTensor))


def plan(source: Source, settings: Upcycling) -> Plan:
    """Decide every name, shape and operation. Reads no tensor.

    Raises ConfigError when the checkpoint is no dense GPT, or --layers does not fit it.
    """
    args = _dense_args(source)
    frequency = parse_layers(settings.layers, args.num_layers)
    chosen = moe_layers(frequency, args.num_layers)
    content_metadata = source.common.get("content_metadata") or {}
    table = megatron_gpt.rules(
        transformer_engine=args.transformer_impl != "local",
        key_per_expert=bool(content_metadata.get("singleton_local_shards")),
    )
    matches = match_names([*source.tensors, *sorted(source.objects)], table, chosen)
    _check_complete(matches, chosen)
    kept = [match for match in matches if match.rule.operation != "drop"]
    content: list[NewTensor | NewObject] = []
    name_map = []
    for match in kept:
        new = list(_new_entries(match, source, settings.num_experts))
        content.extend(new)
        name_map.append((match.name, match.target("*")))
    for layer in (layer for layer, is_moe in enumerate(chosen) if is_moe):
        routers = _router(layer, source, args, settings)
        content.extend(routers)
        name_map.extend(("", router.name) for router in routers)
    return Plan(
        content=tuple(content),
        common=_common(source, args, settings, frequency),
        name_map=tuple(name_map),
        dropped=len(matches) - len(kept),
        moe_layers=chosen,
    )


def _dense_args(source: Source) -> argparse.Namespace:
    args = source.common.get("args")
    if not isinstance(args, argparse.Namespace):
        raise ConfigError(f"{source.folder} holds no run arguments; give one that Megatron saved")
    if getattr(args, "num_experts", None):
        raise ConfigError(
            f"{source.folder} is a Mixture-of-Experts already (num_experts = {args.num_experts}); "
            "give a dense checkpoint"
        )
    return args


def _check_complete(matches: list[Match], chosen: tuple[bool, ...]) -> None:
    names = [match.name for match in matches]
    missing = []
    for pattern in megatron_gpt.REQUIRED:
        found = (compile_pattern(pattern).fullmatch(name) for name in names)
        present = {int(match["layer"]) for match in found if match}
        missing += [
            pattern.format(layer=layer, half="")
            for layer, is_moe in enumerate(chosen)
            if is_moe and layer not in present
        ]
    if missing:
        raise ConfigError(
            f"the checkpoint lacks {', '.join(missing)}; choose --layers that have a dense MLP"
        )


def _new_entries(match: Match, source: Source, num_experts: int) -> Iterator[NewTensor | NewObject]:
    """Yield what one dense tensor or object becomes."""
    if match.rule.operation == "experts":
        yield from _expert_entries(match, source, num_experts)
    elif match.name in source.tensors:
        info = source.tensors[match.name]
        yield NewTensor(match.target(), info, partial(_copied, source, match.name, None))
    else:
        yield NewObject(match.target(), partial(source.read_object, match.name))


def _expert_entries(
    match: Match, source: Source, num_experts: int
) -> Iterator[NewTensor | NewObject]:
    key_per_expert = "{expert}" in match.rule.target
    if match.name not in source.tensors:
        for expert in range(num_experts):
            place = "0_1" if key_per_expert else f"{expert}_{num_experts}"
            yield NewObject(f"{match.target(expert)}/shard_{place}", _no_extra_state)
        return
    info = source.tensors[match.name]
    if key_per_expert:
        for expert in range(num_experts):
            yield NewTensor(match.target(expert), info, partial(_copied, source, match.name, None))
        return
    stacked = TensorInfo((num_experts, *info.shape), info.dtype)
    yield NewTensor(match.target(), stacked, partial(_copied, source, match.name, num_experts))


def _copied(source: Source, name: str, num_experts: int | None) -> Iterator[Region]:
    """Yield the tensor as it is, or once per expert along a new leading axis; it is read once."""
    values = source.read_tensor(name)
    zeros = (0,) * values.dim()
    if num_experts is None:
        yield Region(zeros, values)
        return
    for expert in range(num_experts):
        yield Region((expert, *zeros), values.unsqueeze(0))


def _no_extra_state() -> bytes:
    """Return what Megatron saves for a linear layer without quantisation state."""
    buffer = io.BytesIO()
    torch.save([None], buffer)
    return buffer.getvalue()


def _router(
    layer: int, source: Source, args: argparse.Namespace, settings: Upcycling
) -> list[NewTensor]:
    """Return the router of one layer: weight [E, H], and bias [E] where the model has biases."""
    weights = [f"decoder.layers.{layer}.mlp.linear_fc1.weight{half}" for half in ("", "_w")]
    dtype = next(source.tensors[name].dtype for name in weights if name in source.tensors)
    weight = TensorInfo((settings.num_experts, args.hidden_size), dtype)
    draw = partial(_random, weight, args.init_method_std, settings.seed * 100_003 + layer)
    routers = [NewTensor(megatron_gpt.ROUTER.format(layer=layer, kind="weight"), weight, draw)]
    if args.add_bias_linear:
        bias = TensorInfo((settings.num_experts,), dtype)
        name = megatron_gpt.ROUTER.format(layer=layer, kind="bias")
        routers.append(NewTensor(name, bias, partial(_zeros, bias)))
    return routers


def _random(info: TensorInfo, std: float, seed: int) -> Iterator[Region]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(info.shape, generator=generator) * std
    yield Region((0,) * len(info.shape), values.to(info.dtype))


def _zeros(info: TensorInfo) -> Iterator[Region]:
    yield Region((0,) * len(info.shape), torch.zeros(info.shape, dtype=info.dtype))


def _common(
    source: Source, args: argparse.Namespace, settings: Upcycling, frequency: int | list[int]
) -> dict[str, Any]:
    """Return run arguments and counters as a stock MoE run saves them under --no-save-optim."""
    args = copy.copy(args)
    args.num_experts = settings.num_experts
    args.moe_router_topk = settings.topk
    args.moe_layer_freq = frequency
    args.moe_ffn_hidden_size = args.ffn_hidden_size
    # What the function-preserving argument above rests on.
    args.moe_router_score_function = "softmax"
    args.moe_router_pre_softmax = False
    args.moe_router_topk_scaling_factor = None
    args.no_save_optim = args.no_save_rng = True
    kept = {key: source.common[key] for key in _KEPT_COMMON if key in source.common}
    return {"args": args, **kept}
