"""Expert choice (arXiv:2202.09368): each expert takes the tokens it scores best.

Load is even and no loss is needed, but a token's fate depends on the others of its group, later
ones too: for encoders alone. `MoEConfig` refuses it unless forced.
"""

import torch
from torch import Tensor

from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.groups import ExpertGroups
from ep_plugin.moe.interfaces import Routing
from ep_plugin.moe.router._capacity import capacity, place_by_sequence, room
from ep_plugin.moe.router._gate import Gate


class ExpertChoiceRouter(Gate):
    """Experts choose tokens; column e of the routing is expert e, so K = E.

    Each takes its best `capacity_factor * S / E` of the S tokens of a routing group (rounded as
    `capacity_rounding` says), weighted by the softmax over experts (section 3.1).
    """

    def forward(
        self, hidden: Tensor, num_sequences: int = 1, padding: Tensor | None = None
    ) -> Routing:
        """Route `hidden` [T, H]; token t is of sequence t % num_sequences.

        Tokens of `padding` [T] bool are taken by nobody and count for no capacity.
        """
        logits, hidden = self.logits(hidden)
        scores = logits.softmax(dim=-1)  # [T, E]
        num_tokens, num_experts = scores.shape
        with torch.no_grad():
            taken = torch.zeros_like(scores, dtype=torch.bool)
            place = place_by_sequence(num_tokens, num_sequences, hidden.device)
            listed = place.argsort()  # token at each place
            ranking, takes = scores, None
            if padding is not None:  # behind all others, and below them
                listed = listed[padding[listed].long().argsort(stable=True)]
                ranking = scores.masked_fill(padding.unsqueeze(1), -1.0)
                takes = room(padding, num_experts, 1, self._factor(), self.routing)
            step = self.routing.group_tokens or max(num_tokens, 1)
            for group, start in enumerate(range(0, num_tokens, step)):
                tokens = listed[start : start + step]
                ranked = ranking[tokens].sort(dim=0, descending=True, stable=True).indices
                if takes is None:
                    best = ranked[: self._take(len(tokens))]  # [C, E]; of equals the earlier token
                    taken.scatter_(0, tokens[best], True)
                else:
                    fits = torch.arange(len(tokens), device=hidden.device) < takes[group]
                    taken.scatter_(0, tokens[ranked], fits.unsqueeze(1).expand_as(ranked))
        experts = torch.arange(num_experts, device=scores.device).expand(num_tokens, -1)
        expert_ids = torch.where(taken, experts, -1)
        return Routing(expert_ids, scores * taken, taken.sum(dim=0), hidden=hidden)

    def _take(self, num_tokens: int) -> int:
        return capacity(num_tokens, self.config.num_experts, 1, self._factor(), self.routing)

    def _factor(self) -> float:
        routing = self.routing
        factor = routing.capacity_factor
        if not self.training and routing.eval_capacity_factor is not None:
            factor = routing.eval_capacity_factor
        assert factor is not None
        return factor


def build(
    config: MoEConfig,
    groups: ExpertGroups,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> ExpertChoiceRouter:
    """Return the router for `config`; `MoEConfig` has refused what it has no use for."""
    return ExpertChoiceRouter(config, groups, device, dtype)
