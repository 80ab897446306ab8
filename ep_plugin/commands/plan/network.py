"""How long the exchanges of a layer take, and how much of that a schedule can hide.

Assumptions, each of them optimistic unless said otherwise:

- Every token chooses `topk` distinct experts of `experts`, all alike; `imbalance` multiplies what
  the busiest rank sends, and everybody waits for it.
- Ranks fill one NVLink domain after another; experts are divided evenly over the ranks.
- A rank sends to its domain and to the others at once, each at the full rate of its links; links
  are full duplex, and so is the network between domains (rail-optimised InfiniBand, nowhere
  oversubscribed).
- An exchange starts after `base_us`, and each message to another domain takes `message_us` more.
- `symm_mem` and its swaps copy what arrives once more, out of the buffers, at `copy_gbps`.
- Four exchanges make a step: dispatch, combine, and their gradients', which travel as combine does.
- Chunks are equal, and neither copies nor products slow each other down.
"""

from dataclasses import dataclass
from math import comb
from typing import Annotated

from ep_plugin.errors import ConfigError
from ep_plugin.moe.config import Experts, Size
from ep_plugin.moe.parallel import Ranks
from ep_plugin.moe.routing_config import Tokens
from ep_plugin.typed import Typed, Within

Rate = Annotated[float, Within(1e-6, 1e9, "positive and finite")]
Microseconds = Annotated[float, Within(0.0, 1e9, "finite and not negative")]
Few = Annotated[int, Within(1, 1024)]  # choices of a token: their combinations are counted
Bytes = Annotated[float, Within(0.01, 16.0, "a number of bytes", "2.0")]
Imbalance = Annotated[float, Within(1.0, 1e6, "the busiest rank's load over the mean, 1 at least")]


@dataclass(frozen=True)
class Network(Typed):
    """What connects the ranks; rates are those leaving one GPU, in GB/s."""

    domain: Ranks  # GPUs that share NVLink
    nvlink_gbps: Rate = 250.0  # what NCCL's all-to-all reached between two H100s
    rail_gbps: Rate = 45.0  # of a 400 Gb/s adapter
    base_us: Microseconds = 40.0  # what the same measurements leave beside their bytes
    message_us: Microseconds = 1.0
    # of dispatcher symm_mem in a CUDA graph, from two H100s too: its kernels' stores, on 32 SMs ...
    store_gbps: Rate = 310.0
    store_us: Microseconds = 60.0
    # ... the copy engines' swaps, under `chunked` ...
    engine_gbps: Rate = 380.0
    engine_us: Microseconds = 30.0
    copy_gbps: Rate = 2600.0  # ... and memory that is read and written


NETWORKS = {
    "nvlink8": Network(domain=8),  # one adapter for each GPU between hosts of 8
    # the fifth generation, scaled from the above
    "nvlink72": Network(domain=72, nvlink_gbps=600.0, store_gbps=740.0, engine_gbps=910.0),
}
HOWS = ("flat", "dedup", "hierarchical")
ONE_DOMAIN = ("symm_mem", "swaps")  # ways to send that end at its border


@dataclass(frozen=True)
class Traffic(Typed):
    """What one layer of one rank exchanges."""

    tokens: Tokens
    topk: Few
    hidden: Size
    experts: Experts
    dispatch_bytes: Bytes = 2.0  # of a value on its way there; 1 for e4m3, and scales beside it
    combine_bytes: Bytes = 2.0
    imbalance: Imbalance = 1.0  # of the busiest rank, over the mean


@dataclass(frozen=True)
class Load:
    """Bytes that leave a rank in one exchange, and its messages to other domains."""

    inside: float  # over NVLink
    outside: float
    messages: int
    copied: float = 0.0  # in this rank's memory, read and written


