"""Dispatch on one rank: sort by expert, no communication."""

from typing import NamedTuple

from torch import Tensor

from ep_plugin.config import ConfigError, MoEConfig
from ep_plugin.contracts import Dispatched, Pending, Routing
from ep_plugin.dispatcher._permute import expert_order, permute, unpermute
from ep_plugin.groups import ExpertGroups


class _Handle(NamedTuple):
    order: Tensor  # [R]
    num_tokens: int
    topk: int


class LocalDispatcher:
    """All experts are here: dispatch is a permutation and combine its transpose.

    Host syncs: one per dispatch, to leave dropped choices out.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def start_dispatch(self, hidden: Tensor, routing: Routing) -> Pending[Dispatched]:
        num_tokens, topk = routing.expert_ids.shape
        num_rows = int(routing.tokens_per_expert.sum())
        order = expert_order(routing.expert_ids, self.num_experts)[:num_rows]  # [R]
        inbox = Dispatched(
            rows=permute(hidden, order, topk),
            probs=routing.probs.flatten()[order],
            tokens_per_expert=routing.tokens_per_expert,
            handle=_Handle(order, num_tokens, topk),
        )
        return Pending(lambda: inbox)

    def start_combine(self, rows: Tensor, inbox: Dispatched) -> Pending[Tensor]:
        handle: _Handle = inbox.handle
        output = unpermute(rows, handle.order, handle.num_tokens, handle.topk)
        return Pending(lambda: output)


def build(config: MoEConfig, groups: ExpertGroups) -> LocalDispatcher:
    """Return the dispatcher; raises ConfigError when the experts are spread over ranks."""
    if groups.ep_etp_size != 1:
        raise ConfigError(
            f"dispatcher 'local' needs ep*etp = 1; got ep = {groups.ep_size}, "
            f"etp = {groups.etp_size}; dispatcher 'alltoall' would do"
        )
    return LocalDispatcher(config.num_experts)
