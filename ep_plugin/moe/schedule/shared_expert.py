"""The shared expert runs while tokens are dispatched; in the backward, while gradients return.

    network   dispatch ........ |                          | combine
    compute   shared expert     | experts                  |

Autograd runs what is ready in the reverse order of the forward. The shared expert was computed
between the start of the dispatch and the wait for it, so its backward runs between the start of the
exchange of token gradients and the wait for that. Either exchange is hidden for as long as the
shared expert runs.
"""

from torch import Tensor

from ep_plugin.errors import ConfigError
from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.interfaces import Block, Routing, Schedule, combine


def beside_dispatch(block: Block, hidden: Tensor, routing: Routing) -> tuple[Tensor, Tensor | None]:
    """Compute the shared expert between the start of the dispatch and the wait for it.

    `hidden` is [S, B, H] or [T, H]. Returns the experts' output [T, H] and the shared expert's, in
    the shape of `hidden`.
    """
    assert block.shared_expert is not None
    tokens = hidden.reshape(-1, hidden.shape[-1])  # [T, H]
    pending = block.dispatcher.start_dispatch(tokens, routing)
    shared = block.shared_expert(hidden)
    inbox = pending.wait()
    del pending  # frees the tokens that were sent
    return combine(block.dispatcher, block.compute(inbox), inbox), shared


def build(config: MoEConfig, block: Block) -> Schedule:
    """Return the schedule; raises ConfigError without a shared expert."""
    if block.shared_expert is None:
        raise ConfigError(
            "<overlap> (shared_expert) computes a shared expert while tokens travel, and there is "
            "none; use <overlap=chunked> or <overlap=serial>"
        )
    return beside_dispatch
