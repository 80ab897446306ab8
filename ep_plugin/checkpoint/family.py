"""What a family of Hugging Face models is: names beside Megatron's, settings beside its arguments.

Each file in `families/` that exports FAMILY is one. Both sides of every table are written once and
read in both directions.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from ep_plugin.checkpoint.config_keys import Config as Config
from ep_plugin.checkpoint.config_keys import Keys, refusal, refuse_unread
from ep_plugin.checkpoint.moe_layers import pattern
from ep_plugin.checkpoint.patterns import LayerKind
from ep_plugin.checkpoint.router_losses import notes_of_export, notes_of_import
from ep_plugin.errors import ConfigError
from ep_plugin.moe.config import GATED
from ep_plugin.registry import available
from ep_plugin.untrusted import shown

# What an argument is in checkpoints that do not have it: made before it was, or without our block.
_ABSENT = {"softmax_type": "vanilla", "ep_router": "topk", "rotary_percent": 1.0}

_FRACTIONS = ("rms_norm_eps", "initializer_range")


@dataclass(frozen=True)
class Row:
    """`hf` and `megatron` hold the same values, in layers of that kind alone.

    copy: as they are; qkv: the three projections q, k and v, one name each for {qkv}, are one
    tensor of Megatron's, query group by query group. `when` names an argument of Megatron's without
    which the row does not apply. `shape` is that of Hugging Face's, in Megatron's arguments: a size
    is a sum of products, such as "qk_head_dim+v_head_dim", with {qkv} for the heads of that part.
    """

    hf: str
    megatron: str
    shape: tuple[str, ...]
    operation: Literal["copy", "qkv"] = "copy"
    layers: LayerKind = "any"
    when: str = ""


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    `fixed`: arguments that have this value in every model of the family; a Megatron checkpoint that
    has another is none of it. `fields`: key of config.json -> argument, equal values.
    `read` and `to_config` do the rest; both raise ConfigError for what has no counterpart.
    `defaults` are transformers' of keys that config.json may lack. `balancing` is what its
    coefficient of a load-balancing loss is of, and `jitters` whether it has noise on the router's
    input. `ignored`: names that a folder may also hold and that carry no weights of the model.
    """

    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    fixed: dict[str, Any]
    fields: dict[str, str]
    read: Callable[[Keys], dict[str, Any]]
    to_config: Callable[[argparse.Namespace], Config]
    moe: bool = False
    ignored: tuple[str, ...] = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)
    defaults: Config = field(default_factory=dict)
    balancing: Literal["", "of the model", "of a layer"] = ""
    jitters: bool = False

    def args(self, config: Config) -> argparse.Namespace:
        """Return Megatron's arguments for config.json. Raises ConfigError as `to_args` does."""
        return argparse.Namespace(**self.to_args(config))

    def to_args(self, config: Config) -> dict[str, Any]:
        """Return Megatron's arguments for config.json by name.

        Raises ConfigError for a key that is missing, that has no counterpart, or that nothing is
        known of.
        """
        keys = Keys({**self.defaults, **config})
        missing = sorted(set(self.fields) - set(keys))
        if missing:
            raise ConfigError(
                f"config.json of model_type {self.model_type!r} lacks {', '.join(missing)}; "
                "give the config.json that came with the weights"
            )
        values = {argument: _size(keys, key) for key, argument in self.fields.items()}
        values |= self.read(keys)
        refuse_unread(keys, self.model_type)
        return self.fixed | values

    def config(self, args: argparse.Namespace) -> Config:
        """Return config.json for Megatron's arguments. Raises ConfigError when they differ."""
        differing = self.differing(args)
        if differing:
            raise ConfigError(
                f"the checkpoint is no {self.model_type}: {', '.join(differing)}; use "
                "another --family, or leave --family out"
            )
        values = {key: getattr(args, argument) for key, argument in self.fields.items()}
        head = {"architectures": [self.architecture], "model_type": self.model_type}
        return {**head, **values, **self.to_config(args)}

    def training_notes(self, args: argparse.Namespace, exported: bool) -> list[str]:
        """Return what training with these arguments of Megatron's and with config.json differ in.

        `exported`: config.json was made from the arguments, else they from it.
        """
        notes = notes_of_export if exported else notes_of_import
        return notes(args, self.balancing == "of the model", self.jitters)

    def differing(self, args: argparse.Namespace) -> list[str]:
        """Return "argument = value, not value" for each fixed argument that is another."""
        num_experts = getattr(args, "num_experts", None)
        wrong_kind = (
            [f"num_experts = {shown(num_experts)}"] if bool(num_experts) != self.moe else []
        )
        found = {name: getattr(args, name, _ABSENT.get(name)) for name in self.fixed}
        return wrong_kind + [
            f"{name} = {shown(found[name])}, not {value!r}"
            for name, value in self.fixed.items()
            if not _is_plain(found[name])
            or (found[name] or None) != (value or None)  # False, None and 0 are one
        ]


