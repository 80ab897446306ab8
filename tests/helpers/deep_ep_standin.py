"""What `deep_ep.Buffer` documents of its kernels for one host, over gloo: it stands in for it.

It proves how the dispatcher uses that interface, and nothing about DeepEP.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

topk_idx_t = torch.int32  # as in builds that ask for it: the dispatcher must convert


class Event:
    """Counts the waits for it."""

    def __init__(self, is_async: bool, waited: list[bool]) -> None:
        self.is_async, self.waited = is_async, waited

    def current_stream_wait(self) -> None:
        assert self.is_async
        self.waited.append(True)


class Buffer:
    """Rows by source rank; names local, -1 for other ranks' experts; sums without weights."""

    made = 0

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int = 0) -> None:
        self.group, self.num_nvl_bytes = group, num_nvl_bytes
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.started: list[str] = []
        self.waited: list[bool] = []
        Buffer.made += 1

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Any:
        return SimpleNamespace(get_nvl_buffer_size_hint=lambda width, ranks: 100 * width * ranks)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Any:
        return SimpleNamespace(get_nvl_buffer_size_hint=lambda width, ranks: 90 * width * ranks)

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Any, ...]:
        assert topk_idx.dtype == topk_idx_t
        assert topk_idx.is_contiguous()
        in_rank = self._hosts(topk_idx, num_experts)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int()
        return in_rank.sum(0).int(), None, per_expert, in_rank, None

    def dispatch(
        self,
        x: Tensor,
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        async_finish: bool = False,
    ) -> tuple[Any, ...]:
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        self.started.append("dispatch" if handle is None else "dispatch again")
        event = Event(async_finish, self.waited)
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            return self._send(x, handle), None, None, None, None, event
        assert topk_idx is not None
        assert topk_weights is not None
        assert topk_weights.dtype == torch.float32
        assert is_token_in_rank is not None
        assert num_tokens_per_rank is not None
        assert num_tokens_per_expert is not None
        received = torch.empty_like(num_tokens_per_rank)
        dist.all_to_all_single(received, num_tokens_per_rank, group=self.group)
        handle = (is_token_in_rank, num_tokens_per_rank.tolist(), received.tolist())
        per_rank = len(num_tokens_per_expert) // self.size
        names = self._send(topk_idx, handle) - self.rank * per_rank
        names = names.where((names >= 0) & (names < per_rank), -1)
        weights = self._send(topk_weights, handle)
        counts = [int((names == expert).sum()) for expert in range(per_rank)]
        return self._send(x, handle), names, weights, counts, handle, event

    def combine(
        self,
        x: Tensor,
        handle: Any,
        topk_weights: Tensor | None = None,
        async_finish: bool = False,
    ) -> tuple[Any, ...]:
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        self.started.append("combine")
        weights = None if topk_weights is None else self._sum(topk_weights, handle)
        return self._sum(x, handle), weights, Event(async_finish, self.waited)

    def _hosts(self, topk_idx: Tensor, num_experts: int) -> Tensor:
        host = torch.where(topk_idx >= 0, topk_idx // (num_experts // self.size), -1)
        return (host.unsqueeze(2) == torch.arange(self.size)).any(1)  # [T, ranks]

    def _send(self, rows: Tensor, handle: Any) -> Tensor:
        in_rank, sent, received = handle
        tokens = in_rank.T.nonzero()[:, 1]  # by destination, then by token
        result = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(result, rows[tokens], received, sent, group=self.group)
        return result

    def _sum(self, rows: Tensor, handle: Any) -> Tensor:
        in_rank, sent, received = handle
        back = rows.new_empty(sum(sent), *rows.shape[1:])
        dist.all_to_all_single(back, rows, sent, received, group=self.group)
        sums = torch.zeros(len(in_rank), *rows.shape[1:])
        return sums.index_add_(0, in_rank.T.nonzero()[:, 1], back.float()).to(rows.dtype)
