"""Dispatch on one rank: every expert is here, so nothing moves."""

from torch import Tensor

from ep_plugin.errors import ConfigError
from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.groups import ExpertGroups
from ep_plugin.moe.interfaces import Dispatched, Pending, Routing


class LocalDispatcher:
    """Dispatch and combine are the identity; the experts read their tokens where they lie.

    Host syncs: none.
    """

    def start_dispatch(self, hidden: Tensor, routing: Routing) -> Pending[Dispatched]:
        inbox = Dispatched(
            hidden, routing.expert_ids, routing.probs, routing.tokens_per_expert, handle=None
        )
        return Pending(lambda: inbox)

    def start_combine(self, outbox: Tensor, inbox: Dispatched) -> Pending[Tensor]:
        return Pending(lambda: outbox)


def build(config: MoEConfig, groups: ExpertGroups) -> LocalDispatcher:
    """Return the dispatcher; raises ConfigError when the experts are spread over ranks."""
    if groups.ep_etp_size != 1:
        raise ConfigError(
            f"<dispatcher=local> needs ep*etp = 1; got <ep={groups.ep_size}>, "
            f"<etp={groups.etp_size}>; use <dispatcher=alltoall>"
        )
    return LocalDispatcher()
