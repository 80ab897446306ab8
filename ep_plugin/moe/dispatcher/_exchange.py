"""Uneven all-to-alls under way, with gradients: started in one place and waited for in another.

`Start` and `Wait` are the two halves of one exchange. In the backward `Wait` starts the exchange
back and `Start` waits for it, so that what was computed between the two hides the way back as well.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.kernels import select

WireFormat = Callable[[Tensor], Any]  # rows [P, H] to Rows8 or Blocks8


def wire_format_of(config: MoEConfig) -> WireFormat | None:
    """Return what rounds rows [P, H] to e4m3 as the experts' recipe would; None for bf16."""
    if config.dispatch_dtype != "fp8":
        return None
    return partial(_round, "quantize_rows" if config.fp8 == "rowwise" else "quantize_blocks")


def _round(quantize: str, rows: Tensor) -> Any:
    return getattr(select(rows), quantize)(rows)


class Splits(NamedTuple):
    """Rows an exchange moves."""

    sent: list[int]  # to each rank of the group
    received: list[int]  # from each rank of the group


class Exchange:
    """An uneven all-to-all along dim 0, under way; its way back is the one with splits swapped."""

    def __init__(self, splits: Splits, group: dist.ProcessGroup) -> None:
        self.splits, self.group = splits, group
        self.works: list[Any] = []  # dist.Work
        self.received: Tensor | None = None
        self.record: Any = None  # Rows8 or Blocks8, as it arrives, of an exchange in e4m3

    def out(self, rows: Tensor) -> Tensor:
        """Send `rows` [P, ...]; what is returned stands for what is received [N, ...]."""
        return self.start(rows, self.splits)

    def start(self, rows: Tensor, splits: Splits) -> Tensor:
        """Send `rows`; read the tensor that is returned only after `wait`."""
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
    """An exchange of rows in e4m3 with their scales; the way back is of gradients as they are."""

    def __init__(self, splits: Splits, group: dist.ProcessGroup, wire_format: WireFormat) -> None:
        super().__init__(splits, group)
        self.wire_format = wire_format

    def out(self, rows: Tensor) -> Tensor:
        sent = self.wire_format(rows)
        data = self.start(sent.data.view(torch.uint8), self.splits)  # not all backends have e4m3
        scale = self.start(sent.scale, self.splits)
        self.record = type(sent)(data.view(sent.data.dtype), scale)
        return rows.new_zeros(()).expand(data.shape)


class Start(torch.autograd.Function):
    """Start an exchange of `rows`, and return them; backward waits for the exchange back.

    With `Wait` behind it: the rows [P, ...] that go in have the shape of the gradients that come
    back, so what autograd computes between the two backwards runs while gradients travel.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.received = exchange.out(rows)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.wait()
        return grads[0], None


class Wait(torch.autograd.Function):
    """Wait for an exchange and return what was received; backward starts the exchange back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        received, exchange.received = exchange.received, None
        assert received is not None
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        exchange: Exchange = ctx.exchange
        sent, received = exchange.splits
        return exchange.start(grads[0], Splits(sent=received, received=sent)), None


def exchange(rows: Tensor, splits: Splits, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Start the exchange of `rows` [P, ...]; the function returned waits for what is received."""
    under_way = Exchange(splits, group)
    rows = Start.apply(rows, under_way)
    return lambda: Wait.apply(rows, under_way)


def exchange_tokens(
    rows: Tensor, splits: Splits, group: dist.ProcessGroup, wire_format: WireFormat | None
) -> Callable[[], tuple[Tensor, Any]]:
    """Do as `exchange`; with a `wire_format` the rows as they travelled are returned too."""
    under_way = Exchange(splits, group)
    if wire_format is not None:
        under_way = Exchange8(splits, group, wire_format)
    rows = Start.apply(rows, under_way)
    return lambda: (Wait.apply(rows, under_way), under_way.record)
