"""A whole model as flags, from the arguments in its checkpoint: what `flags.txt` holds."""

import argparse
import copy
from typing import Any

from ep_plugin.megatron.arguments.run_flags import printed_flags, run_flags, words_of
from ep_plugin.megatron.arguments.table import TABLE, Argument
from ep_plugin.megatron.arguments.theirs import several
from ep_plugin.moe.rules import said

_SWITCHES = {  # flag -> argument, given when the argument is true
    "--squared-relu": "squared_relu",
    "--rotary-interleaved": "rotary_interleaved",
    "--apply-query-key-layer-scaling": "apply_query_key_layer_scaling",
    "--qk-l2-norm": "qk_l2_norm",
}
# flag -> (argument, Megatron's default); given where the argument is another one.
_OTHERS: dict[str, tuple[str, Any]] = {
    "--rotary-percent": ("rotary_percent", 1.0),
    "--rotary-seq-len-interpolation-factor": ("rotary_seq_len_interpolation_factor", None),
    "--softmax-type": ("softmax_type", "vanilla"),
    "--window-attn-skip-freq": ("window_attn_skip_freq", None),
    "--no-rope-freq": ("no_rope_freq", None),
}
_OF_EXPERTS: dict[str, tuple[str, Any]] = {
    "--moe-router-dtype": ("moe_router_dtype", None),
    "--moe-expert-capacity-factor": ("moe_expert_capacity_factor", None),
    "--moe-token-drop-policy": ("moe_token_drop_policy", "probs"),
}
# Megatron's default is 0.1; a checkpoint whose arguments do not say has none.
_DROPOUTS = ("--attention-dropout", "--hidden-dropout")
# What a model can have and these flags do not say; None, 0 or empty in all others.
UNSAID = (
    *("mtp_num_layers", "mtp_hybrid_override_pattern", "hybrid_override_pattern"),
    *("hybrid_layer_pattern", "spec", "heterogeneous_layers_config_path"),
    *("heterogeneous_layers_config_encoded_json", "moe_latent_size"),
    *("experimental_attention_variant", "attention_output_gate"),
)
_GROUPS = ("routing", "capacity", "losses", "experts")  # of the table, about the model
_OF_THE_RUN = ("--ep-gemm", "--ep-save")  # but for these


def legal_flags() -> dict[str, bool]:
    """Return each flag that can describe a model -> whether a value follows it: ours, and those of
    Megatron's that are printed here."""
    theirs = dict.fromkeys([*_OTHERS, *_OF_EXPERTS, *_DROPOUTS], True)
    ours = {row.flag: row.default is not False for row in TABLE}
    return {**printed_flags(), **theirs, **dict.fromkeys(_SWITCHES, False), **ours}


def unsaid(args: argparse.Namespace) -> list[str]:
    """Return the arguments of this model that no flag here says."""
    found = [name for name in UNSAID if getattr(args, name, None)]
    router = getattr(args, "ep_router", None) or ""
    return [*found, "ep_router"] if "." in router else found  # a user's own code


def model_flags(args: argparse.Namespace) -> list[str]:
    """Return the flags of a model with these arguments; data and optimizer are the user's."""
    if getattr(args, "ep_further_losses", None):
        # The run noted them with Megatron's flags too, which then have the main loss alone here.
        args = copy.copy(args)
        for name in ("moe_router_load_balancing_type", "moe_aux_loss_coeff"):
            setattr(args, name, several(getattr(args, name))[0])
    flags = run_flags(args)
    flags += [flag for flag, name in _SWITCHES.items() if getattr(args, name, False)]
    flags += [word for flag in _DROPOUTS if flag not in flags for word in (flag, "0.0")]
    experts = bool(getattr(args, "num_experts", None))
    for flag, (name, default) in (_OTHERS | (_OF_EXPERTS if experts else {})).items():
        if getattr(args, name, default) != default:
            flags += [flag, *words_of(getattr(args, name))]
    for row in TABLE if experts else ():
        if row.group in _GROUPS and row.flag not in _OF_THE_RUN:
            flags += _own(row, args, flags)
    return flags


def _own(row: Argument, args: argparse.Namespace, flags: list[str]) -> list[str]:
    """Return the flag of a row, where it is set and nothing in `flags` says the same."""
    value = getattr(args, row.dest, None)
    default = row.default if row.kind else row.field_default
    if value in (None, default) or row.flag in flags or row.twin_flag in flags:
        return []
    return [row.flag, *([said(value)] if isinstance(value, bool) else words_of(value))]
