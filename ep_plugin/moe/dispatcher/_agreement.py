"""Whether all ranks still do the same: asked before tokens move, so that nobody waits for ever.

Ranks of a group exchange a few numbers: what they are about to send, and whether they failed. All
see all of them, so all raise the same error at the same place, and the launcher can end the job.
It costs a small collective and a host sync for each exchange, and so is asked in the first calls
alone, unless told otherwise: a program that agrees for so long seldom stops agreeing later.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ep_plugin.moe.config import CheckSplits

FIRST_CALLS = 8  # dispatches of a layer that are checked with check_splits = first
_FAILED = -1  # in place of each number


class RanksDisagree(RuntimeError):
    """Ranks of one expert group are not at the same place, or one of them failed."""


class Agreement:
    """The checks of one dispatcher; every rank of `group` must ask the same number of times."""

    def __init__(self, group: dist.ProcessGroup, checks: CheckSplits) -> None:
        self.group, self.checks = group, checks
        self.calls = 0
        self._asked: tuple[int, torch.device] | None = None  # how many numbers, where

    @property
    def checking(self) -> bool:
        """Whether the dispatch under way is one of those that are checked."""
        return self.checks == "always" or (self.checks == "first" and self.calls <= FIRST_CALLS)

    def begin(self, device: torch.device, **facts: int) -> None:
        """Count a dispatch, and raise RanksDisagree on all ranks unless all have these `facts`."""
        self.calls += 1
        if self.checking:
            self._asked = len(facts) + 1, device
            self._compare({"call": self.calls, **facts})

    def begin_dispatch(
        self, hidden: Tensor, expert_ids: Tensor, num_experts: int, **facts: int
    ) -> None:
        """Do as `begin`, with what every dispatch of `hidden` [T, H] needs alike as well."""
        facts = {"choices of a token": expert_ids.shape[1], "experts": num_experts, **facts}
        facts |= {"the hidden size": hidden.shape[1], "bytes of a value": hidden.element_size()}
        self.begin(expert_ids.device, **facts)

    def before_combine(self) -> None:
        """Raise RanksDisagree on all ranks when one failed since the dispatch."""
        if self.checking and self._asked is not None:
            self._compare({f"fact {i}": self.calls for i in range(self._asked[0])})

    def fail(self) -> None:
        """Tell the others, who are or will be in `before_combine`, that this rank failed."""
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
    """Return the checks of one dispatcher; None where nothing is ever checked."""
    return None if checks == "off" else Agreement(group, checks)


def _list(values: list[int]) -> str:
    return ", ".join(map(str, values))
