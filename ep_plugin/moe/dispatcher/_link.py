"""How rows get from rank to rank through shared buffers: by kernels, or by copy engines.

    push        barrier, store to all ranks, barrier, copy out of the own buffer
    sum_home    barrier, copy into the own buffer, barrier, read from all ranks
    swap        barrier, copy into the others' buffers, barrier; rows are read in the buffer

All layers share the buffer. The copies out of it and into it free it for the next layer. They read
and write N rows once more in local memory, which is about four times as fast as the link.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ep_plugin.moe.dispatcher._shared_buffer import SharedBuffer
from ep_plugin.moe.interfaces import Pending
from ep_plugin.moe.kernels.peers_torch import Peers, rows_of
from ep_plugin.moe.watch.place import enter_backward, here, leave_backward

_ALIGN = 128  # bytes; each tensor in a buffer starts at a multiple of it


class Sends(NamedTuple):
    place: Tensor  # [T, G] int32, row of each token in each rank's buffer, -1 = not sent
    received: int  # N, rows on this rank; `most` while a CUDA graph is captured
    most: int  # rows that the buffers have room for, the same on every rank
    choices: int | None  # of this rank's experts; None if the host does not know
    came: Tensor | None = None  # [] int64, rows on this rank, if the host does not know


class Link(NamedTuple):
    """The shared buffers of a group, and the ways that rows move through them."""

    buffer: SharedBuffer
    programs: int  # SMs the kernels run on

    def push(self, tensors: Sequence[Tensor], sends: Sends) -> tuple[Tensor, ...]:
        """Send rows of each tensor [T, W]; return those received [N, W], ordered by source rank."""
        ops, offsets, peers = self._begin(tensors, sends)
        for rows, offset in zip(tensors, offsets, strict=True):
            ops.push_rows(rows.contiguous(), peers, offset, sends.place, self.programs)
        self.buffer.barrier()
        own = peers.buffers[self.buffer.rank]
        return tuple(
            rows_of(own, offset, sends.received, rows).clone()
            for rows, offset in zip(tensors, offsets, strict=True)
        )

    def sum_home(self, tensors: Sequence[Tensor], sends: Sends) -> tuple[Tensor, ...]:
        """Send rows of each tensor [N, W] back; return the sum of each token's rows [T, W]."""
        ops, offsets, peers = self._begin(tensors, sends)
        own = peers.buffers[self.buffer.rank]
        for rows, offset in zip(tensors, offsets, strict=True):
            rows_of(own, offset, sends.received, rows).copy_(rows)
        self.buffer.barrier()
        return tuple(
            ops.sum_rows(rows, peers, offset, sends.place, self.programs)
            for rows, offset in zip(tensors, offsets, strict=True)
        )

    def _begin(self, tensors: Sequence[Tensor], sends: Sends) -> tuple[Any, list[int], Peers]:
        """Return the kernels, each tensor's offset in bytes, and the buffers, free on all ranks."""
        *offsets, end = _offsets(tensors, sends.most)
        peers = self.buffer.reserve(end, sends.place.device)
        self.buffer.barrier()
        kernels = "peers" if sends.place.is_cuda else "peers_torch"
        return import_module(f"ep_plugin.moe.kernels.{kernels}"), offsets, peers

    def swap(
        self, outs: Mapping[int, Sequence[Tensor]], ins: Mapping[int, int], after: int
    ) -> Pending[list[Tensor]]:
        """Do `PeerDispatcher.swap` by copy engines; all ranks must swap the same number of rows."""
        buffer = self.buffer
        likes = next(iter(outs.values()))
        num_rows, come = len(likes[0]), sum(ins.values())
        sizes = [_row_bytes(like) for like in likes]
        *bases, _ = self._bases(likes)
        peers = buffer.reserve(0, likes[0].device)

        def move() -> tuple[Tensor, ...]:
            if not after:  # later swaps of a call write to rows that no rank reads any more
                buffer.barrier()
            for slot, (rank, tensors) in enumerate(outs.items()):
                for base, size, rows in zip(bases, sizes, tensors, strict=True):
                    offset = base + (after + slot * num_rows) * size
                    rows_of(peers.buffers[rank], offset, num_rows, rows).copy_(rows)
            buffer.barrier()
            own = peers.buffers[buffer.rank]
            return tuple(
                rows_of(own, base + after * size, come, like)
                for base, size, like in zip(bases, sizes, likes, strict=True)
            )

        came, finish = buffer.beside([t for tensors in outs.values() for t in tensors], move)

        def wait() -> list[Tensor]:
            finish()
            return list(came)

        return Pending(wait)

    def prepare_swaps(self, likes: Sequence[Tensor]) -> None:
        """Make room in the buffers for swaps of matrices like `likes` with every rank."""
        self.buffer.reserve(self._bases(likes)[-1], likes[0].device)

    def _bases(self, likes: Sequence[Tensor]) -> list[int]:
        """Return the byte offset of each matrix of a swap, and the end of the last.

        Each matrix has room for the rows on their way out, then for those on their way home.
        """
        return _offsets(likes, 2 * (self.buffer.ranks - 1) * len(likes[0]))


def _row_bytes(rows: Tensor) -> int:
    return rows.shape[1] * rows.element_size()


def _offsets(likes: Sequence[Tensor], num_rows: int) -> list[int]:
    """Return the byte offsets of matrices of `num_rows` rows like `likes`, and the last's end."""
    sizes = (-(-num_rows * _row_bytes(like) // _ALIGN) * _ALIGN for like in likes)
    return list(accumulate(sizes, initial=0))


class Dispatch(torch.autograd.Function):
    """Send rows of matrices [T, W] as `sends` says; the last is of integers, without gradient."""

    @staticmethod
    def forward(ctx: Any, link: Link, sends: Sends, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.link, ctx.sends, ctx.place = link, sends, here.code
        received = link.push(rows, sends)
        ctx.mark_non_differentiable(received[-1])
        return received

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        enter_backward(ctx.place)
        home = ctx.link.sum_home(grads[:-1], ctx.sends)
        leave_backward(ctx.place)
        return None, None, *home, None


class Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outbox: Tensor, link: Link, sends: Sends) -> Tensor:
        ctx.link, ctx.sends, ctx.place = link, sends, here.code
        return link.sum_home((outbox,), sends)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        enter_backward(ctx.place)
        (pushed,) = ctx.link.push(grads, ctx.sends)
        leave_backward(ctx.place)
        return pushed, None, None