def load(traffic: Traffic, network: Network, ep: int, how: str, value_bytes: float) -> Load:
    """Return what leaves a rank; `how` is one of HOWS and ONE_DOMAIN.

    flat            a row for each choice
    dedup           a row for each rank that hosts any of a token's experts
    hierarchical    a row for each domain that hosts any, to the rank of the same place there, which
                    passes it on inside
    symm_mem        as dedup, a domain's ranks alone, by stores into each other's buffers
    swaps           all tokens to all ranks of a domain: copy engines move whole blocks

    Raises ConfigError when the ranks do not divide the experts, or domains the ranks, and for
    ranks of several domains where the way ends at a domain's border.
    """
    near = min(network.domain, ep)  # ranks of a domain
    _check(traffic, ep, network.domain)
    if how in ONE_DOMAIN and ep > near:
        raise ConfigError(
            f"{how} needs all ranks (ep = {ep}) in one NVLink domain ({near}); use <ep={near}>"
        )
    row, domains = traffic.tokens * traffic.hidden * value_bytes * traffic.imbalance, ep // near
    if how == "flat":
        each = row * traffic.topk / ep
        return Load(each * (near - 1), each * (ep - near), ep - near)
    chosen = _any_of(traffic, traffic.experts // ep)  # that a token goes to a given rank
    if how == "swaps":
        sent = row * (near - 1)
        return Load(sent, 0.0, 0, copied=2 * sent)
    if how == "symm_mem":  # its own tokens are in the buffers too
        return Load(row * chosen * (near - 1), 0.0, 0, copied=2 * row * chosen * near)
    if how == "dedup":
        return Load(row * chosen * (near - 1), row * chosen * (ep - near), ep - near)
    if how != "hierarchical":
        raise ConfigError(f"how must be one of {', '.join((*HOWS, *ONE_DOMAIN))}; got {how!r}")
    crossing = row * _any_of(traffic, near * traffic.experts // ep) * (domains - 1)
    return Load(row * chosen * (near - 1) * domains, crossing, domains - 1)


def goes(experts: int, ep: int, domain: int) -> bool:
    """Whether `ep` ranks share the experts evenly, and fill the NVLink domains they take."""
    return ep >= 1 and experts % ep == 0 and (ep <= domain or ep % domain == 0)


def _check(traffic: Traffic, ep: int, domain: int) -> None:
    if goes(traffic.experts, ep, domain):
        return
    if ep < 1:
        raise ConfigError(f"<ep> must be positive; got {ep}; use <ep=1>")
    legal = next(
        (n for n in range(min(ep, traffic.experts), 0, -1) if goes(traffic.experts, n, domain)), 1
    )
    if traffic.experts % ep:
        raise ConfigError(
            f"<ep> ({ep}) must divide <experts> ({traffic.experts}); use <ep={legal}>"
        )
    raise ConfigError(
        f"<ep> ({ep}) must be a multiple of the NVLink domain ({domain}); use <ep={legal}>"
    )


def received(traffic: Traffic, ep: int, dedup: bool) -> float:
    """Return the rows a rank receives in one dispatch, its own among them; loads are even."""
    if not dedup:
        return float(traffic.tokens * traffic.topk)
    return traffic.tokens * ep * _any_of(traffic, traffic.experts // ep)


def _any_of(traffic: Traffic, experts: int) -> float:
    """Return the probability that any of a token's choices is among so many experts."""
    none = comb(traffic.experts - experts, traffic.topk) / comb(traffic.experts, traffic.topk)
    return 1.0 - none


def exchange_ms(load: Load, network: Network, how: str) -> float:
    """Return the milliseconds of one exchange; hierarchical is one after the other."""
    near, far = (
        load.inside / network.nvlink_gbps * 1e-6,
        load.outside / network.rail_gbps * 1e-6 + load.messages * network.message_us * 1e-3,
    )
    if load.inside == load.outside == 0:
        return 0.0
    if how in ONE_DOMAIN:
        stores = how == "symm_mem"
        rate = network.store_gbps if stores else network.engine_gbps
        base = network.store_us if stores else network.engine_us
        return load.inside / rate * 1e-6 + load.copied / network.copy_gbps * 1e-6 + base * 1e-3
    both = near + far if how == "hierarchical" else max(near, far)
    return both + network.base_us * 1e-3


def hidden_share(exchange: float, compute: float, chunks: int) -> float:
    """Return the part (0..1) of a step's exchange time that chunks hide under its compute time.

    While a chunk is computed another is exchanged; what cannot be hidden is the first dispatch and
    the last combine, or, where exchanges take longer, all but the compute of the other chunks.
    """
    if exchange == 0:
        return 1.0
    together = max(compute + exchange / chunks, exchange + compute / chunks)
    return (exchange + compute - together) / exchange


@dataclass(frozen=True)
class Forecast:
    """A step of one layer on `ep` ranks; milliseconds."""

    ep: int
    how: str
    exchange_ms: float  # all four
    compute_ms: float
    hidden_share: float
    step_ms: float
    inside_mib: float  # leaving a rank in a dispatch
    outside_mib: float


def forecast(
    traffic: Traffic, network: Network, ep: int, how: str, compute_ms: float, chunks: int
) -> Forecast:
    """Return the step of a layer whose compute takes `compute_ms`, in `chunks` chunks."""
    there = load(traffic, network, ep, how, traffic.dispatch_bytes)
    back = load(traffic, network, ep, how, traffic.combine_bytes)
    total = exchange_ms(there, network, how) + 3 * exchange_ms(back, network, how)
    share = hidden_share(total, compute_ms, chunks)
    return Forecast(
        ep,
        how,
        total,
        compute_ms,
        share,
        compute_ms + total * (1 - share),
        there.inside / 2**20,
        there.outside / 2**20,
    )
