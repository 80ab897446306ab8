"""READ SECOND: the Mixture-of-Experts block: route, then dispatch, compute, combine; then merge.

`MoELayer.in_order` runs the three in the middle one after another; schedules (`schedule/`) run them
in other orders.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ep_plugin.errors import ConfigError
from ep_plugin.moe.auto import Place, settle
from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.experts.experts import Experts
from ep_plugin.moe.experts.fits import check_memory
from ep_plugin.moe.groups import ExpertGroups
from ep_plugin.moe.interfaces import Dispatched, Dispatcher, Router, Routing, Schedule, tell_failure
from ep_plugin.moe.parallel import check_experts_over_ranks
from ep_plugin.moe.replicas import OncePerReplica
from ep_plugin.moe.watch.place import Layer, Phase
from ep_plugin.registry import resolve
from ep_plugin.typed import typed
from ep_plugin.untrusted import shown

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

    Raises ConfigError when the experts do not divide over the ranks or do not fit into memory, for
    an option's name that is unknown, and for arguments of other types.
    """

    @typed
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
        empty = _empty(device, dtype)
        check_memory(config, groups, empty.device, empty.dtype)
        config = settled(config, groups, empty.device)
        _check_order(config, groups)
        self.config = config
        self.groups = groups
        self.router: Router = resolve("router", config.router)(config, groups, device, dtype)
        self.dispatcher: Dispatcher = resolve("dispatcher", config.dispatcher)(config, groups)
        if groups.replicas is not None:
            self.dispatcher = OncePerReplica(self.dispatcher, groups.replicas)
        self.experts = Experts(config, groups, device=device, dtype=dtype)
        self.shared_expert = shared_expert
        self.schedule: Schedule = resolve("overlap", config.overlap)(config, self)
        self._routing_checked = False
        self.place = Layer()
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

    def forward(self, hidden: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Return [S, B, H] for `hidden` [S, B, H], or [T, H], one sequence, for [T, H].

        Every rank of the expert group must call it. Sequences matter to routing alone: losses per
        sequence, and who comes first when an expert is full. Tokens at which `padding_mask`, [S, B]
        or [T] bool, is True go to no expert and enter no loss, count or capacity; the routed
        experts' part of their output is 0.
        """
        routing = self.route(hidden, padding_mask)
        hidden = self.onward(hidden, routing)
        routed, shared = self.schedule(self, hidden, routing)
        return self.merge(routed, shared, hidden)

    def route(self, hidden: Tensor, padding_mask: Tensor | None = None) -> Routing:
        """Route `hidden` [S, B, H], or [T, H], one sequence; `padding_mask` has its shape but H.

        Raises ConfigError when the first routing is not what `Routing` says, and for a mask of
        another shape or one that the router cannot take.
        """
        self.place.enter(Phase.GATE)
        num_sequences = hidden.shape[-2] if hidden.dim() > 2 else 1
        tokens = hidden.reshape(-1, hidden.shape[-1])  # [T, H]
        if padding_mask is None:
            routing = self.router(tokens, num_sequences)
        else:
            check_padding(padding_mask, hidden, self.router, self.config.router)
            routing = self.router(tokens, num_sequences, padding=padding_mask.reshape(-1))
        if not self._routing_checked:
            check_routing(routing, len(tokens), self.config.num_experts)
            self._routing_checked = True
        if self.config.rank_capacity is not None:  # nothing else reads it, and to set it costs time
            self.experts.rows_in_balance = self._rows_in_balance(routing)
        self.place.enter(Phase.DISPATCH)
        return routing

    def _rows_in_balance(self, routing: Routing) -> int:
        """Return the rows of a rank where all have as many tokens and all experts are chosen alike.

        Ranks of tp that hold the same tokens send a part each.
        """
        replicas = self.groups.replicas
        sent = -(-len(routing.expert_ids) // (1 if replicas is None else replicas.size()))
        return sent * routing.expert_ids.shape[1] * self.experts.etp_size

    def onward(self, hidden: Tensor, routing: Routing) -> Tensor:
        """Return `hidden`, which was routed, as the layer is to go on with it.

        The gate's share of its gradient is then added where it is computed, which saves a pass.
        """
        return hidden if routing.hidden is None else routing.hidden.view_as(hidden)

    def in_order(self, hidden: Tensor, routing: Routing) -> tuple[Tensor, Tensor | None]:
        """Dispatch, compute, combine, and then the shared expert: what a schedule returns."""
        tokens = routing.hidden  # [T, H] as the router handed them on: no views there and back
        if tokens is None:
            tokens = hidden.reshape(-1, hidden.shape[-1])
        inbox = self.dispatcher.start_dispatch(tokens, routing).wait()
        routed = self.dispatcher.start_combine(self.compute(inbox), inbox).wait()
        return routed, None if self.shared_expert is None else self.shared_expert(hidden)

    def compute(self, inbox: Dispatched) -> Tensor:
        """Return what the experts make of `inbox`, [N, H]; if they fail, waiting ranks are told."""
        self.place.enter(Phase.EXPERTS)
        try:
            outbox: Tensor = self.experts(inbox)
        except Exception:
            tell_failure(self.dispatcher)
            raise
        self.place.enter(Phase.COMBINE)
        return outbox

    def merge(self, routed: Tensor, shared: Tensor | None, hidden: Tensor) -> Tensor:
        """Return `routed` [T, H], shaped as `hidden`, and `shared` in one.

        They are added, or weighed as DeepSpeed-MoE's residual expert (arXiv:2201.05596, 4.1).
        """
        self.place.enter(Phase.PAST)
        routed = routed.view_as(hidden)
        if shared is None:
            return routed
        if self.coefficient is None:
            return routed + shared
        logits: Tensor = self.coefficient(hidden)
        parts = logits.float().softmax(dim=-1).to(routed.dtype)  # [..., 2]
        return routed * parts[..., :1] + shared * parts[..., 1:]


def _empty(device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """Return an empty tensor there; raises ConfigError for a device that is not here, and a dtype
    that weights cannot have."""
    try:
        empty = torch.empty(0, device=device, dtype=dtype)
    except (RuntimeError, AssertionError) as error:  # the latter: torch without CUDA
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"<device> must be one of this machine's; got {shown(device)} ({reason}); use "
            "<device=cpu>"
        ) from error
    if not empty.is_floating_point() or empty.dtype.itemsize < 2:
        raise ConfigError(
            f"<dtype> must be torch.bfloat16, float16, float32 or float64; got {dtype}; use "
            "dtype=torch.bfloat16"
        )
    return empty


def check_padding(padding_mask: Tensor, hidden: Tensor, router: Router, name: str) -> None:
    """Raise ConfigError unless a mask is one of `hidden` [..., H], for a router that takes it."""
    if padding_mask.shape != hidden.shape[:-1] or padding_mask.dtype != torch.bool:
        raise ConfigError(
            f"padding_mask must be {list(hidden.shape[:-1])} bool, True for padding; got "
            f"{list(padding_mask.shape)} {str(padding_mask.dtype).removeprefix('torch.')}"
        )
    function = getattr(router, "forward", router)
    if "padding" not in inspect.signature(function).parameters:
        raise ConfigError(
            f"<router={name}> takes no padding mask: its forward has no parameter `padding`; add "
            "it, or give no padding_mask"
        )


def check_routing(routing: Routing, num_tokens: int, num_experts: int) -> None:
    """Raise ConfigError unless `routing` has the shapes and dtypes that `Routing` says.

    On the CPU the values are looked at too; on a GPU the host would have to wait for them.
    """
    ids, probs, counts = routing.expert_ids, routing.probs, routing.tokens_per_expert
    is_ids = ids.dim() == 2 and len(ids) == num_tokens and ids.dtype == torch.int64
    is_counts = counts.shape == (num_experts,) and counts.dtype == torch.int64
    rules = (
        ("expert_ids", ids, is_ids, f"[{num_tokens}, K] int64, a row for each token"),
        (
            *("probs", probs, probs.shape == ids.shape and probs.is_floating_point()),
            f"{list(ids.shape)} floating point, one for each of expert_ids",
        ),
        (
            *("tokens_per_expert", counts, is_counts),
            f"[{num_experts}] int64, the choices of each of the num_experts experts",
        ),
    )
    for name, tensor, is_met, wanted in rules:
        if not is_met:
            raise ConfigError(
                f"the router must return {name} of shape and dtype {wanted}; got "
                f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            )
    if ids.device.type == "cpu":
        _check_values(ids, counts)


def _check_values(ids: Tensor, counts: Tensor) -> None:
    num_experts, chosen = len(counts), ids[ids >= 0]
    if ids.numel() and not (ids.min() >= -1 and ids.max() < num_experts):
        raise ConfigError(
            f"the router must return expert_ids from 0 to {num_experts - 1}, or -1 for a dropped "
            f"choice; got {ids.min()} to {ids.max()}"
        )
    counted = chosen.bincount(minlength=num_experts)
    if not torch.equal(counted, counts):
        raise ConfigError(
            "the router must return in tokens_per_expert how often each expert is in expert_ids, "
            f"{counted.tolist()}; got {counts.tolist()}"
        )


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
            "<shared_expert=learned> weighs the routed experts against a shared one, and there is "
            "none; use <shared_expert=sum>"
        )
    return nn.Linear(config.hidden_size, 2, device=device, dtype=dtype)


def _check_order(config: MoEConfig, groups: ExpertGroups) -> None:
    """Raise ConfigError where tokens would go to ranks that are counted in another order."""
    served = config.dispatcher == "alltoall" and not config.dispatch_dedup
    if groups.ep_fastest and groups.etp_size > 1 and not served:
        way = f"<dispatcher> ({config.dispatcher})"
        if config.dispatcher == "alltoall":
            way = f"<dispatch_dedup> ({config.dispatch_dedup})"
        raise ConfigError(
            f"{way} counts the ranks that share an expert as neighbours, and here they lie "
            f"{groups.ep_size} apart (ep_fastest); use <dispatcher=alltoall> with "
            "<dispatch_dedup=False>"
        )


def settled(config: MoEConfig, groups: ExpertGroups, device: torch.device) -> MoEConfig:
    """Return `config` with what `auto` stands for on `groups`; see `moe/auto.py`.

    Every rank of the layer must call it: on GPUs they may have to try each other's memory. Raises
    ConfigError for a step in a CUDA graph where they cannot.
    """

    def shares_memory() -> bool:
        from ep_plugin.moe.dispatcher import symm_mem

        reason = symm_mem.why_not(config, groups, device)
        if reason is not None and config.in_graph:
            raise ConfigError(
                f"a CUDA graph needs <dispatcher=symm_mem>, which does not work here: {reason}; "
                "run the step without a CUDA graph"
            )
        return reason is None

    place = Place(
        ranks=groups.ep_etp_size,
        cuda=device.type == "cuda",
        replicated=groups.replicas is not None,
        shares_memory=shares_memory,
    )
    return settle(config, place)
