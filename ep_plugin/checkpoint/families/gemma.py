"""Gemma: Llama with tanh-GELU for SiLU, norms by 1 + weight, embeddings times sqrt(H), tied.

The FFN is our `geglu_tanh`, the norms are Megatron's `--apply-layernorm-1p`, and the factor of the
embeddings is one of muP's, whose other settings stay neutral at its default base size. All weights
are the same in both.
"""

import argparse
from math import isclose
from typing import Any

from ep_plugin.checkpoint.config_keys import Keys, refusal
from ep_plugin.checkpoint.families import _config, _rows
from ep_plugin.checkpoint.family import Config, Family
from ep_plugin.errors import ConfigError

_TANH = "gelu_pytorch_tanh"  # also called "gelu", in `hidden_act` of the first release
_KEYS = ("hidden_activation", "hidden_act")  # transformers reads the first before 5, then the other
OWN: dict[str, Any] = {
    "swiglu": False,
    "ep_dense_activation": "geglu_tanh",
    "layernorm_zero_centered_gamma": True,
    "use_mup": True,
    "mup_attn_scale_power": 0.5,  # softmax(q k / sqrt(width of a head)), as without muP
    "mup_base_head_dim": None,
}


def _read(config: Keys) -> dict[str, Any]:
    for key in _KEYS:
        if config.get(key) not in (None, _TANH, *(["gelu"] if key == "hidden_act" else [])):
            raise refusal(config, key, repr(_TANH))
    _config.refuse(config, "use_bidirectional_attention", None)
    return {
        **_config.dense_args(config, activation=config.get("hidden_act", _TANH)),
        "mup_embedding_mult": config["hidden_size"] ** 0.5,
        "mup_base_hidden_size": config["hidden_size"],
        "mup_output_mult": 1.0,
    }


def check_factors(args: argparse.Namespace) -> None:
    """Raise ConfigError where muP's factors of embedding and logits are not Gemma's."""
    factors = {  # argument -> the value that Gemma has
        "mup_embedding_mult": args.hidden_size**0.5,
        "mup_base_hidden_size": args.hidden_size,
        "mup_output_mult": 1.0,
    }
    for name, value in factors.items():
        found = getattr(args, name, None)
        if found is not None and not isclose(found, value, rel_tol=1e-6):
            raise ConfigError(f"the checkpoint is no gemma: {name} = {found}, not {value}")


def _to_config(args: argparse.Namespace) -> Config:
    check_factors(args)
    activation = dict.fromkeys(_KEYS, _TANH)
    return _config.decoder_config(args) | _config.heads_config(args) | activation


FAMILY = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    rows=_rows.EMBEDDING + _rows.ATTENTION + _rows.DENSE,
    fixed=_config.FIXED | OWN,
    fields=_config.DENSE_FIELDS,
    read=_read,
    to_config=_to_config,
    defaults=_config.DEFAULTS
    | {
        "head_dim": 256,
        "num_key_value_heads": 16,
        "hidden_act": _TANH,
        "tie_word_embeddings": True,
    },
)
