"""A router of your own: each token goes to the experts with the best softmax scores."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ep_plugin import ExpertGroups, MoEConfig
from ep_plugin.contracts import Routing


class MyRouter(nn.Module):
    """One linear map; every rank holds the whole of it."""

    def __init__(
        self, config: MoEConfig, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.num_experts, self.topk = config.num_experts, config.routing.topk
        shape = (config.num_experts, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    def forward(self, hidden: Tensor, num_sequences: int = 1) -> Routing:
        """Route `hidden` [T, H]."""
        scores = linear(hidden.float(), self.weight.float()).softmax(dim=-1)  # [T, E]
        probs, expert_ids = scores.topk(self.topk, dim=-1)  # [T, K] each
        counts = expert_ids.flatten().bincount(minlength=self.num_experts)  # [E]
        return Routing(expert_ids, probs, counts)


def build(
    config: MoEConfig,
    groups: ExpertGroups,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> MyRouter:
    """Return the router; the layer, or Megatron, fills its parameters."""
    return MyRouter(config, device, dtype)
