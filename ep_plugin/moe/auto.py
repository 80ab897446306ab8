"""`dispatcher = auto` and `overlap = auto`: what was fastest where it was measured.

    one rank                                        local, serial
    CPU                                             alltoall, serial
    GPUs that reach each other's memory             symm_mem, serial
    the same in a CUDA graph                        symm_mem, chunked, but see `_hides_exchange`
    other GPUs                                      alltoall, serial; de-duplicated, see `_repeats`

Measured on 2 and 4 GPUs of one host, in four shapes: a test holds this against every row of
`benchmarks/results`. Nothing is measured over several hosts; there it goes by bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from ep_plugin.moe.config import GRAPH_RANKS, MoEConfig
from ep_plugin.moe.parallel import Ranks
from ep_plugin.moe.rules import own
from ep_plugin.typed import Typed

# Dispatch is de-duplicated where that sends at most this share of the rows. Measured inside a host
# it was faster at 0.25, as fast at 0.75; between hosts links are slower, and rows count for more.
REPEATS = 0.85


@dataclass(frozen=True)
class Place(Typed):
    """Where a layer runs; the same on all its ranks."""

    ranks: Ranks  # of ep and etp
    cuda: bool
    replicated: bool = False  # ranks of tp hold the same tokens
    # whether buffers that all ranks write into were tried and work; asked only where it matters
    shares_memory: Callable[[], bool] = lambda: False


def settle(config: MoEConfig, place: Place) -> MoEConfig:
    """Return `config` with a dispatcher and a schedule in place of `auto`.

    What is set beside them acts: `dispatch_dedup`, say, is about `alltoall`, so that is taken.
    """
    if config.dispatcher == "auto":
        config = _with_dispatcher(config, place)
    if config.overlap == "auto":
        chunked = _can_chunk(config, place) and _hides_exchange(config)
        config = replace(config, overlap="chunked" if chunked else "serial")
    return config


def wants_shared_memory(config: MoEConfig, place: Place) -> bool:
    """Whether `auto` takes `symm_mem` for `config` where GPUs reach each other's memory.

    Not where nobody says how many tokens there are: then nobody knows how large its buffers become.
    """
    about_alltoall = (
        config.dispatch_dedup is not None
        or config.dispatch_dtype != "bf16"
        or config.check_splits == "always"
    )
    fits = not config.in_graph or place.ranks <= GRAPH_RANKS
    known = config.tokens is not None or config.in_graph
    return place.cuda and fits and known and not about_alltoall and config.overlap != "two_batch"


def _with_dispatcher(config: MoEConfig, place: Place) -> MoEConfig:
    if place.ranks == 1:
        return replace(config, dispatcher="local")
    if wants_shared_memory(config, place) and place.shares_memory():
        return replace(config, dispatcher="symm_mem")
    dedup = config.dispatch_dedup
    if dedup is None and place.cuda and config.overlap != "two_batch":
        dedup = _repeats(config, place.ranks) or None
    return replace(config, dispatcher="alltoall", dispatch_dedup=dedup)


def _repeats(config: MoEConfig, ranks: int) -> bool:
    """Whether a token's choices often share a rank, so that sending it once to each saves rows."""
    if own(config.router) or config.router == "expert_choice":
        return False  # how many choices a token has is not known
    return saves_rows(config.routing.topk, ranks)


def saves_rows(topk: int, ranks: int) -> bool:
    """Whether de-duplicated dispatch sends at most REPEATS of the rows, with experts at random.

    With K of the experts at random on G ranks a token goes to G (1 - (1 - 1/G)^K) of them.
    """
    return ranks * (1 - (1 - 1 / ranks) ** topk) <= REPEATS * topk


def _can_chunk(config: MoEConfig, place: Place) -> bool:
    return config.dispatcher == "symm_mem" and not config.bias and not place.replicated


def _hides_exchange(config: MoEConfig) -> bool:
    """Whether chunks save more than they cost.

    Launched by the host they never did. In a graph they did, but for bf16 experts that are wider
    than a token: products take so long there that moving all tokens to all ranks costs more.
    """
    wide = config.fp8 == "off" and config.ffn_hidden_size > config.hidden_size
    return config.in_graph and not wide
