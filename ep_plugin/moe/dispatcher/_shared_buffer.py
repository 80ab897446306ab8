"""A buffer on every rank of a group that all ranks of the group read and write directly.

On GPUs it is torch's symmetric memory: each rank maps the other ranks' buffers over NVLink. On CPUs
it is shared memory of the host, so that dispatcher `symm_mem` also runs without a GPU.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _SymmetricMemory
from torch.distributed import _symmetric_memory as symm_mem

from ep_plugin.moe.dispatcher._one_host import check_one_host
from ep_plugin.moe.groups import ExpertGroups
from ep_plugin.moe.kernels.peers_torch import Peers

_PAGE = 2 << 20  # bytes; a buffer's size is a multiple of it


class SharedBuffer:
    """One buffer per rank, shared by all layers and dtypes; it grows when a layer needs more.

    Every rank of `group` must make it at the same time: host names are gathered. Raises ConfigError
    if the ranks are on several hosts.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        check_one_host(group, "symm_mem")
        self.peers: Peers | None = None
        self.num_bytes = 0
        self._barrier: Callable[[], object] = partial(dist.barrier, group)
        self._stream: torch.cuda.Stream | None = None

    def reserve(self, num_bytes: int, device: torch.device) -> Peers:
        """Return buffers of at least `num_bytes`, which must be the same on every rank.

        If they must grow, this waits for all ranks, and their contents are lost.
        """
        if self.peers is None or num_bytes > self.num_bytes:
            self.num_bytes = -(-num_bytes // _PAGE) * _PAGE or _PAGE
            self.peers, self._barrier = None, partial(dist.barrier, self.group)  # freed first
            share = self._share_gpu if device.type == "cuda" else self._share_host
            self.peers = share(device)
        return self.peers

    def barrier(self) -> None:
        """Wait until every rank is here. On a GPU the current stream waits, not the host."""
        self._barrier()

    def beside(
        self, inputs: Sequence[Tensor], work: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        """Run `work` on a second CUDA stream; return its results and `finish`.

        Read the results only after `finish()`, which makes the current stream wait for them.
        `inputs` are the tensors of the current stream that `work` reads. On CPUs `work` runs at
        once.
        """
        if not inputs[0].is_cuda:
            return work(), lambda: None
        if self._stream is None:
            self._stream = torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            results = work()
        for tensor in inputs:  # their memory is not reused before both streams are done with it
            tensor.record_stream(self._stream)
        done = self._stream.record_event()

        def finish() -> None:
            current = torch.cuda.current_stream()
            current.wait_event(done)
            for tensor in results:
                tensor.record_stream(current)

        return results, finish

    def _share_gpu(self, device: torch.device) -> Peers:
        # Like `symm_mem.empty`, but without its memory pool, which would keep the old buffers.
        own = _SymmetricMemory.empty_strided_p2p((self.num_bytes,), (1,), torch.uint8, device)
        handle = symm_mem.rendezvous(own, self.group)
        buffers = [
            own if rank == self.rank else handle.get_buffer(rank, (self.num_bytes,), torch.uint8)
            for rank in range(self.ranks)
        ]
        self._barrier = handle.barrier
        addresses = torch.tensor([buffer.data_ptr() for buffer in buffers], device=device)
        return Peers(tuple(buffers), addresses)

    def _share_host(self, device: torch.device) -> Peers:
        """Map one file in every process; it is unlinked as soon as all have mapped it."""
        first, ranks = dist.get_global_rank(self.group, 0), self.ranks
        folder: list[str | None] = [tempfile.mkdtemp() if self.rank == 0 else None]
        dist.broadcast_object_list(folder, src=first, group=self.group)
        path = Path(str(folder[0])) / "buffers"
        size = ranks * self.num_bytes
        whole = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        dist.barrier(self.group)
        if self.rank == 0:
            shutil.rmtree(path.parent)
        buffers = whole.view(ranks, -1).unbind()
        addresses = torch.tensor([buffer.data_ptr() for buffer in buffers])
        return Peers(tuple(buffers), addresses)


def shared_buffer(groups: ExpertGroups) -> SharedBuffer:
    """Return the buffer of `groups.ep_etp`, the same one for every layer with these `groups`."""
    group = groups.ep_etp
    assert group is not None
    found = groups.shared.get("buffer")
    if found is None or found.group is not group:
        found = groups.shared["buffer"] = SharedBuffer(group)
    return found
