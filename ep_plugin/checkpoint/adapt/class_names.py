"""How a GPT and a HybridModel of the same weights name them.

    GPT                                         HybridModel
    decoder.layers.N. input_layernorm,          decoder.layers.2N.    the same
                      self_attention
    decoder.layers.N. pre_mlp_layernorm, mlp    decoder.layers.2N+1.  the same
    decoder.final_layernorm                     decoder.final_norm

A HybridModel has Transformer Engine's names of norms, a GPT those of its `transformer_impl`.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ep_plugin.checkpoint.adapt.renamed import LAYER
from ep_plugin.checkpoint.layer_pairs import Pairs
from ep_plugin.checkpoint.names import norms
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import shown

_STATE = re.compile(r"(optimizer\.state\.\w+\.)(.+)", re.DOTALL)
_ATTENTION, _BLOCK = ("input_layernorm.", "self_attention."), ("pre_mlp_layernorm.", "mlp.")
_LAST_NORM = {"gpt": "decoder.final_layernorm.", "hybrid": "decoder.final_norm."}
ONLY_HYBRID = "output_layer._extra_state/shard_0_1"  # empty; a GPT leaves it out


class Model(Protocol):
    """A checkpoint, opened one way or another."""

    @property
    def folder(self) -> Path: ...

    @property
    def args(self) -> argparse.Namespace: ...


def to_hybrid(model: Model, pairs: Pairs) -> Callable[[str], str]:
    """Return what spells a GPT's name in its HybridModel, of a parameter or its state."""

    def spell(name: str) -> str:
        found = _in_layer(name, model)
        if found is None:
            return _with_prefix(name, _LAST_NORM["gpt"], _LAST_NORM["hybrid"])
        layer, below = int(found[1]), found[2]
        is_block = _is_block(below, name, model)
        for norm in norms(pairs.latent, _of_layer(layer, pairs, name, model)):
            below = _with_prefix(below, norm.local, norm.engine)
        return f"decoder.layers.{2 * layer + is_block}.{below}"

    return _of_states_too(spell)


def to_gpt(model: Model, pairs: Pairs) -> Callable[[str], str]:
    """Return what spells a HybridModel's name in its GPT, of a parameter or its state."""
    local = getattr(model.args, "transformer_impl", None) == "local"

    def spell(name: str) -> str:
        found = _in_layer(name, model)
        if found is None:
            return _with_prefix(name, _LAST_NORM["hybrid"], _LAST_NORM["gpt"])
        number, below = int(found[1]), found[2]
        layer = number // 2
        is_moe = _of_layer(layer, pairs, name, model)
        if number % 2 != _is_block(below, name, model):
            raise _no_counterpart(name, model)
        if local:
            for norm in norms(pairs.latent, is_moe):
                below = _with_prefix(below, norm.engine, norm.local)
        return f"decoder.layers.{layer}.{below}"

    return _of_states_too(spell)


def _of_states_too(spell: Callable[[str], str]) -> Callable[[str], str]:
    """Return what spells a parameter's state of the optimizer by the parameter's name."""

    def spelled(name: str) -> str:
        state = _STATE.fullmatch(name)
        return state[1] + spell(state[2]) if state else spell(name)

    return spelled


def _in_layer(name: str, model: Model) -> re.Match[str] | None:
    """Return the layer and the rest of a name, None outside of the layers."""
    found = LAYER.fullmatch(name)
    if found is None and name.startswith("decoder.layers."):
        raise _no_counterpart(name, model)
    return found


def _with_prefix(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def _is_block(below: str, name: str, model: Model) -> bool:
    """Whether a name below a layer is of its block, and not of its attention."""
    if below.startswith(_BLOCK):
        return True
    if not below.startswith(_ATTENTION):
        raise _no_counterpart(name, model)
    return False


def _of_layer(layer: int, pairs: Pairs, name: str, model: Model) -> bool:
    """Whether a layer of the GPT has experts."""
    if layer >= len(pairs.is_moe):
        raise _no_counterpart(name, model)
    return pairs.is_moe[layer]


def _no_counterpart(name: str, model: Model) -> ConfigError:
    return ConfigError(
        f"{shown(name)} in {model.folder} has no counterpart in a model of the other class; go on "
        "with the class it has"
    )
