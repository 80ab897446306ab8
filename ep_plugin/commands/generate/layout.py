"""How the ranks of `ep-plugin generate` are laid out; every refusal, before any is started."""

import argparse
from dataclasses import dataclass
from math import lcm

from ep_plugin.errors import ConfigError, largest_divisor

MOST_RANKS = 1 << 12


@dataclass(frozen=True)
class Ranks:
    """The degrees of parallelism; dense parts that are not cut are held by every rank alike."""

    tp: int
    ep: int
    etp: int
    experts: int  # of the largest layer

    @property
    def world(self) -> int:
        return lcm(self.tp, self.ep * self.etp)

    def sentence(self) -> str:
        """Return how the experts are sliced."""
        return (
            f"{self.ep * self.etp} ranks for {self.experts} experts: each expert is cut into "
            f"{self.etp} slices, on ranks {self.ep} apart (--ep {self.ep} --etp {self.etp})"
        )


def layout_of(args: argparse.Namespace, model: argparse.Namespace) -> Ranks:
    """Return the layout; raises ConfigError for one that this model cannot have."""
    for name in ("tp", "ep", "etp", "pp"):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= MOST_RANKS:
            raise ConfigError(
                f"--{name} must be from 1 to {MOST_RANKS}; got {value}; use --{name} 1"
            )
    if args.pp > 1:
        raise ConfigError(
            f"--pp ({args.pp}) is not served: a token would wait for each stage in turn; use --tp "
            "or --ep"
        )
    _check_tp(args.tp, model)
    counts = _experts(model)
    if not counts:
        for name in ("ep", "etp"):
            if (getattr(args, name) or 1) > 1:
                raise ConfigError(
                    f"--{name} ({getattr(args, name)}) is about experts, and this model has none; "
                    "use --tp"
                )
        return Ranks(args.tp, 1, 1, 0)
    return _with_experts(args, model, counts)


def _with_experts(args: argparse.Namespace, model: argparse.Namespace, counts: list[int]) -> Ranks:
    most, ep, etp = max(counts), args.ep, args.etp
    if etp is None and ep > most:
        if ep % most:
            raise ConfigError(
                f"--ep ({ep}) is more ranks than the {most} experts of a layer, and its surplus "
                f"does not slice them evenly; use --ep {ep - ep % most}"
            )
        ep, etp = most, ep // most
    if most % ep:
        raise ConfigError(
            f"--ep ({ep}) must divide the number of experts ({most}); use "
            f"--ep {largest_divisor(most, ep)}"
        )
    ffn = getattr(model, "moe_ffn_hidden_size", None) or model.ffn_hidden_size
    if ffn % (etp or 1):
        fits = largest_divisor(ffn, etp)
        raise ConfigError(
            f"an expert of {ffn} channels cannot be cut into {etp} slices; use "
            + (f"--etp {fits}" if args.etp else f"--ep {ep * fits}")
        )
    return Ranks(args.tp, ep, etp or 1, most)


def _experts(model: argparse.Namespace) -> list[int]:
    """Return the experts of the layers that have some, in no order."""
    count = getattr(model, "num_experts", None)
    counts = getattr(model, "ep_experts_per_layer", None) or ([count] if count else [])
    return sorted({int(each) for each in counts})


def _check_tp(tp: int, model: argparse.Namespace) -> None:
    groups = model.num_attention_heads
    if getattr(model, "group_query_attention", False):
        groups = model.num_query_groups
    sizes = {
        "attention heads": model.num_attention_heads,
        "query groups": groups,
        "channels of the FFN": model.ffn_hidden_size,
        "rows of the vocabulary": model.padded_vocab_size,
    }
    for what, size in sizes.items():
        if size % tp:
            raise ConfigError(
                f"--tp ({tp}) must divide the {size} {what}; use --tp {_fits(tp, sizes)}"
            )


def _fits(tp: int, sizes: dict[str, int]) -> int:
    return next(d for d in range(tp, 0, -1) if not any(size % d for size in sizes.values()))
