"""READ FIRST: the words, the records and the protocols everything else is written in.

Shape legend, used in every comment of the package:

    T  tokens on this rank          E  experts of the layer         K  choices per token (top-k)
    H  hidden size                  e  experts on this rank         R  rows of the experts
    F  FFN size of one expert       G  ranks a dispatcher talks to  N  tokens this rank received
                                    C  choices of each of them      P  tokens this rank sends

One token's path, for 2 ranks x 2 local experts and top-1; rank 0 holds tokens a b c, rank 1 d e:

                          rank 0                    rank 1
    hidden                a b c                     d e
    router chooses        a->E2 b->E0 c->E3         d->E0 e->E2
    sort by rank          b | a c                   d | e           (| divides destination ranks)
    dispatch              b d                       a c e           (rank 0's first)
    experts               E0: b d   E1: -           E2: a e   E3: c (sorted by expert, and back)
    combine               a b c                     d e             (the way back, transposed)

Read as matrices over all ranks, dispatch is a 0/1 matrix D and combine is its transpose; so the
backward of each is the forward of the other. Probabilities are applied once, between the two, by
the experts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ep_plugin.moe.groups import ExpertGroups


@dataclass(frozen=True)
class Routing:
    """Where each token of this rank goes."""

    expert_ids: Tensor  # [T, K] int64, -1 = dropped
    probs: Tensor  # [T, K] fp32 (fp64 when asked), 0 = dropped; gradient flows to the router
    tokens_per_expert: Tensor  # [E] int64, choices of this rank that are not dropped
    losses: Mapping[str, Tensor] = field(default_factory=dict)  # [] each, detached, no coefficient
    # Sums over tokens, [] each: all that router/_metrics.py names, or none.
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None  # [T, H] the tokens routed, to go on with; None: as they came


@dataclass(frozen=True)
class Dispatched:
    """What a rank received for its own experts: tokens, and which of its experts each is for."""

    tokens: Tensor  # [N, H]
    expert_ids: Tensor  # [N, C] int64, local experts 0 .. e-1, -1 = none
    probs: Tensor  # [N, C]
    tokens_per_expert: Tensor  # [e] int64
    handle: Any  # the dispatcher's own; combine needs it
    num_rows: int | None = None  # choices that are not -1, where the host knows
    # Tokens that travelled in e4m3 (Rows8, Blocks8); `tokens` then has no values of its own and
    # stands for them where gradients go.
    tokens8: Any = None


@dataclass(frozen=True)
class Pending[Result]:
    """Communication under way; `wait` finishes it. Call it once."""

    wait: Callable[[], Result]


@dataclass(frozen=True)
class Packed:
    """A dispatch before its tokens leave: how many go where, and what will be known of the others.

    Ranks are those of the dispatcher's group, rank 0's rows first.
    """

    outgoing: Tensor  # [P, H]
    rank: int  # of this process
    sent: list[int]  # rows to each rank, P in all
    received: list[int]  # rows from each rank, N in all
    complete: Callable[[Tensor], Dispatched]  # with the tokens [N, H], received or to be
    choices: list[int] | None = None  # of this rank's experts, in each rank's rows, if known
    # Where each rank gets all P rows, and what comes home is summed to P rows: the probabilities
    # [P, K], with their gradient; that of what `complete` gives is not recorded then.
    probs: Tensor | None = None

    @property
    def to_all(self) -> bool:
        return self.probs is not None


class Router(Protocol):
    """Scores tokens against experts: an nn.Module, the same on every rank.

    An option's `build(config, groups, device, dtype)` returns it, its parameters yet to be filled.
    A router may have two attributes more, which a training loop sets with `set_up_router`:

        attach_loss      of (carrier, loss): returns `carrier` such that the backward also gets the
                         gradient of `loss` [], scaled as the loop scales its own
        collect_metrics  whether somebody reads `Routing.metrics`
    """

    def __call__(
        self, hidden: Tensor, num_sequences: int = 1, padding: Tensor | None = None
    ) -> Routing:
        """Route `hidden` [T, H]; token t is of sequence t % num_sequences.

        `padding` [T] bool, given where a batch has padding, is True for tokens that are to count
        for nothing and go nowhere. A router may leave the parameter out: then it takes no padding.
        """
        ...


class Dispatcher(Protocol):
    """Carries tokens to the ranks that host their experts, and back.

    Every rank of the expert-parallel group must call both, in the same order, also with T = 0. An
    option's `build(config, groups)` returns it. A dispatcher may have `fail()` too, which tells
    ranks that wait that this one failed between the two; see `tell_failure`.
    """

    def start_dispatch(self, hidden: Tensor, routing: Routing) -> Pending[Dispatched]:
        """Send each token of `hidden` [T, H] to its experts. Dropped choices are not sent."""
        ...

    def start_combine(self, outbox: Tensor, inbox: Dispatched) -> Pending[Tensor]:
        """Bring `outbox` [N, H] home and sum per token: [T, H]. Tokens sent nowhere get zeros."""
        ...


@runtime_checkable
class PeerDispatcher(Dispatcher, Protocol):
    """A dispatcher that can also exchange with some ranks at a time: it has these methods.

    Dispatch is pack, swap with every other rank, complete; combine is swap, unpack. All ranks must
    call `swap` for the same pairs in the same order, and forward and backward each with `after` = 0
    first.
    """

    wire_format: Callable[[Tensor], Any] | None  # makes what tokens [P, H] travel as; None: bf16

    def pack(self, hidden: Tensor, routing: Routing) -> Packed:
        """Sort `hidden` [T, H] by destination and exchange numbers, experts, probabilities."""
        ...

    def swap(
        self, outs: Mapping[int, Sequence[Tensor]], ins: Mapping[int, int], after: int
    ) -> Pending[list[Tensor]]:
        """Start sending `outs` to other ranks, matrices with as many rows; no gradient is recorded.

        Returns as many of what comes from others, the rows `ins` says of each, one rank's after
        another's. They may be read until the next exchange, or a swap `after` as many rows or less.
        """
        ...

    def unpack(self, returned: Tensor, inbox: Dispatched) -> Tensor:
        """Sum the rows that came home, `returned` [P, H] as they were packed, per token: [T, H]."""
        ...


class Block(Protocol):
    """What a schedule orders: a layer after its router."""

    groups: ExpertGroups
    dispatcher: Dispatcher
    shared_expert: Callable[[Tensor], Tensor] | None

    @property
    def experts(self) -> Callable[[Dispatched], Tensor]:
        """What sums the choices of each token [N, H], times probability, on this rank."""
        ...

    def in_order(self, hidden: Tensor, routing: Routing) -> tuple[Tensor, Tensor | None]:
        """Dispatch, compute, combine one after another; return what a schedule returns."""
        ...

    def compute(self, inbox: Dispatched) -> Tensor:
        """Return what the experts make of `inbox`: [N, H]; if they fail, waiting ranks are told."""
        ...


class Schedule(Protocol):
    """The order of a layer's verbs; no result depends on it.

    An option's `build(config, block)` returns it; ConfigError when the block cannot do it.
    """

    def __call__(
        self, block: Block, hidden: Tensor, routing: Routing, /
    ) -> tuple[Tensor, Tensor | None]:
        """Return the experts' sums [T, H], and what the shared expert makes of `hidden`."""
        ...


