"""Each token goes to its k best experts: logits, choice, capacity, weights, losses.

Every published gate that lets tokens choose is a setting of this one (`RoutingConfig`, and
`presets/` for the systems). Nothing here waits for the device.
"""

from collections.abc import Callable
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from ep_plugin.errors import ConfigError
from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.groups import ExpertGroups
from ep_plugin.moe.interfaces import Routing
from ep_plugin.moe.kernels import select
from ep_plugin.moe.router import _quantile, _random
from ep_plugin.moe.router._capacity import keep, place_by_sequence
from ep_plugin.moe.router._choice import Choice, choose, weigh
from ep_plugin.moe.router._gate import Gate
from ep_plugin.moe.router._losses import NAMES, counting_share, load_balancing_loss, make_pools
from ep_plugin.moe.router._metrics import metrics
from ep_plugin.moe.routing_config import AuxLossScope


class TopKRouter(Gate):
    """The gate, and the choice of the k best experts.

    With `expert_bias` it has the buffers `expert_bias` [E] fp32, saved, and
    `local_tokens_per_expert` [E] fp32, what was sent since the last update. With
    `quantile_balancing` it has `qb_beta` [E] fp32, saved, and since the last update the sum
    `qb_beta_accum` [E] fp32 of `qb_beta_count` [] int64 quantiles; the names are Megatron's.
    `random_logits(logits)` draws those of `force_load_balancing`; replace it for other draws.
    """

    expert_bias: Tensor | None
    local_tokens_per_expert: Tensor | None
    global_tokens_per_expert: Tensor | None
    qb_beta: Tensor | None
    qb_beta_accum: Tensor | None
    qb_beta_count: Tensor | None

    def __init__(
        self,
        config: MoEConfig,
        groups: ExpertGroups,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, groups, device, dtype)
        self.collect_metrics = False
        self._add_buffer("expert_bias", self.routing.expert_bias, device, saved=True)
        self._add_buffer("local_tokens_per_expert", self.routing.expert_bias, device)
        self.balancing = self.routing.balancing_losses
        is_global = "global" in dict(self.balancing)
        self._add_buffer("global_tokens_per_expert", is_global, device)
        self.random_logits: Callable[[Tensor], Tensor] = _random.random_logits
        quantile = self.routing.quantile_balancing
        self._add_buffer("qb_beta", quantile, device, saved=True)
        self._add_buffer("qb_beta_accum", quantile, device)
        count = torch.zeros((), dtype=torch.int64, device=device) if quantile else None
        self.register_buffer("qb_beta_count", count, persistent=False)

    def _add_buffer(
        self, name: str, wanted: bool, device: torch.device | str | None, saved: bool = False
    ) -> None:
        zeros = torch.zeros(self.config.num_experts, dtype=torch.float32, device=device)
        self.register_buffer(name, zeros if wanted else None, persistent=saved)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep buffers in fp32 when the model is cast: a bias moves by less than bf16 can hold."""
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self

    def forward(
        self, hidden: Tensor, num_sequences: int = 1, padding: Tensor | None = None
    ) -> Routing:
        """Route `hidden` [T, H]; token t is of sequence t % num_sequences.

        In training all ranks of `groups.tp_cp` (for a global loss of `tp_dp_cp`) must call it
        together. Tokens of `padding` [T] bool are sent nowhere and enter no loss, count or
        capacity; on a GPU they are routed by plain torch.
        """
        in_model_dtype = hidden.dtype if self.routing.router_dtype == "model" else None
        logits, hidden = self.logits(hidden)
        if self.routing.force_load_balancing:
            logits = self.random_logits(logits)
        choice = self._choose(logits, num_sequences, padding)
        if self.qb_beta is not None and self.wants_losses():
            if padding is not None:
                raise ConfigError(
                    "quantile balancing takes no padding mask; give no padding_mask, or balance by "
                    "<aux_loss_coeff=0.01>"
                )
            self._collect_quantile(logits)
        expert_ids, probs = self._drop(choice, num_sequences, padding)
        if in_model_dtype is not None:
            probs = probs.to(in_model_dtype).to(probs.dtype)  # as Megatron rounds them
        losses: dict[str, Tensor] = {}
        if self.wants_losses():
            losses = self._losses(choice, num_sequences, padding)
            probs = self._attach(probs, losses)
        tokens_per_expert = choice.sent
        if tokens_per_expert is None:
            num_experts = self.config.num_experts
            tokens_per_expert = select(expert_ids).count_choices(expert_ids, num_experts)
        if self.local_tokens_per_expert is not None and torch.is_grad_enabled():
            self.local_tokens_per_expert += tokens_per_expert
        detached = {name: loss.detach() for name, loss in losses.items()}
        seen = metrics(choice, expert_ids, padding) if self.collect_metrics else {}
        return Routing(expert_ids, probs, tokens_per_expert, detached, seen, hidden)

    def _choose(self, logits: Tensor, num_sequences: int, padding: Tensor | None) -> Choice:
        routing, bias = self.routing, self.expert_bias
        if logits.is_cuda and padding is None:
            from ep_plugin.moe.router import _choice_cuda  # it needs Triton, which the CPU does not

            if _choice_cuda.fits(logits, routing, self.training):
                return _choice_cuda.choose(
                    logits, routing, bias, self._capacity_factor(), num_sequences
                )
        return choose(logits, routing, bias, self.training, self.qb_beta, padding)

    def _drop(
        self, choice: Choice, num_sequences: int, padding: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return expert ids [T, K] and probs [T, K] of what fits, -1 and 0 for the rest."""
        routing, weights, expert_ids = self.routing, choice.weights, choice.sent_ids
        if expert_ids is None:
            expert_ids = self._sent_ids(choice, num_sequences, padding)
            if self._may_leave_out():
                weights = weights.masked_fill(expert_ids < 0, 0.0)
        if routing.normalize == "after_drop":
            weights = weigh(weights)
        scale = routing.scaling_factor
        return expert_ids, weights if scale == 1 else weights * scale

    @torch.no_grad()
    def _sent_ids(self, choice: Choice, num_sequences: int, padding: Tensor | None) -> Tensor:
        """Return the expert ids [T, K], -1 for those without room."""
        factor, weights, routing = self._capacity_factor(), choice.weights, self.routing
        if factor is None:
            return choice.expert_ids
        shape = tuple(weights.shape)
        draws = _random.uniform(shape, weights) if routing.drop_policy == "random" else None
        place = place_by_sequence(shape[0], num_sequences, weights.device, padding)  # [T]
        fits = keep(
            *(choice.expert_ids, weights, choice.first_scores, draws, place),
            *(factor, self.config.num_experts, routing, padding),
        )
        return choice.expert_ids.masked_fill(~fits, -1)

    def _capacity_factor(self) -> float | None:
        routing = self.routing
        return routing.capacity_factor if self.training else routing.eval_capacity_factor

    def _may_leave_out(self) -> bool:
        by_policy = self.routing.second_expert in ("random", "threshold")
        return by_policy or self._capacity_factor() is not None

    def _losses(
        self, choice: Choice, num_sequences: int, padding: Tensor | None
    ) -> dict[str, Tensor]:
        losses = {}
        if self.routing.z_loss_coeff > 0:
            losses["z_loss"] = choice.z_loss()
            if padding is not None:
                share = counting_share(padding, self.groups)
                losses["z_loss"] = losses["z_loss"] * share.to(losses["z_loss"].dtype)
        for scope, _ in self.balancing:
            losses[NAMES[scope]] = self._balancing_loss(choice, num_sequences, scope, padding)
        return losses

    def _balancing_loss(
        self, choice: Choice, num_sequences: int, scope: AuxLossScope, padding: Tensor | None
    ) -> Tensor:
        routing, tokens = self.routing, choice.weights
        shared = self.groups.tp_cp is not None or scope == "global"
        if choice.own_loss is not None and not shared:
            return choice.own_loss
        place = None
        if scope == "group":
            place = place_by_sequence(len(tokens), num_sequences, tokens.device, padding)  # [T]
        pools = make_pools(tokens, num_sequences, place, scope, routing, self.groups, padding)
        counts = choice.counts(pools)  # [P, E + 1]
        of_step = self._accumulate(counts[:, :-1]) if scope == "global" else None
        if pools.group is not None:
            dist.all_reduce(counts, group=pools.group)
        per_expert = counts[:, :-1] if of_step is None else of_step
        sums = choice.score_sums(pools)
        return load_balancing_loss(sums, counts[:, -1], per_expert, pools, self.groups)

    def _accumulate(self, per_expert: Tensor) -> Tensor:
        """Add this micro-batch's counts [1, E], summed over all ranks; return the step's so far."""
        counts = per_expert.float()
        if self.groups.tp_dp_cp is not None:
            dist.all_reduce(counts, group=self.groups.tp_dp_cp)
        assert self.global_tokens_per_expert is not None
        self.global_tokens_per_expert += counts[0]
        return self.global_tokens_per_expert.unsqueeze(0).clone()

    def reset_global_aux_loss_tracker(self) -> None:
        """Forget the counts of a global loss; call it when an optimizer step is done."""
        if self.global_tokens_per_expert is not None:
            self.global_tokens_per_expert.zero_()

    def _attach(self, probs: Tensor, losses: dict[str, Tensor]) -> Tensor:
        shares = {NAMES[scope]: share for scope, share in self.balancing}
        for name, loss in losses.items():
            if name == "z_loss":
                share = self.routing.z_loss_coeff / self.groups.tp_cp_size
            else:
                share = shares[name]
                if self.routing.aux_loss_layers == "mean":
                    share /= self.config.num_moe_layers
            probs = self.attach_loss(probs, loss * share)
        return probs

    @torch.no_grad()
    def update_expert_bias(self) -> None:
        """Move each bias by `bias_update_rate` towards the mean load; call it after each step.

        arXiv:2408.15664, algorithm 1. All ranks of `groups.tp_dp_cp` must call it. Megatron moves
        the buffers by itself and does not need this.
        """
        assert self.expert_bias is not None
        assert self.local_tokens_per_expert is not None
        load = self.local_tokens_per_expert
        if self.groups.tp_dp_cp is not None:
            dist.all_reduce(load, group=self.groups.tp_dp_cp)
        self.expert_bias += self.routing.bias_update_rate * torch.sign(load.mean() - load)
        load.zero_()

    def update_quantile_bias(self) -> None:
        """Move the bias of quantile balancing; call it after each step.

        All ranks of `groups.tp_dp_cp` must call it. Megatron moves the buffers by itself.
        """
        assert self.qb_beta is not None
        assert self.qb_beta_accum is not None
        assert self.qb_beta_count is not None
        mean = self.qb_beta_accum / self.qb_beta_count.clamp(min=1)
        ema, group = self.routing.quantile_ema, self.groups.tp_dp_cp
        self.qb_beta.copy_(_quantile.moved(self.qb_beta, mean, ema, group))
        self.qb_beta_accum.zero_()
        self.qb_beta_count.zero_()

    def _collect_quantile(self, logits: Tensor) -> None:
        """Add a micro-batch's quantile to what the next update takes."""
        assert self.qb_beta is not None
        assert self.qb_beta_accum is not None
        assert self.qb_beta_count is not None
        group = self.groups.tp_cp
        found = _quantile.quantile(logits, self.qb_beta, self.routing.topk, group)
        if found is not None:
            self.qb_beta_accum += found
            self.qb_beta_count += 1


def build(
    config: MoEConfig,
    groups: ExpertGroups,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> TopKRouter:
    """Return the router for `config`."""
    return TopKRouter(config, groups, device, dtype)