def _is_plain(value: Any) -> bool:
    """Whether a run argument can be compared: not so a tensor."""
    leaves = value if isinstance(value, list | tuple) else (value,)
    return all(leaf is None or isinstance(leaf, bool | int | float | str) for leaf in leaves)


def _size(keys: Keys, key: str) -> int | float | None:
    """Return a number above 0, a whole one but for _FRACTIONS. Raises ConfigError for others."""
    value = keys.number(key, whole=key not in _FRACTIONS)
    if not 0 < value < (1 if key == "rms_norm_eps" else float("inf")):
        raise refusal(keys, key, "a number above 0" + " and below 1" * (key == "rms_norm_eps"))
    found: int | float = value
    return found


@dataclass(frozen=True)
class Pair:
    """One tensor of Megatron's and the tensors of Hugging Face's that it is made of."""

    hf: tuple[str, ...]
    megatron: str
    operation: Literal["copy", "qkv"]
    shape: tuple[str, ...]


def names() -> tuple[str, ...]:
    """Return the supported values of `model_type`."""
    return available("families")


def load(model_type: str) -> Family:
    """Return a family. Raises ConfigError for one that there is no file for."""
    if model_type not in names():
        raise ConfigError(
            f"model_type {shown(model_type)} has no table of names; supported are "
            f"{', '.join(names())}"
        )
    family: Family = import_module(f"ep_plugin.checkpoint.families.{model_type}").FAMILY
    return family


def recognise(args: argparse.Namespace) -> Family:
    """Return the first family whose models have these arguments of Megatron's.

    Raises ConfigError that says for every family what differs.
    """
    families = [load(name) for name in names()]
    for family in families:
        if not family.differing(args):
            return family
    reasons = "; ".join(f"{f.model_type}: {f.differing(args)[0]}" for f in families)
    raise ConfigError(
        f"the checkpoint is of no supported family ({reasons}); use --family NAME to see all that "
        "differs from one of them"
    )


def pairs(family: Family, args: argparse.Namespace) -> Iterator[Pair]:
    """Yield every pair of names that a model with these arguments has, layer by layer."""
    rows = [row for row in family.rows if _applies(row, args)]
    for row in rows:
        if "{layer}" not in row.hf:
            yield Pair((row.hf,), row.megatron, row.operation, row.shape)
    for layer, is_moe in enumerate(pattern(args)):
        for row in rows:
            if "{layer}" in row.hf and row.layers in ("any", "moe" if is_moe else "dense"):
                yield from _pairs_of_row(row, layer, args)


def _pairs_of_row(row: Row, layer: int, args: argparse.Namespace) -> Iterator[Pair]:
    experts = range(args.num_experts) if "{expert}" in row.hf else (None,)
    for expert in experts:
        parts = ("q", "k", "v") if row.operation == "qkv" else ("",)
        hf = tuple(row.hf.format(layer=layer, expert=expert, qkv=part) for part in parts)
        name = row.megatron.format(layer=layer, expert=expert)
        yield Pair(hf, name, row.operation, row.shape)


def _applies(row: Row, args: argparse.Namespace) -> bool:
    return not row.when or bool(getattr(args, row.when, None))


def gated(name: str, args: argparse.Namespace) -> bool:
    """Return whether the linear_fc1 of this name has a gate half and a value half."""
    ours = getattr(args, "ep_dense_activation", None)
    if ".experts.experts." in name:
        ours = getattr(args, "ep_expert_activation", None) or ours
    if ours is not None:
        return ours in GATED
    return bool(args.swiglu or getattr(args, "quick_geglu", False))


def query_groups(args: argparse.Namespace) -> int:
    """Return the number of heads of keys and values."""
    grouped = getattr(args, "group_query_attention", False)
    return int(args.num_query_groups if grouped else args.num_attention_heads)
