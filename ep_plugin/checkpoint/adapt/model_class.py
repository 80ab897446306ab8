"""A GPT as a HybridModel of the same weights, and back: other names, and the same bits.

State of the optimizer goes along under its parameter's name, and counters as they are;
random-number and rerun state belong to the run that ends here.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ep_plugin.checkpoint.adapt.class_names import ONLY_HYBRID, Model, to_gpt, to_hybrid
from ep_plugin.checkpoint.adapt.keep_layers import BY_NUMBER
from ep_plugin.checkpoint.adapt.optimizer_state import by_parameter
from ep_plugin.checkpoint.adapt.renamed import OF_THE_RUN, OPTIMIZER, content, renamed
from ep_plugin.checkpoint.layer_pairs import Pairs, natural, pairs_of, parse
from ep_plugin.checkpoint.opened import ModelClass, Opened, Reclassed
from ep_plugin.checkpoint.run_args import said
from ep_plugin.checkpoint.tensors import NO_EXTRA_STATE, NewObject
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import shown

_COUNTERS = ("optimizer", "opt_param_scheduler")
# Megatron's layers of a HybridModel have no such norms, its rotary embedding no such scaling, and
# its embedding no such factor.
ONLY_GPT = (
    *("qk_layernorm", "qk_l2_norm", "use_rope_scaling"),
    *("rotary_seq_len_interpolation_factor", "use_mup"),
)
POSITIONS = ("learned_absolute", "rope", "none")
OWN_SPEC = ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"]
# How a run divides its layers among stages, where | of a pattern does not say it -> the value that
# leaves it to Megatron.
SPLITS: dict[str, Any] = {
    "num_layers_per_virtual_pipeline_stage": None,
    "num_virtual_stages_per_pipeline_rank": None,
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
}
_UNSAID = {"virtual_pipeline_model_parallel_size": None, "spec": None}  # Megatron works them out


def as_class(model: Opened, to: ModelClass, pattern: str | None, keep_optimizer: bool) -> Opened:
    """Return the model as one of class `to`. Reads no tensor.

    `pattern` is the HybridModel's; None: the one without cuts. Raises ConfigError for a model of
    that class already, or with anything that has no counterpart in the other.
    """
    _check_counterparts(model)
    theirs = getattr(model.args, "hybrid_layer_pattern", None)
    if (to == "hybrid") == bool(theirs):
        what = f"a HybridModel already ({shown(theirs)})" if theirs else "a GPT already"
        other = "gpt" if theirs else "hybrid"
        raise ConfigError(f"{model.folder} holds {what}; use --model-class {other}, or train it")
    if theirs:
        pairs, pattern = pairs_of_hybrid(model, theirs), theirs
        args = gpt_args(model.args, pairs)
    else:
        pairs, pattern = pairs_of_gpt(model, pattern)
        args = hybrid_args(model.args, pattern)
    return _renamed(model, to, pairs, pattern, args, keep_optimizer)


def as_hybrid(model: Model, pattern: str | None) -> tuple[Callable[[str], str], argparse.Namespace]:
    """Return what spells a GPT's stored names in its HybridModel, and that model's run arguments.

    `pattern` and what is raised are as of `as_class`.
    """
    _check_counterparts(model)
    pairs, pattern = pairs_of_gpt(model, pattern)
    return to_hybrid(model, pairs), hybrid_args(model.args, pattern)


def _renamed(
    model: Opened,
    to: ModelClass,
    pairs: Pairs,
    pattern: str,
    args: argparse.Namespace,
    keep_optimizer: bool,
) -> Opened:
    source = model.source
    spell = to_hybrid(model, pairs) if to == "hybrid" else to_gpt(model, pairs)
    every = (*source.tensors, *sorted(source.objects))
    parameters = {name for name in source.tensors if not OPTIMIZER.fullmatch(name)}
    states = by_parameter(source, parameters, "the other class") if keep_optimizer else ()
    names, dropped = {}, 0
    for name in every:
        if OF_THE_RUN.fullmatch(name) or (OPTIMIZER.fullmatch(name) and not states):
            dropped += 1
        elif name != ONLY_HYBRID:
            names[name] = spell(name)
    args.no_save_optim, args.no_save_rng = not states, True
    counters = {n: source.common[n] for n in _COUNTERS if states and n in source.common}
    made = renamed(source, names, args, counters)
    more = (NewObject(ONLY_HYBRID, NO_EXTRA_STATE),) if to == "hybrid" else ()
    return replace(
        model,
        source=made,
        args=args,
        origins={new: model.origins.get(old, (old,)) for old, new in names.items()},
        reclassed=Reclassed(
            to, pattern, (*content(made), *more), tuple(names.items()), dropped, bool(states)
        ),
    )


def _check_counterparts(model: Model) -> None:
    """Raise ConfigError for a setting that one of the two classes cannot have, or counts layers."""
    for name in (*BY_NUMBER, *ONLY_GPT):
        value = said(model.args, name)
        if value is not None and not _is_own_spec(name, model.args):
            raise ConfigError(
                f"--model-class cannot convert {model.folder}, which was trained with {name} = "
                f"{shown(value)}: the other class has no counterpart; go on with the class it has"
            )
    kind = getattr(model.args, "position_embedding_type", None)
    if kind is not None and kind not in POSITIONS:
        raise ConfigError(
            f"--model-class cannot convert {model.folder}, which was trained with "
            f"position_embedding_type = {shown(kind)}: the other class has no counterpart; go on "
            "with the class it has"
        )


def _is_own_spec(name: str, args: argparse.Namespace) -> bool:
    """Whether a HybridModel was made by Megatron's own spec, which its script asks for by name."""
    is_hybrid = bool(getattr(args, "hybrid_layer_pattern", None))
    return name == "spec" and is_hybrid and bool(args.spec == OWN_SPEC)


