"""From logits to choices in two launches, and their backward in one.

The plain-torch twins are `router._choose.PlainChoice`, over all tokens of the rank, and
`router._capacity.keep`.

In the first launch one warp holds the logits of a few tokens in its registers. It computes their
scores, the K best experts (of equal ones the one with the lower number), their weights, and partial
sums over tokens for losses and metrics. The second launch adds up the partial sums and, with a
capacity, drops choices. Sums are added in a fixed order and counts are integers, so every run gives
the same bits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ep_plugin.moe.kernels._launch import cdiv, next_power_of_2
from ep_plugin.moe.kernels._route_code import (
    CHOSEN,
    OTHERS,
    QUEUES,
    SENT,
    finish_kernel,
    route_backward_kernel,
    route_kernel,
)
from ep_plugin.moe.kernels.capacity import MAX_TOKENS, POLICIES, SERVED, Capacity
from ep_plugin.moe.routing_config import RoutingConfig

MAX_EXPERTS, MAX_TOPK = 1024, 16
PROGRAMS = 2112  # at most: 16 per SM of an H100; each writes one row of partial sums
HELD = 256  # logits in a program's registers; it is one warp, so no barriers are needed
HELD_BACKWARD = 512  # the same in the backward
WHOLE = ("micro_batch", "global")  # scopes of a balancing loss that the kernels count for
COLUMNS, ADDED = 16, 1024  # columns, and rows of partial sums, that a program adds at a time


@dataclass(frozen=True)
class Routed:
    """What `route` returns. Both losses, `weights`, `score_sums` and `z_sum` are differentiable.

    Parts of `sums` are taken when they are asked for: few losses and metrics read any.
    """

    expert_ids: Tensor  # [T, K] int64, best first
    sent_ids: Tensor  # [T, K] int64, -1 for choices that found no room
    weights: Tensor  # [T, K] fp32, divided by their sum if before_drop, then 0 where not sent
    sums: Tensor  # [E + 3] fp32, the four below
    sent: Tensor  # [E] int64, choices that found room
    counted: Tensor  # [E] int64, the choices that the balancing loss counts
    balancing_loss: Tensor  # [] fp32, of the tokens given, without coefficient
    z_loss: Tensor  # [] fp32, mean of logsumexp^2 over the tokens given

    @property
    def score_sums(self) -> Tensor:
        """[1, E] fp32, scores summed over tokens."""
        return self.sums[:-3].unsqueeze(0)

    @property
    def z_sum(self) -> Tensor:
        """[] fp32, sum over tokens of logsumexp^2."""
        return self.sums[-3]

    @property
    def entropy(self) -> Tensor:
        """[] fp32, entropy of the scores, summed over tokens."""
        return self.sums[-2].detach()

    @property
    def confidence(self) -> Tensor:
        """[] fp32, sum over tokens of the largest score."""
        return self.sums[-1].detach()


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        bias: Tensor | None,
        routing: RoutingConfig,
        capacity: Capacity | None,
    ) -> tuple[Tensor, ...]:
        (num_tokens, experts), topk, device = logits.shape, routing.topk, logits.device
        width = next_power_of_2(experts)
        block = max(1, min(16, HELD // width))  # tokens held at a time
        tiles = max(1, cdiv(cdiv(num_tokens, block), PROGRAMS))  # that each program loops over
        num_rows = cdiv(num_tokens, block * tiles)
        logits = logits.contiguous()
        ids = torch.empty(num_tokens, topk, dtype=torch.int64, device=device)
        sent_ids = ids if capacity is None else torch.empty_like(ids)
        weights = torch.empty(num_tokens, topk, dtype=torch.float32, device=device)
        per_token = torch.empty(2, num_tokens, dtype=torch.float32, device=device)
        queues = 0 if capacity is None else capacity.num_groups(num_tokens)
        rows = QUEUES.value + queues
        counts = torch.zeros(rows, experts, dtype=torch.int64, device=device)
        plain = bias is not None or routing.num_groups is not None
        top1 = routing.aux_loss_counts == "top1"
        sent = counts[CHOSEN.value if capacity is None else SENT.value]
        counted = counts[OTHERS.value if plain or top1 else CHOSEN.value]
        partials = torch.empty(num_rows, experts + 3, dtype=torch.float32, device=device)
        results = partials.new_empty if num_tokens else partials.new_zeros
        sums, balancing_loss, z_loss = results(experts + 3), results(()), results(())
        rules = (1, 1, 0, 0, 0, 0)  # without a capacity neither these nor the next are read
        keys, draws = ids, logits
        if capacity is not None:
            rules = capacity.rules(num_tokens)
            keys = torch.empty(queues, experts, rules[1], dtype=torch.int64, device=device)
            draws = logits if capacity.draws is None else capacity.draws
        sequences, room, limit, last_limit, place_bits, key_bits = rules
        settings = {
            "K": topk,
            "SIGMOID": routing.score_function == "sigmoid",
            "NORMALIZE": routing.normalize == "before_drop",
            "BLOCK": block,
            "E": width,
            "num_warps": 1,
        }
        if num_tokens:
            route_kernel[(num_rows,)](
                *(logits, counts if bias is None else bias, draws, ids, sent_ids, weights),
                *(per_token, counts, partials, keys),
                *(num_tokens, sequences, experts, tiles, room, place_bits),
                BIASED=bias is not None,
                COUNT_TOP1=top1,
                COUNT_PLAIN=plain,
                POLICY=0 if capacity is None else POLICIES[capacity.policy][0],
                NUM_GROUPS=routing.num_groups or 0,
                GROUP_TOPK=routing.group_topk or 1,
                EACH=routing.each_of_group,
                **settings,
            )
            adders = cdiv(experts + 3, COLUMNS)
            finish_kernel[(adders + queues * experts,)](
                *(partials, counts, sums, balancing_loss, z_loss, keys, sent_ids, weights),
                *(num_rows, num_tokens, sequences, experts, adders, queues, room),
                *(limit, last_limit, place_bits, key_bits),
                K=topk,
                COLUMNS=COLUMNS,
                ADDED=ADDED,
                E=width,
                SERVED=SERVED,
                COUNTED=OTHERS.value if plain or top1 else CHOSEN.value,
            )
        ctx.save_for_backward(logits, ids, sent_ids, counted, per_token)
        ctx.settings = settings
        ctx.mark_non_differentiable(ids, sent_ids, sent, counted)
        ctx.set_materialize_grads(False)
        return weights, sums, balancing_loss, z_loss, ids, sent_ids, sent, counted

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None]:
        logits, ids, sent_ids, counted, per_token = ctx.saved_tensors
        (num_tokens, experts), d_logits = logits.shape, torch.empty_like(logits)
        d_weights, d_sums, d_balancing, d_z = grads[:4]
        if d_weights is None:
            d_weights = torch.zeros(ids.shape, dtype=torch.float32, device=logits.device)
        if num_tokens:
            block = max(1, min(16, HELD_BACKWARD // ctx.settings["E"]))
            optional = [logits if g is None else g.contiguous() for g in (d_sums, d_balancing, d_z)]
            route_backward_kernel[(cdiv(num_tokens, block),)](
                *(logits, ids, sent_ids, counted, per_token, d_weights.contiguous(), *optional),
                *(d_logits, num_tokens, experts),
                SUMS=d_sums is not None,
                BALANCING=d_balancing is not None,
                Z=d_z is not None,
                **{**ctx.settings, "BLOCK": block},
            )
        return d_logits, None, None, None


def fits(logits: Tensor, routing: RoutingConfig, training: bool) -> bool:
    """Whether the kernels do this routing of `logits` [T, E]; the plain-torch twin does all."""
    experts = logits.shape[1]
    whole_groups = routing.num_groups is None or (
        experts & (experts - 1) == 0 and routing.num_groups & (routing.num_groups - 1) == 0
    )
    return (
        logits.is_cuda
        and logits.dtype == torch.float32
        and len(logits) <= MAX_TOKENS
        and experts <= MAX_EXPERTS
        and routing.topk <= MAX_TOPK
        and routing.second_expert == "all"
        and not (routing.noise != "none" and training)
        and not routing.quantile_balancing
        and (routing.aux_loss_coeff == 0 or _pools_fit(routing))
        and whole_groups
    )


def _pools_fit(routing: RoutingConfig) -> bool:
    """Whether each balancing loss counts all tokens of the rank together."""
    return routing.aux_loss_scope in WHOLE and all(s in WHOLE for s, _ in routing.further_losses)


def route(
    logits: Tensor,
    routing: RoutingConfig,
    expert_bias: Tensor | None,
    capacity: Capacity | None = None,
) -> Routed:
    """Return the choices for `logits` [T, E] fp32, of which `sent_ids` marks those with room.

    `expert_bias` [E] fp32 is added to the scores when experts are chosen. `fits` says what can be
    routed here.
    """
    weights, sums, balancing, z, ids, sent_ids, sent, counted = _Route.apply(
        logits, expert_bias, routing, capacity
    )
    return Routed(ids, sent_ids, weights, sums, sent, counted, balancing, z)
