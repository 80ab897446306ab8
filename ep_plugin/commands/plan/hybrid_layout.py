"""Which layouts a HybridModel goes with; a refusal names a size that makes the whole line go."""

import argparse
from collections.abc import Callable, Iterable
from math import lcm
from typing import NamedTuple

from ep_plugin.commands.plan.layers import Sizes
from ep_plugin.commands.plan.pattern import FLAG, Pattern
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import shown

MOST = 1 << 18  # ranks
MOST_SEQUENCES = 1 << 20


class _Rule(NamedTuple):
    name: str  # of the size that is to change
    goes: Callable[[argparse.Namespace], bool]
    sentence: Callable[[argparse.Namespace], str]


def check_layout(
    args: argparse.Namespace, pattern: Pattern, sizes: Sizes, experts: int
) -> list[int]:
    """Return the ep sizes to plan for: those typed, or the powers of 2 that go.

    `experts` are those of the largest layer, 0 for none. Fills in --pp where it is not typed.
    Raises ConfigError for a layout that sizes or GPUs do not allow.
    """
    if args.pp is None:
        args.pp = len(pattern.segments)
    rules = _rules(pattern, sizes)
    _check_numbers(args, rules, experts)
    for rule in rules:
        if not rule.goes(args):
            use = _use(args, rule, rules, experts)
            raise ConfigError(f"{rule.sentence(args)}; use --{rule.name} {use}")
    if experts and sizes.bias and args.etp > 1:
        raise ConfigError(
            f"--etp ({args.etp}) cuts experts, and Megatron cuts none that have biases; use "
            "--disable-bias-linear with it"
        )
    for ep in args.ep or ():
        _check_ep(args, experts, ep)
    if args.ep:
        return list(args.ep)
    powers = (2**n for n in range(max(1, experts).bit_length()))
    return [ep for ep in powers if ep == 1 or legal_ep(args, experts, ep)]


def legal_ep(args: argparse.Namespace, experts: int, ep: int) -> bool:
    """Whether `ep` ranks share the experts, and a stage's GPUs, evenly."""
    return ep >= 1 and max(experts, 1) % ep == 0 and args.gpus // args.pp % (ep * args.etp) == 0


def _check_numbers(args: argparse.Namespace, rules: list[_Rule], experts: int) -> None:
    by_name = {rule.name.replace("-", "_"): rule for rule in rules}
    names = ("gpus", "tp", "pp", "cp", "etp", "micro_batch", "seq_length", "gpu_gb")
    values = {name: getattr(args, name) for name in names}
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if value <= 0:
            alone = sum(each <= 0 for each in values.values()) == 1
            use = 8 if name == "gpus" else 4096 if name == "seq_length" else 1
            if alone and name in by_name:
                use = _use(args, by_name[name], rules, experts)
            raise ConfigError(f"{flag} must be positive; got {value}; use {flag} {use}")
        most = {"micro_batch": MOST_SEQUENCES, "seq_length": 1 << 24, "gpu_gb": 1e6}.get(name, MOST)
        if value > most:
            raise ConfigError(f"{flag} must be at most {most:.9g}; got {value}; use a smaller one")


