"""Upcycling: every name, shape and operation of the new checkpoint.

What an expert is made of stands in `modes/`, what its outputs are multiplied by in `gains.py`, how
a router begins in `new_router.py`. A state of the optimizer is named after its parameter
(`optimizer.state.exp_avg.PARAMETER`) and takes the same way: to every expert, as it is.
"""

import argparse
import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ep_plugin.checkpoint import gpt_names
from ep_plugin.checkpoint.adapt import optimizer_state
from ep_plugin.checkpoint.adapt.entries import EntryBuilder, new_states
from ep_plugin.checkpoint.adapt.make_experts import deviations, make_experts
from ep_plugin.checkpoint.adapt.upcycling import Upcycling
from ep_plugin.checkpoint.moe_layers import moe_layers, parse_layers
from ep_plugin.checkpoint.patterns import Match, compile_pattern, match_names
from ep_plugin.checkpoint.run_arguments import new_common
from ep_plugin.checkpoint.tensors import NewObject, NewTensor, Source, whole
from ep_plugin.errors import ConfigError

if TYPE_CHECKING:
    from ep_plugin.checkpoint.open import Opened

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class Upcycled:
    """The new checkpoint, not computed yet."""

    content: tuple[NewTensor | NewObject, ...]
    common: dict[str, Any]
    name_map: tuple[tuple[str, str], ...]  # (dense name, new name); "" where there is none
    dropped: int
    moe_layers: tuple[bool, ...]
    deviations: tuple[str, ...] = ()  # why the function is not kept; empty: it is
    optimizer: bool = False  # whether optimizer state goes along

    @property
    def num_bytes(self) -> int:
        return sum(entry.info.num_bytes for entry in self.content if isinstance(entry, NewTensor))


def add_experts(dense: "Opened", settings: Upcycling | None, keep_optimizer: bool) -> "Opened":
    """Return the model that upcycling makes of a dense one, not computed yet; itself without
    settings. Raises ConfigError as `upcycle` does."""
    if settings is None:
        return dense
    source = dense.source
    if dense.spelling == "plain":
        args = copy.copy(dense.args)
        args.transformer_impl = "transformer_engine"  # whose names plain ones are
        metadata = {"singleton_local_shards": True}  # and they name every expert
        source = replace(
            source, common=source.common | {"args": args, "content_metadata": metadata}
        )
    new = upcycle(source, settings, keep_optimizer)
    tensors = {entry.name: entry for entry in new.content if isinstance(entry, NewTensor)}
    args = new.common["args"]
    if dense.spelling == "plain":
        args.transformer_impl = getattr(dense.args, "transformer_impl", "transformer_engine")
        args.moe_token_dispatcher_type = "alltoall"
    made = replace(
        source,
        common={**new.common, "content_metadata": source.common.get("content_metadata")},
        tensors={name: entry.info for name, entry in tensors.items()},
        read_tensor=lambda name: whole(tensors[name]),
    )
    return replace(
        dense,
        source=made,
        args=args,
        origins=_origins(dense, new, settings.num_experts),
        family=None,
        deviations=new.deviations,
        upcycled=new,
    )


def _origins(dense: "Opened", new: Upcycled, num_experts: int) -> dict[str, tuple[str, ...]]:
    origins = {}
    for old, target in new.name_map:
        for expert in range(num_experts) if "*" in target else (0,):
            if old in dense.origins:
                origins[target.replace("*", str(expert))] = dense.origins[old]
    return origins


def upcycle(source: Source, settings: Upcycling, keep_optimizer: bool = True) -> Upcycled:
    """Decide every name, shape and operation. Reads no tensor.

    Raises ConfigError when the checkpoint is no dense GPT, --layers or --granularity do not fit
    it, or its optimizer state cannot be carried over and is not to be left out.
    """
    args = _dense_args(source)
    _check_embeddings(source, args)
    frequency = parse_layers(settings.layers, args.num_layers)
    chosen = moe_layers(frequency, args.num_layers)
    if args.ffn_hidden_size % settings.granularity:
        raise ConfigError(
            f"--granularity ({settings.granularity}) must divide the checkpoint's FFN size "
            f"({args.ffn_hidden_size})"
        )
    content_metadata = source.common.get("content_metadata") or {}
    table = gpt_names.rules(
        transformer_engine=args.transformer_impl != "local",
        key_per_expert=bool(content_metadata.get("singleton_local_shards")),
    )
    matches = match_names([*source.tensors, *sorted(source.objects)], table, chosen)
    _check_complete(matches, chosen)
    kept = [match for match in matches if match.rule.operation != "drop"]
    states = optimizer_state.find(source, {m.name for m in kept}) if keep_optimizer else ()
    builder = EntryBuilder(source, settings, make_experts(settings, _is_gated(source, args)), args)
    content: list[NewTensor | NewObject] = []
    name_map = []
    for match in kept:
        for prefix in ("", *(s.prefix for s in states if s.prefix + match.name in source.tensors)):
            content.extend(builder.entries(match, prefix))
            name_map.append((prefix + match.name, prefix + match.target("*")))
    for layer in (layer for layer, is_moe in enumerate(chosen) if is_moe):
        for entry in builder.new_parameters(layer):
            content.extend([entry, *new_states(entry, states)])
            name_map.append(("", entry.name))
    carried = sum(len(state.names) for state in states)
    return Upcycled(
        content=tuple(content),
        common=new_common(source, args, settings, frequency, bool(states)),
        name_map=tuple(name_map),
        dropped=len(matches) - len(kept) - carried,
        moe_layers=chosen,
        deviations=deviations(settings),
        optimizer=bool(states),
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


def _check_embeddings(source: Source, args: argparse.Namespace) -> None:
    """Raise ConfigError where the vocabulary's tensors are not those that the arguments say."""
    untied = getattr(args, "untie_embeddings_and_output_weights", None)
    if untied is not None and untied != (OUTPUT in source.tensors):
        said, found = ("untied", "lacks") if untied else ("tied", "has")
        raise ConfigError(
            f"the run arguments of {source.folder} say that embedding and output are {said}, but "
            f"it {found} {OUTPUT}; give the checkpoint that belongs to these arguments"
        )
    rows = getattr(args, "padded_vocab_size", None)
    for name in (EMBEDDING, OUTPUT):
        if rows is not None and name in source.tensors and source.tensors[name].shape[0] != rows:
            raise ConfigError(
                f"{name} in {source.folder} has {source.tensors[name].shape[0]} rows, but its run "
                f"arguments say padded_vocab_size = {rows}; give the checkpoint that belongs to "
                "these arguments"
            )


def _is_gated(source: Source, args: argparse.Namespace) -> bool:
    """Whether fc1 holds a gate beside its value: by its rows, whatever the activation's flag."""
    rows = {1}
    for name, info in source.tensors.items():
        found = compile_pattern(gpt_names.REQUIRED[0]).fullmatch(name)
        if found:
            rows.add(2 if found["half"] else info.shape[0] // args.ffn_hidden_size)
    return 2 in rows


def _check_complete(matches: list[Match], chosen: tuple[bool, ...]) -> None:
    names = [match.name for match in matches]
    missing = []
    for pattern in gpt_names.REQUIRED:
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