class RoutedBlock(Block, Protocol):
    """A layer with its router, for what runs several calls of it at a time."""

    def route(self, hidden: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Route `hidden` [S, B, H] or [T, H]; `padding_mask` [S, B] or [T], True for padding."""
        ...

    def onward(self, hidden: Tensor, routing: Routing) -> Tensor:
        """Return `hidden`, which was routed, as the layer is to go on with it."""
        ...

    def merge(self, routed: Tensor, shared: Tensor | None, hidden: Tensor) -> Tensor:
        """Return the layer's output, shaped as `hidden`, from what a schedule returns."""
        ...


class GroupedGemm(Protocol):
    """One matrix product per expert over consecutive blocks of rows, and its two gradients.

    `ends` [e] int32 are the rows at which each expert's block ends. Rows behind the last one are
    neither read nor written. `waits_for_host` says whether a product on CUDA copies from the device
    to the host: then a layer cannot be captured in a graph, and `auto` does not take the backend.
    An option's `build(in_features, out_features, dtype)` returns it.
    """

    waits_for_host: bool

    def forward(self, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """Multiply `rows` [R, a], expert-major, by `weight` [e, b, a] transposed: [R, b]."""
        ...

    def dgrad(self, grads: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        """Return the gradient of the rows, `grads` [R, b] times `weight` [e, b, a]: [R, a]."""
        ...

    def wgrad(self, grads: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
        """Return the gradient of the weight, `grads` [R, b] transposed times `rows`: [e, b, a]."""
        ...


def set_up_router(
    router: Router, *, attach_loss: Callable[[Tensor, Tensor], Tensor], collect_metrics: bool
) -> None:
    """Set a router's optional attributes; one without them adds no loss and reports nothing."""
    wanted = {"attach_loss": attach_loss, "collect_metrics": collect_metrics}
    for name, value in wanted.items():
        if hasattr(router, name):
            setattr(router, name, value)


def tell_failure(dispatcher: Dispatcher) -> None:
    """Call a dispatcher's `fail`; without one the other ranks wait until the launcher ends them."""
    getattr(dispatcher, "fail", lambda: None)()


def dispatch(dispatcher: Dispatcher, hidden: Tensor, routing: Routing) -> Dispatched:
    """Start and wait: the serial form of `Dispatcher.start_dispatch`."""
    return dispatcher.start_dispatch(hidden, routing).wait()


def combine(dispatcher: Dispatcher, outbox: Tensor, inbox: Dispatched) -> Tensor:
    """Start and wait: the serial form of `Dispatcher.start_combine`."""
    return dispatcher.start_combine(outbox, inbox).wait()