def _rules(pattern: Pattern, sizes: Sizes) -> list[_Rule]:
    layers = pattern.symbols
    heads = [sizes.num_attention_heads] if set("*+") & set(layers) else []  # tp must divide each
    if "M" in layers:
        heads += [sizes.mamba_num_heads, sizes.mamba_num_groups]
    if "G" in layers:
        heads += [sizes.linear_num_key_heads, sizes.linear_num_value_heads]
    heads += [sizes.ffn_hidden_size] if "-" in layers else []

    def tp(args: argparse.Namespace) -> bool:
        groups = sizes.num_query_groups
        even = all(count % args.tp == 0 for count in heads)
        return bool(even and ("*" not in layers or groups % args.tp == 0 or args.tp % groups == 0))

    def cp(args: argparse.Namespace) -> bool:
        if args.cp == 1:
            return bool(args.seq_length % args.tp == 0)
        even = args.seq_length % (2 * args.cp * args.tp) == 0
        if "M" in layers:
            groups = max(1, sizes.mamba_num_groups // args.tp)
            shared = groups % args.cp == 0 or args.cp % groups == 0
            even = even and shared and sizes.mamba_num_heads // args.tp % args.cp == 0
        if "G" in layers:
            even = even and sizes.linear_num_key_heads % (args.tp * args.cp) == 0
        return bool(even)

    def etp(args: argparse.Namespace) -> bool:
        per_stage = args.gpus // args.pp
        return bool(sizes.moe_ffn_hidden_size % args.etp == 0 and per_stage % args.etp == 0)

    cuts = len(pattern.segments)
    return [
        _Rule(
            "tp",
            tp,
            lambda args: f"--tp ({args.tp}) must divide the heads, groups and dense blocks of "
            f"{FLAG} {shown(pattern.text)}",
        ),
        _Rule(
            "seq-length",
            lambda args: args.cp > 1 or args.seq_length % args.tp == 0,
            lambda args: f"--seq-length ({args.seq_length}) must be a multiple of --tp ({args.tp})",
        ),
        _Rule(
            "cp",
            cp,
            lambda args: f"--cp ({args.cp}) must cut the {args.seq_length} tokens of a sequence "
            "into 2*cp*tp equal parts, and the heads of M and G",
        ),
        _Rule(
            "pp",
            lambda args: pattern.can_be_cut(args.pp),
            lambda args: f"--pp ({args.pp}) must divide the {cuts} segments of {FLAG} "
            f"{shown(pattern.text)}, and be above 1"
            if cuts > 1
            else f"--pp ({args.pp}) must divide the {len(pattern.decoder)} layers of {FLAG} "
            f"{shown(pattern.text)}, which has no |",
        ),
        _Rule(
            "gpus",
            lambda args: args.gpus % (args.tp * args.cp * args.pp) == 0,
            lambda args: f"--tp {args.tp}, --cp {args.cp} and --pp {args.pp} take "
            f"{args.tp * args.cp * args.pp} GPUs or a multiple of that; got --gpus {args.gpus}",
        ),
        _Rule(
            "etp",
            etp,
            lambda args: f"--etp ({args.etp}) must divide the {args.gpus // args.pp} GPUs of a "
            f"pipeline stage and the {sizes.moe_ffn_hidden_size} rows of an expert",
        ),
    ]  # fmt: skip


def _use(args: argparse.Namespace, rule: _Rule, rules: list[_Rule], experts: int) -> int:
    """Return a size that makes the whole line go; where none does, one that keeps this rule."""
    name = rule.name.replace("-", "_")

    def tried(value: int) -> argparse.Namespace:
        return argparse.Namespace(**{**vars(args), name: value})

    def whole(value: int) -> bool:
        line = tried(value)
        shared = all(legal_ep(line, experts, ep) for ep in args.ep or ())
        return shared and all(each.goes(line) for each in rules)

    values = list(_values(args, name))
    goes = next((value for value in values if whole(value)), None)
    return goes or next((value for value in values if rule.goes(tried(value))), 1)


def _values(args: argparse.Namespace, name: str) -> Iterable[int]:
    if name == "gpus":
        step = args.pp * lcm(args.tp * args.cp, *(ep * args.etp for ep in args.ep or [1] if ep > 0))
        return [-(-max(args.gpus, 1) // step) * step]
    if name == "seq_length":
        step = 2 * args.cp * args.tp
        return [-(-max(args.seq_length, 1) // step) * step]
    most = min(int(getattr(args, name)), 1 << 9)
    return [*range(most, 0, -1), *range(most + 1, 1 << 9)]


def _check_ep(args: argparse.Namespace, experts: int, ep: int) -> None:
    if legal_ep(args, experts, ep):
        return
    legal = (n for n in range(min(max(ep, 1), experts), 0, -1) if legal_ep(args, experts, n))
    raise ConfigError(
        f"--ep ({ep}) must divide the {experts} experts of the largest layer, and times --etp "
        f"{args.etp} the {args.gpus // args.pp} GPUs of a pipeline stage; use --ep {next(legal, 1)}"
    )