def pairs_of_gpt(model: Model, pattern: str | None) -> tuple[Pairs, str]:
    """Return the layers of a GPT, and the pattern that its HybridModel gets."""
    pairs = pairs_of(model.args)
    expected = natural(pairs)
    if pattern is None:
        return pairs, expected
    what = f"--hybrid-layer-pattern {shown(pattern)}"
    instead = f"use --hybrid-layer-pattern '{expected}', with | where stages are cut"
    typed = parse(pattern, what, instead)
    if len(typed.is_moe) != len(pairs.is_moe):
        raise ConfigError(
            f"{what} has {len(typed.is_moe)} pairs of layers, and {model.folder} is a GPT of "
            f"{len(pairs.is_moe)} layers; {instead}"
        )
    if typed != pairs:
        raise ConfigError(
            f"{what} has other attention or blocks than {model.folder}, whose layers are "
            f"{expected}; {instead}"
        )
    return pairs, pattern


def pairs_of_hybrid(model: Model, pattern: str) -> Pairs:
    """Return the layers of the GPT that a HybridModel is."""
    what = f"the HybridModel in {model.folder} ({shown(pattern)})"
    pairs = parse(pattern, what, "go on with it as a HybridModel")
    num_layers = 2 * len(pairs.is_moe)
    if num_layers != model.args.num_layers:
        raise ConfigError(
            f"{what} has a pattern of {num_layers} layers, and num_layers = "
            f"{model.args.num_layers}; give a checkpoint that Megatron saved"
        )
    if any(pairs.is_moe) != bool(getattr(model.args, "num_experts", None)):
        raise ConfigError(
            f"{what} has num_experts = {shown(getattr(model.args, 'num_experts', None))}, which "
            "contradicts its pattern; give a checkpoint that Megatron saved"
        )
    return pairs


def hybrid_args(gpt: argparse.Namespace, pattern: str) -> argparse.Namespace:
    """Return the run arguments of the HybridModel, as Megatron saves them."""
    args = _of_other_class(gpt, len(pattern.replace("|", "")))
    args.hybrid_layer_pattern, args.moe_layer_freq = pattern, 1
    return args


def gpt_args(hybrid: argparse.Namespace, pairs: Pairs) -> argparse.Namespace:
    """Return the run arguments of the GPT, as Megatron saves them."""
    args = _of_other_class(hybrid, len(pairs.is_moe))
    args.hybrid_layer_pattern = None
    # A pyramid needs the list: Megatron then saves each layer under its own name.
    listed = getattr(args, "ep_experts_per_layer", None) is not None or not all(pairs.is_moe)
    args.moe_layer_freq = [int(m) for m in pairs.is_moe] if listed and any(pairs.is_moe) else 1
    return args


def _of_other_class(args: argparse.Namespace, num_layers: int) -> argparse.Namespace:
    made = copy.copy(args)
    for name, value in {**SPLITS, **_UNSAID}.items():
        if hasattr(made, name):
            setattr(made, name, value)
    made.num_layers = num_layers
    if getattr(made, "encoder_num_layers", None) is not None:
        made.encoder_num_layers = num_layers
    return made
