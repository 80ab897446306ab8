"""Do the tensors of a Hugging Face folder belong to its config.json? Asked before any is read.

How many layers and experts there are comes first, by the names that the files hold: nothing is
looped over that only config.json says. Then names, shapes and dtypes; each message has the keys of
config.json that a tensor contradicts.
"""

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping
from math import prod

import torch

from ep_plugin.checkpoint.config_keys import Config
from ep_plugin.checkpoint.family import Family, Pair, query_groups
from ep_plugin.checkpoint.moe_layers import pattern
from ep_plugin.checkpoint.tensors import TensorInfo
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import cut, shown

MAX_LISTED = 100  # names in a message
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
_EXPERT = re.compile(r"\.experts\.(\d{1,9})\.")
_LAYERS, _BEHIND = "num_hidden_layers", "num_nextn_predict_layers"
_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")
_KEYS = {"num_query_groups": "num_key_value_heads", "kv_channels": "head_dim"}
_KEYS |= {"moe_shared_expert_intermediate_size": "shared experts' size", "num_experts": "experts"}
# May be more precise than the model: norms, biases, and what experts are chosen by.
_PRECISE = re.compile(r".*(\.bias|norm\.weight|gate\.weight|_bias)")
_REMEDY = "give the config.json that came with the weights"


def check_counts(config: Config, names: Iterable[str], family: Family) -> None:
    """Raise ConfigError unless the files have the layers and experts that config.json counts."""
    known = [*names]
    layers, experts = _numbers(_LAYER, known), _numbers(_EXPERT, known)
    behind = _count(config, _BEHIND, 0)
    held = 1 + max(layers, default=-1)
    _check(_LAYERS, _count(config, _LAYERS, 0), held, held - behind, "layers", layers)
    if family.moe:
        for key in _EXPERTS:
            if config.get(key) is not None:
                held = 1 + max(experts, default=-1)
                _check(key, _count(config, key, 0), held, held, "experts of a layer", experts)


def check_size(args: argparse.Namespace, num_tensors: int, family: Family) -> None:
    """Raise ConfigError where more experts are asked for than there are."""
    each, topk = getattr(args, "num_experts", None), getattr(args, "moe_router_topk", None)
    if each and topk and topk > each:
        raise ConfigError(
            f"config.json has num_experts_per_tok = {topk}, and {_key('num_experts', family)} = "
            f"{each}; {_REMEDY}"
        )
    experts = (getattr(args, "num_experts", None) or 0) * sum(pattern(args))
    if experts > num_tensors:
        raise ConfigError(
            f"config.json of model_type {family.model_type!r} asks for {experts} experts in all, "
            f"and the folder has {num_tensors} tensors; {_REMEDY}"
        )


def check_names(
    present: Iterable[str], wanted: Iterable[str], family: Family, args: argparse.Namespace
) -> None:
    """Raise ConfigError that lists every name too many or missing, and what says so."""
    has, needs = set(present), set(wanted)
    complaints = []
    if has - needs:
        complaints.append(
            f"{len(has - needs)} names are in no row of its table: {_some(has - needs)}"
        )
    if needs - has:
        complaints.append(f"{len(needs - has)} names are missing: {_some(needs - has)}")
    if complaints:
        raise ConfigError(
            f"the checkpoint is no complete {family.model_type}: {'; '.join(complaints)}; "
            f"give the whole model, with the config that belongs to it ({_said(args, family)})"
        )


def check_tensors(
    tensors: Mapping[str, TensorInfo],
    pairs: Iterable[Pair],
    family: Family,
    args: argparse.Namespace,
    dtype: torch.dtype | None,
) -> None:
    """Raise ConfigError for the first tensor of another shape, or of another dtype than `dtype`."""
    for pair in pairs:
        for part, name in zip("qkv", pair.hf, strict=False):
            info = tensors[name]
            dims = [_of_part(dim, part) for dim in pair.shape]
            if info.shape != tuple(_value(dim, args) for dim in dims):
                asked = ", ".join(_spelled(dim, args, family) for dim in dims)
                raise ConfigError(
                    f"{name} is {_listed(info.shape)}, and config.json asks for [{asked}]; "
                    f"{_REMEDY}"
                )
            if dtype is not None and not _may_be(info.dtype, dtype, name):
                raise ConfigError(
                    f"{name} is {info.dtype}, and config.json says that the model is {dtype} "
                    f"(dtype or torch_dtype); give weights of one dtype, and its name there"
                )


def _may_be(found: torch.dtype, said: torch.dtype, name: str) -> bool:
    return found == said or (found == torch.float32 and _PRECISE.fullmatch(name) is not None)


def _numbers(pattern: re.Pattern[str], names: Iterable[str]) -> set[int]:
    return {int(found[1]) for name in names if (found := pattern.search(name))}


def _count(config: Config, key: str, default: int) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or value < 0:
        raise ConfigError(f"config.json has {key} = {shown(value)}; give a whole number there")
    return value


def _check(key: str, said: int, held: int, last: int, word: str, numbers: set[int]) -> None:
    """`held` and `last`: how many the files have with and without layers behind the last one."""
    if held != len(numbers):
        lost = next(number for number in range(held) if number not in numbers)
        raise ConfigError(
            f"the files hold {word} up to {held - 1} and nothing of {lost}, where config.json has "
            f"{key} = {said}; copy the model again"
        )
    if said not in (held, last):
        raise ConfigError(
            f"config.json has {key} = {said}, and the files hold {held} {word}; {_REMEDY}"
        )


def _of_part(dim: str, part: str) -> str:
    return dim.replace("{qkv}", "num_attention_heads" if part == "q" else "num_query_groups")


def _terms(dim: str) -> Iterator[list[str]]:
    return (term.split("*") for term in dim.split("+"))


def _value(dim: str, args: argparse.Namespace) -> int:
    def of(name: str) -> int:
        if name.isdecimal():
            return int(name)
        return query_groups(args) if name == "num_query_groups" else int(getattr(args, name))

    return sum(prod(of(name) for name in term) for term in _terms(dim))


def _spelled(dim: str, args: argparse.Namespace, family: Family) -> str:
    """Return a size in the words of config.json: "num_attention_heads * head_dim = 64"."""
    if dim.isdecimal():
        return dim
    words = " + ".join(" * ".join(_key(name, family) for name in term) for term in _terms(dim))
    return f"{words} = {_value(dim, args)}"


def _key(argument: str, family: Family) -> str:
    known = (key for key, name in family.fields.items() if name == argument)
    return next(known, _KEYS.get(argument, argument))


def _said(args: argparse.Namespace, family: Family) -> str:
    counts = {"num_layers": _LAYERS, "num_experts": _key("num_experts", family)}
    found = {key: getattr(args, name, None) for name, key in counts.items()}
    tied = not args.untie_embeddings_and_output_weights
    values = [f"{key} = {value}" for key, value in found.items() if value is not None]
    return ", ".join([*values, f"tie_word_embeddings = {str(tied).lower()}"])


def _listed(shape: tuple[int, ...]) -> str:
    return cut(str(list(shape)))


def _some(names: set[str]) -> str:
    rest = len(names) - MAX_LISTED
    listed = ", ".join(cut(name) for name in sorted(names)[:MAX_LISTED])
    return listed if rest <= 0 else f"{listed} and {rest} more"
