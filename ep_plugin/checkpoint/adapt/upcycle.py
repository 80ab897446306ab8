"""Upcycling: every name, shape and operation of the new checkpoint.

What an expert is made of stands in `modes/`, what its outputs are multiplied by in `upcycling.py`,
how all of it is computed in `ffn.py`. A state of the optimizer is named after its parameter
(`optimizer.state.exp_avg.PARAMETER`) and takes the same way: to every expert, as it is.
"""

import argparse
import copy
from dataclasses import replace

from ep_plugin.checkpoint.adapt import optimizer_state
from ep_plugin.checkpoint.adapt.entries import EntryBuilder, new_states
from ep_plugin.checkpoint.adapt.ffn import ExpertMaker, Mode
from ep_plugin.checkpoint.adapt.upcycling import MODES, Upcycling, divide
from ep_plugin.checkpoint.moe_layers import pattern
from ep_plugin.checkpoint.opened import Opened, Upcycled
from ep_plugin.checkpoint.patterns import (
    REQUIRED,
    check_complete,
    compile_pattern,
    match_names,
    rules,
)
from ep_plugin.checkpoint.tensors import NewObject, NewTensor, Source, TensorInfo, whole
from ep_plugin.errors import ConfigError
from ep_plugin.registry import resolve

# What goes along from the run that ends, beside its arguments.
KEPT = ("checkpoint_version", "iteration", "num_floating_point_operations_so_far")
# Argument of a dense FFN that no expert has -> whether --ep-dense-activation takes its place.
_NO_EXPERT_HAS = {
    "quick_geglu": True,
    "squared_relu": True,
    "activation_func_clamp_value": False,
    "glu_linear_offset": False,
}
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def add_experts(dense: Opened, settings: Upcycling | None, keep_optimizer: bool) -> Opened:
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
    origins = {
        target.replace("*", str(expert)): dense.origins[old]
        for old, target in new.name_map
        if old in dense.origins
        for expert in (range(settings.num_experts) if "*" in target else (0,))
    }
    return replace(
        dense,
        source=made,
        args=args,
        origins=origins,
        family=None,
        deviations=new.deviations,
        upcycled=new,
    )


def upcycle(source: Source, settings: Upcycling, keep_optimizer: bool = True) -> Upcycled:
    """Decide every name, shape and operation. Reads no tensor.

    Raises ConfigError when the checkpoint is no dense GPT, --layers or --granularity do not fit
    it, or its optimizer state cannot be carried over and is not to be left out.
    """
    dense = _dense_args(source)
    _check_activation(dense)
    _check_embeddings(source, dense)
    if dense.ffn_hidden_size % settings.granularity:
        raise ConfigError(
            f"--granularity ({settings.granularity}) must divide the checkpoint's FFN size "
            f"({dense.ffn_hidden_size})"
        )
    maker = make_experts(settings, _is_gated(source.tensors, dense.ffn_hidden_size))
    args = settings.arguments(dense)
    _leave_unread(args)
    chosen = pattern(args)
    content_metadata = source.common.get("content_metadata") or {}
    table = rules(
        transformer_engine=args.transformer_impl != "local",
        key_per_expert=bool(content_metadata.get("singleton_local_shards")),
    )
    matches = match_names([*source.tensors, *sorted(source.objects)], table, chosen)
    check_complete(matches, chosen)
    kept = [match for match in matches if match.rule.operation != "drop"]
    states = optimizer_state.find(source, {m.name for m in kept}) if keep_optimizer else ()
    counters = {}
    if states:
        counters = optimizer_state.counters(source, settings.ep, args.add_bias_linear)
    args.no_save_optim, args.no_save_rng = not counters, True  # that state belongs to the dense run
    kept_counters = {key: source.common[key] for key in KEPT if key in source.common}
    builder = EntryBuilder(source, settings, maker, args)
    new_names: list[tuple[str, str]] = []
    made: list[NewTensor | NewObject] = []  # what the dense model has no counterpart of
    for layer in (layer for layer, is_moe in enumerate(chosen) if is_moe):
        for entry in builder.new_parameters(layer):
            made.extend([entry, *new_states(entry, states)])
            new_names.append(("", entry.name))
    content: list[NewTensor | NewObject] = []
    name_map = []
    for match in kept:
        for prefix, moments in (("", False), *((s.prefix, s.is_moment) for s in states)):
            if prefix and prefix + match.name not in source.tensors:
                continue
            content.extend(builder.entries(match, prefix, moments))
            target = match.target.replace("{expert}", "*")
            name_map.append((prefix + match.name, prefix + target))
    carried = sum(len(state.names) for state in states)
    return Upcycled(
        content=(*content, *made),
        common={"args": args, **kept_counters, **counters},
        name_map=(*name_map, *new_names),
        dropped=len(matches) - len(kept) - carried,
        moe_layers=chosen,
        deviations=maker.deviations,
        optimizer=bool(states),
    )


def _dense_args(source: Source) -> argparse.Namespace:
    args = source.common.get("args")
    if not isinstance(args, argparse.Namespace):
        raise ConfigError(
            f"{source.folder} holds no run arguments; give a checkpoint that Megatron saved"
        )
    if getattr(args, "num_experts", None):
        raise ConfigError(
            f"{source.folder} is a Mixture-of-Experts already (num_experts = {args.num_experts}); "
            "give a dense checkpoint"
        )
    return args


def _check_activation(args: argparse.Namespace) -> None:
    """Raise ConfigError where the dense FFN computes what no expert of ours does."""
    own = getattr(args, "ep_dense_activation", None)  # takes the place of Megatron's
    for name, theirs in _NO_EXPERT_HAS.items():
        if getattr(args, name, None) and not (theirs and own):
            raise ConfigError(
                f"the dense model has {name}, which experts cannot compute; give a model with "
                "SwiGLU, GeGLU, GELU or ReLU"
            )


def _leave_unread(args: argparse.Namespace) -> None:
    """Leave out activations that --ep-dense-activation took the place of: beside experts the run
    would refuse them, where nothing says the experts' own."""
    for name, theirs in _NO_EXPERT_HAS.items():
        if theirs and getattr(args, name, None):
            setattr(args, name, False)


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


def _is_gated(tensors: dict[str, TensorInfo], ffn_hidden_size: int) -> bool:
    """Whether fc1 holds a gate beside its value: by its rows, whatever the activation's flag."""
    rows = {1}
    for name, info in tensors.items():
        found = compile_pattern(REQUIRED[0]).fullmatch(name)
        if found:
            rows.add(2 if found["half"] else info.shape[0] // ffn_hidden_size)
    return 2 in rows


def make_experts(settings: Upcycling, gated: bool) -> ExpertMaker:
    """Return the experts of `settings`, for an FFN with or without a gate."""
    mode: Mode = resolve(MODES, settings.mode)(settings)
    gates, topk = settings.gates, settings.topk
    kept = 0.5 if settings.shared_expert == "copy" else 1.0
    bias = kept / gates.sum(topk, settings.num_experts)
    reasons = (mode.deviation, gates.deviation(topk, settings.router_init == "zero"))
    return ExpertMaker(
        mode=mode,
        num_experts=settings.num_experts,
        gated=gated,
        routed=divide(mode.granularity * bias, bias, gated),
        shared=divide(kept, kept, gated),
        deviations=tuple(reason for reason in reasons if reason is not None),
    )
