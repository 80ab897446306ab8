"""Asynchronous uneven all-to-alls with gradients: started in one place, waited for in another.

`Start` and `Wait` are the two halves of one exchange. In the backward `Wait` starts the exchange of
gradients and `Start` waits for it. So the work between the two halves overlaps with the exchange in
the forward, and its backward overlaps with the exchange of gradients.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.kernels import select
from ep_plugin.moe.watch.place import enter_backward, here, leave_backward

WireFormat = Callable[[Tensor], Any]  # rows [P, H] to Rows8 or Blocks8


def wire_format_of(config: MoEConfig) -> WireFormat | None:
    """Return a function that rounds rows [P, H] to e4m3 like the experts' recipe; None for bf16."""
    if config.dispatch_dtype != "fp8":
        return None
    return partial(_round, "quantize_rows" if config.fp8 == "rowwise" else "quantize_blocks")


def _round(quantize: str, rows: Tensor) -> Any:
    return getattr(select(rows), quantize)(rows)


class Splits(NamedTuple):
    """How many rows an exchange moves."""

    sent: list[int]  # to each rank of the group
    received: list[int]  # from each rank of the group


class Exchange:
    """One uneven all-to-all along dim 0; for gradients the splits are swapped."""

    def __init__(self, splits: Splits, group: dist.ProcessGroup) -> None:
        self.splits, self.group = splits, group
        self.place = here.code  # of the layer and phase that it belongs to
        self.works: list[Any] = []  # dist.Work
        self.received: Tensor | None = None
        self.record: Any = None  # Rows8 or Blocks8 received, if the exchange is in e4m3

    def out(self, rows: Tensor) -> Tensor:
        """Start sending `rows` [P, ...]; return what stands for those received [N, ...]."""
        return self.start(rows, self.splits)

    def start(self, rows: Tensor, splits: Splits) -> Tensor:
        """Start sending `rows` [P, ...]; return those received [N, ...], valid after `wait`."""
        received = rows.new_empty(sum(splits.received), *rows.shape[1:])
        self.works.append(
            dist.all_to_all_single(
                received,
                rows.contiguous(),
                splits.received,
                splits.sent,
                group=self.group,
                async_op=True,
            )
        )
        return received

    def wait(self) -> None:
        for work in self.works:
            work.wait()
        self.works = []


class Exchange8(Exchange):
    """An exchange of rows in e4m3 with their scales; gradients travel back in their own dtype."""

    def __init__(self, splits: Splits, group: dist.ProcessGroup, wire_format: WireFormat) -> None:
        super().__init__(splits, group)
        self.wire_format = wire_format

    def out(self, rows: Tensor) -> Tensor:
        sent = self.wire_format(rows)
        data = self.start(sent.data.view(torch.uint8), self.splits)  # not all backends have e4m3
        scale = self.start(sent.scale, self.splits)
        self.record = type(sent)(data.view(sent.data.dtype), scale)
        return rows.new_zeros(()).expand(len(data), *rows.shape[1:])


class Start(torch.autograd.Function):
    """Start an exchange of `rows` [P, ...] and return them; backward waits for their gradients.

    `Wait` takes what this returns. Its backward returns the buffer [P, ...] in which the gradients
    will arrive, and the backward of this function waits until they are there. What autograd runs
    between the two overlaps with the exchange.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.received = exchange.out(rows)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        exchange: Exchange = ctx.exchange
        exchange.wait()
        leave_backward(exchange.place)
        return grads[0], None


class Wait(torch.autograd.Function):
    """Wait for an exchange and return the rows received; backward starts that of gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        here.enter_layer(exchange.place)  # others may have been entered since it was started
        exchange.wait()
        received, exchange.received = exchange.received, None
        assert received is not None
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        exchange: Exchange = ctx.exchange
        sent, received = exchange.splits
        enter_backward(exchange.place)
        return exchange.start(grads[0], Splits(sent=received, received=sent)), None


def exchange(rows: Tensor, splits: Splits, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Start the exchange of `rows` [P, ...]; calling the result waits and returns [N, ...]."""
    under_way = Exchange(splits, group)
    rows = Start.apply(rows, under_way)
    return lambda: Wait.apply(rows, under_way)


def exchange_tokens(
    rows: Tensor, splits: Splits, group: dist.ProcessGroup, wire_format: WireFormat | None
) -> Callable[[], tuple[Tensor, Any]]:
    """Do what `exchange` does; with a `wire_format` the rows travel in e4m3.

    The result waits and returns the rows received [N, H] and their e4m3 record. With a wire format
    the former is a placeholder of zeros that carries gradients; without one the record is None.
    """
    under_way = Exchange(splits, group)
    if wire_format is not None:
        under_way = Exchange8(splits, group, wire_format)
    rows = Start.apply(rows, under_way)
    return lambda: (Wait.apply(rows, under_way), under_way.record)
