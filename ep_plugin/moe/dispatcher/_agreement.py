"""Checks that all ranks are at the same call, before tokens move; without them a rank may hang.

The ranks of a group gather a few numbers: what each is about to send, and whether it failed. Every
rank sees all of them. So all raise the same error at the same place, and the launcher can end the
job.

A check costs a small collective and a host sync. So by default only the first dispatches of a layer
are checked: ranks that agreed for so long seldom disagree later.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ep_plugin.moe.config import CheckSplits

FIRST_CALLS = 8  # dispatches of a layer that are checked with check_splits = first
_FAILED = -1  # what a failed rank sends instead of each number


class RanksDisagree(RuntimeError):
    """Ranks of one expert group are not at the same call, or one of them failed."""


class Agreement:
    """The checks of one dispatcher; all ranks of `group` must make them equally often."""

    def __init__(self, group: dist.ProcessGroup, checks: CheckSplits) -> None:
        self.group, self.checks = group, checks
        self.calls = 0
        self._asked: tuple[int, torch.device] | None = None  # count of numbers, device

    @property
    def checking(self) -> bool:
        """Whether the current dispatch is checked."""
        return self.checks == "always" or (self.checks == "first" and self.calls <= FIRST_CALLS)

    def begin(self, device: torch.device, **facts: int) -> None:
        """Count a dispatch; raise RanksDisagree on all ranks unless `facts` are equal on all."""
        self.calls += 1
        if self.checking:
            self._asked = len(facts) + 1, device
            self._compare({"call": self.calls, **facts})

    def begin_dispatch(
        self, hidden: Tensor, expert_ids: Tensor, num_experts: int, **facts: int
    ) -> None:
        """Do what `begin` does, also with the sizes that every dispatch must have alike.

        `hidden` is [T, H], `expert_ids` [T, K] int64.
        """
        facts = {"choices of a token": expert_ids.shape[1], "experts": num_experts, **facts}
        facts |= {"the hidden size": hidden.shape[1], "bytes of a value": hidden.element_size()}
        self.begin(expert_ids.device, **facts)

    def before_combine(self) -> None:
        """Raise RanksDisagree on all ranks if one of them failed since the dispatch."""
        if self.checking and self._asked is not None:
            self._compare({f"fact {i}": self.calls for i in range(self._asked[0])})

    def fail(self) -> None:
        """Tell the other ranks that this one failed; they learn it in `before_combine`."""
        if self.checking and self._asked is not None:
            self._gather([_FAILED] * self._asked[0])

    def _compare(self, facts: dict[str, int]) -> None:
        everyone = self._gather(list(facts.values()))
        failed = [rank for rank, values in enumerate(everyone) if _FAILED in values]
        if failed:
            raise RanksDisagree(
                f"rank {_list(failed)} of the {len(everyone)} of the expert group failed between "
                f"dispatch and combine (call {self.calls}); its own error says why"
            )
        for name, values in zip(facts, zip(*everyone, strict=True), strict=True):
            if len(set(values)) > 1:
                raise RanksDisagree(
                    f"the ranks of an expert group must agree on {name} before tokens move; got "
                    f"{_list(list(values))} from ranks 0 .. {len(values) - 1}"
                )

    def _gather(self, numbers: list[int]) -> list[list[int]]:
        assert self._asked is not None
        mine = torch.tensor(numbers, dtype=torch.int64, device=self._asked[1])
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(everyone, mine, group=self.group)
        gathered: list[list[int]] = torch.stack(everyone).tolist()  # the host sync
        return gathered


def agreement(group: dist.ProcessGroup, checks: CheckSplits) -> Agreement | None:
    """Return the checks of one dispatcher; None if nothing is ever checked."""
    return None if checks == "off" else Agreement(group, checks)


def _list(values: list[int]) -> str:
    return ", ".join(map(str, values))
