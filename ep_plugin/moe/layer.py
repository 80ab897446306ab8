"""READ SECOND: the Mixture-of-Experts block, four verbs in a row.

Route here; dispatch, experts, combine in `overlap/_in_order.py`, and in other orders beside it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ep_plugin.errors import ConfigError
from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.experts.experts import Experts
from ep_plugin.moe.groups import ExpertGroups
from ep_plugin.moe.interfaces import Dispatcher, Router, Routing, Schedule
from ep_plugin.moe.parallel import check_experts_over_ranks
from ep_plugin.moe.replicas import OncePerReplica
from ep_plugin.registry import resolve

InitMethod = Callable[[Tensor], object]


def init_normal(weight: Tensor) -> Tensor:
    """Fill `weight` in place from N(0, 0.02)."""
    return nn.init.normal_(weight, std=0.02)


class MoELayer(nn.Module):
    """Route, dispatch, experts, combine: a feed-forward block whose experts live on `groups.ep`.

    Without `groups` all experts are on this rank. The router is replicated: give it the gradient
    reduction of the dense parameters; experts are averaged over `groups.edp` alone. `init_method`
    fills every weight (None leaves them uninitialised for the caller to fill). `shared_expert`, a
    module of the caller's, sees every token; `config.shared_expert` says how its output is merged.

    Raises ConfigError when the experts do not divide over the ranks or an option's name is unknown.
    """

    def __init__(
        self,
        config: MoEConfig,
        groups: ExpertGroups | None = None,
        *,
        shared_expert: Callable[[Tensor], Tensor] | None = None,
        init_method: InitMethod | None = init_normal,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        groups = groups if groups is not None else ExpertGroups()
        check_experts_over_ranks(config.num_experts, groups.ep_size)
        self.config = config
        self.groups = groups
        self.router: Router = resolve("router", config.router)(config, groups, device, dtype)
        self.dispatcher: Dispatcher = resolve("dispatcher", pick_dispatcher(config, groups))(
            config, groups
        )
        if groups.replicas is not None:
            self.dispatcher = OncePerReplica(self.dispatcher, groups.replicas)
        self.experts = Experts(config, groups, device=device, dtype=dtype)
        self.shared_expert = shared_expert
        self.schedule: Schedule = resolve("overlap", config.overlap)(config, self)
        self.coefficient = _coefficient(config, shared_expert, device, dtype)
        if init_method is not None:
            self.reset_parameters(init_method)

    def reset_parameters(self, init_method: InitMethod) -> None:
        """Fill each weight matrix with `init_method`, expert by expert, and biases with zeros.

        A shared expert is left as it is.
        """
        for name, parameter in self.named_parameters():
            if name.startswith("shared_expert."):
                continue
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
                continue
            matrices = parameter.unbind(0) if parameter.dim() == 3 else (parameter,)
            for matrix in matrices:
                init_method(matrix.data)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return [S, B, H] for `hidden` [S, B, H], or [T, H], one sequence, for [T, H].

        Every rank of the expert group must call it. Sequences matter to routing alone: losses per
        sequence, and who comes first when an expert is full.
        """
        routing = self.route(hidden)
        hidden = routing.onward(hidden)
        routed, shared = self.schedule(self, hidden, routing)
        return self.merge(routed, shared, hidden)

    def route(self, hidden: Tensor) -> Routing:
        """Route `hidden` [S, B, H], or [T, H], one sequence."""
        num_sequences = hidden.shape[-2] if hidden.dim() > 2 else 1
        tokens = hidden.reshape(-1, hidden.shape[-1])  # [T, H]
        return self.router(tokens, num_sequences)

    def merge(self, routed: Tensor, shared: Tensor | None, hidden: Tensor) -> Tensor:
        """Return `routed` [T, H], shaped as `hidden`, and `shared` in one.

        They are added, or weighed as DeepSpeed-MoE's residual expert (arXiv:2201.05596, 4.1).
        """
        routed = routed.view_as(hidden)
        if shared is None:
            return routed
        if self.coefficient is None:
            return routed + shared
        logits: Tensor = self.coefficient(hidden)
        parts = logits.float().softmax(dim=-1).to(routed.dtype)  # [..., 2]
        return routed * parts[..., :1] + shared * parts[..., 1:]


def _coefficient(
    config: MoEConfig,
    shared_expert: Callable[[Tensor], Tensor] | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Linear | None:
    """Return the learned coefficient [2, H] with its bias, where the configuration asks for it."""
    if config.shared_expert == "sum":
        return None
    if shared_expert is None:
        raise ConfigError(
            "shared_expert = learned weighs the routed experts against a shared one, and there is "
            "none; use shared_expert = sum"
        )
    return nn.Linear(config.hidden_size, 2, device=device, dtype=dtype)


def pick_dispatcher(config: MoEConfig, groups: ExpertGroups) -> str:
    """Return the dispatcher `auto` stands for: `local` on one rank, `alltoall` on several."""
    if config.dispatcher != "auto":
        return config.dispatcher
    return "local" if groups.ep_etp_size == 1 else "alltoall"
