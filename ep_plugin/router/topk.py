"""Top-k softmax router: each token goes to its k best experts.

Logits, softmax and losses are computed in fp32 (or fp64) whatever the model's dtype is, as Switch
Transformer (arXiv:2101.03961, section 2.4) asks.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ep_plugin.config import MoEConfig
from ep_plugin.contracts import Routing
from ep_plugin.groups import ExpertGroups
from ep_plugin.router._losses import add_loss, load_balancing_loss, z_loss


class TopKRouter(nn.Module):
    """A linear gate [E, H], replicated on every rank, and the choice of the k best experts.

    `attach_loss(carrier, loss)` returns `carrier` such that the backward also gets the gradient
    of `loss` [] ; replace it to scale auxiliary losses as your training loop scales its own.
    """

    def __init__(
        self,
        config: MoEConfig,
        groups: ExpertGroups,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.groups = groups
        self.compute_dtype = torch.float64 if config.router_dtype == "fp64" else torch.float32
        shape = (config.num_experts, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))  # [E, H]
        self.bias = (
            nn.Parameter(torch.empty(config.num_experts, device=device, dtype=dtype))
            if config.bias
            else None
        )
        self.attach_loss: Callable[[Tensor, Tensor], Tensor] = add_loss

    def forward(self, hidden: Tensor) -> Routing:
        """Route `hidden` [T, H]. In training all ranks of `groups.tp_cp` must call it together."""
        losses: dict[str, Tensor] = {}
        logits = self._logits(hidden)
        if self._wants(self.config.z_loss_coeff):
            losses["z_loss"] = z_loss(logits)
            share = self.config.z_loss_coeff / self.groups.tp_cp_size
            logits = self.attach_loss(logits, losses["z_loss"] * share)
        probs, expert_ids = self._choose(logits)
        tokens_per_expert = self._count(expert_ids)  # [E]
        if self._wants(self.config.aux_loss_coeff):
            name = "load_balancing_loss"
            losses[name] = load_balancing_loss(logits, tokens_per_expert, self.groups.tp_cp)
            probs = self.attach_loss(probs, losses[name] * self.config.aux_loss_coeff)
        detached = {name: loss.detach() for name, loss in losses.items()}
        return Routing(expert_ids, probs, tokens_per_expert, detached)

    def _logits(self, hidden: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        weight = self.weight.to(self.compute_dtype)
        return F.linear(hidden.to(self.compute_dtype), weight, bias)  # [T, E]

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return probs [T, K] and expert ids [T, K]."""
        if self.config.normalize == "none":
            chosen = logits.softmax(dim=-1).topk(self.config.topk, dim=-1)
            return chosen.values, chosen.indices
        # The softmax of the k chosen logits equals the chosen probs divided by their sum.
        chosen = logits.topk(self.config.topk, dim=-1)
        return chosen.values.softmax(dim=-1), chosen.indices

    def _count(self, expert_ids: Tensor) -> Tensor:
        # torch.bincount would wait for the device to learn its own length.
        counts = expert_ids.new_zeros(self.config.num_experts)
        return counts.scatter_add(0, expert_ids.flatten(), torch.ones_like(expert_ids).flatten())

    def _wants(self, coefficient: float) -> bool:
        # Evaluation and the first pass of activation recomputation have no backward to add a loss
        # to.
        return coefficient > 0 and self.training and torch.is_grad_enabled()


def build(
    config: MoEConfig,
    groups: ExpertGroups,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> TopKRouter:
    """Return the router for `config`."""
    return TopKRouter(config, groups, device, dtype)
