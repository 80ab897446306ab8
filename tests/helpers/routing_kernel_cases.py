"""The fused routing kernel beside its twin; run with TRITON_INTERPRET=1 on the CPU."""

import sys
from dataclasses import replace
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from tolerance import assert_close, error
from torch import Tensor

from ep_plugin.moe.groups import ExpertGroups
from ep_plugin.moe.kernels import route as kernel
from ep_plugin.moe.kernels.gate import (
    add_product,
    add_product_torch,
    gate_logits,
    join,
    join_torch,
    split,
    split_torch,
)
from ep_plugin.moe.router import _choice_cuda
from ep_plugin.moe.router._capacity import keep, place_by_sequence
from ep_plugin.moe.router._choice import PlainChoice, choose
from ep_plugin.moe.router._losses import Pools, load_balancing_loss
from ep_plugin.moe.routing_config import RoutingConfig

V3 = {"score_function": "sigmoid", "num_groups": 4, "group_topk": 2, "expert_bias": True}
CASES: list[tuple[int, int, dict[str, Any]]] = [  # tokens, experts, settings
    (37, 8, {}),
    (5, 3, {"topk": 1, "normalize": "none", "aux_loss_counts": "top1"}),
    (0, 8, {}),
    (1, 200, {"topk": 8}),
    (40, 16, {"topk": 4, **V3}),
    (33, 16, {"topk": 4, "score_function": "sigmoid", "aux_loss_counts": "top1"}),
    (33, 12, {"topk": 3, "expert_bias": True, "normalize": "after_drop"}),
    (33, 16, {"topk": 4, "num_groups": 4, "group_topk": 2, "normalize": "none"}),
    (33, 16, {"topk": 6, "num_groups": 8, "group_topk": 3, "group_score_topk": 1}),
    (33, 16, {"topk": 3, "num_groups": 4, "group_topk": 2, "group_score_topk": 3}),
    (9, 1000, {"topk": 16, "score_function": "sigmoid"}),
]
EXTREME: tuple[dict[str, Any], ...] = (
    {},
    {"score_function": "sigmoid"},
    {"score_function": "sigmoid", "expert_bias": True},
    {"num_groups": 4, "group_topk": 2},
)
POLICIES = ("position", "rank_position", "probs", "random", "bpr")
POOL = Pools(1, None, None)


def check(tokens: int, experts: int, settings: dict[str, Any], device: str) -> None:
    """Random logits."""
    check_logits(torch.randn(tokens, experts, device=device) * 2, settings)


def check_logits(logits: Tensor, settings: dict[str, Any]) -> None:
    """Choices and counts are equal, sums and gradients to fp32's last digits."""
    routing, (tokens, experts), device = RoutingConfig(**settings), logits.shape, logits.device
    bias = torch.rand(experts, device=device) if routing.expert_bias else None
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found = kernel.route(leaf, routing, bias)
    twin = choose(exact, routing, None if bias is None else bias.double(), True)
    assert torch.equal(found.expert_ids, twin.expert_ids), settings
    sent = torch.bincount(twin.expert_ids.flatten(), minlength=experts)
    assert torch.equal(found.sent, sent)
    assert torch.equal(found.counted, twin.counts(POOL)[0, :-1])
    entropy, confidence = twin.sums()
    pairs = [
        (found.weights, twin.weights),
        (found.score_sums, twin.score_sums(POOL)),
        (found.z_sum, twin.z_loss() * max(tokens, 1)),
        (found.z_loss, twin.z_loss()),
        (found.balancing_loss, balancing(twin, tokens, experts)),
        (found.entropy, entropy),
        (found.confidence, confidence),
    ]
    seeds = [torch.randn(x.shape, device=device) for x, _ in pairs[:5]]
    sum((x * seed).sum() for (x, _), seed in zip(pairs, seeds, strict=False)).backward()  # type: ignore[union-attr]
    sum((y * seed).sum() for (_, y), seed in zip(pairs, seeds, strict=False)).backward()  # type: ignore[union-attr]
    assert leaf.grad is not None
    assert exact.grad is not None
    for x, y in [*pairs, (leaf.grad, exact.grad)]:
        assert error(x, y) ** 0.5 < 2e-6, settings


def balancing(twin: PlainChoice, tokens: int, experts: int) -> Tensor:
    """E * sum_e f_e * P_e over these tokens."""
    counts = twin.counts(POOL)[:, :-1]
    total = torch.tensor([tokens], device=counts.device)
    return load_balancing_loss(twin.score_sums(POOL), total, counts, POOL, ExpertGroups())


def check_ties(device: str) -> None:
    """Of equal logits the lower expert is chosen."""
    found = kernel.route(torch.zeros(5, 8, device=device), RoutingConfig(topk=3), None)
    assert found.expert_ids.tolist() == [[0, 1, 2]] * 5


def check_programs_with_several_tiles(device: str) -> None:
    """Also when a program takes several blocks of tokens, the last ragged; repeats are equal."""
    with patch.object(kernel, "PROGRAMS", 2):
        check(75, 12, {"topk": 3}, device)
        logits = torch.randn(75, 12, device=device)
        first, again = (kernel.route(logits, RoutingConfig(), None) for _ in range(2))
        assert torch.equal(first.score_sums, again.score_sums)
        assert torch.equal(first.balancing_loss, again.balancing_loss)


def check_one_expert(device: str) -> None:
    """All tokens to one expert."""
    logits = torch.randn(40, 8, device=device)
    logits[:, 5] += 50
    check_logits(logits, {"topk": 2})


def check_saturated_sigmoid(device: str) -> None:
    """Scores that round to 1, or to 0, are ranked by their logits, and give no NaN."""
    routing = RoutingConfig(topk=3, score_function="sigmoid")
    logits = 20 + torch.randperm(60, device=device).view(5, 12).float()
    for shift in (0, -100, -800):
        leaf = (logits + shift).requires_grad_()
        found = kernel.route(leaf, routing, None)
        assert torch.equal(found.expert_ids, logits.topk(3).indices), shift
        (slope,) = torch.autograd.grad(found.weights.sum() + found.score_sums.sum(), leaf)
        for values in (found.weights, slope):
            assert values.isfinite().all(), shift


def check_not_finite(device: str) -> None:
    """Whatever the logits: K experts that exist, none twice, counted as sent; NaN is not hidden."""
    logits = torch.randn(4, 12, device=device)
    logits[0] = torch.nan
    logits[1, 4] = torch.nan
    logits[2, 1:] = -torch.inf
    for settings in EXTREME:
        routing = RoutingConfig(topk=4, **settings)
        bias = torch.zeros(12, device=device) if routing.expert_bias else None
        wide = torch.nn.functional.pad(logits, (0, 4)) if routing.num_groups else logits
        found = kernel.route(wide, routing, bias)
        ids = found.expert_ids
        assert ((ids >= 0) & (ids < wide.shape[1])).all(), settings
        assert all(len(set(row)) == 4 for row in ids.tolist()), (settings, ids)
        assert torch.equal(found.sent, torch.bincount(ids.flatten(), minlength=wide.shape[1]))
        assert found.weights[0].isnan().all(), settings
        assert found.weights[2:].isfinite().all(), settings
        assert found.z_sum.isnan(), settings


def check_capacity(device: str) -> None:
    """Who finds room is who the twin lets in, given the kernel's own weights; all policies."""
    for index, policy in enumerate(POLICIES * 4):
        settings = ({}, {"topk": 3}, {"topk": 4, **V3}, {"normalize": "none", "topk": 1})[
            index // 5
        ]
        sequences, group_tokens = (1, None) if index % 2 else (3, 7)
        routing = RoutingConfig(
            **{**settings, "aux_loss_coeff": 0.01},
            drop_policy=policy,
            capacity_factor=(0.6, 1.0, 0.02, 50.0)[index % 4],
            capacity_rounding="floor",
            group_tokens=group_tokens,
        )
        check_room(torch.randn(36, 16, device=device).round(decimals=1), routing, sequences)
    torch.manual_seed(1)
    crowded = torch.randn(150, 8, device=device)
    crowded[:, 3] += 9
    with patch.object(kernel, "SERVED", 16):  # a queue longer than what is looked at at a time
        check_room(crowded, RoutingConfig(drop_policy="probs", capacity_factor=1.0), 2)
        check_room(crowded * torch.nan, RoutingConfig(drop_policy="bpr", capacity_factor=1.0), 2)


def check_room(logits: Tensor, routing: RoutingConfig, sequences: int) -> None:
    """What is sent, its weights, their gradients, and the counts."""
    bias = torch.rand(logits.shape[1], device=logits.device) if routing.expert_bias else None
    leaf, other = (logits.clone().requires_grad_() for _ in range(2))
    torch.manual_seed(2)
    choice = _choice_cuda.choose(leaf, routing, bias, routing.capacity_factor, sequences)
    torch.manual_seed(2)
    draws = torch.rand(choice.weights.shape, device=logits.device)
    free = kernel.route(other, routing, bias)
    assert torch.equal(choice.expert_ids, free.expert_ids)
    place = place_by_sequence(len(logits), sequences, logits.device)
    factor, experts = routing.capacity_factor, logits.shape[1]
    first = kernel.route(logits, replace(routing, normalize="none"), bias).weights[:, 0]
    assert factor is not None
    weights = free.weights.detach()
    room = keep(free.expert_ids, weights, first, draws, place, factor, experts, routing)
    assert torch.equal(choice.sent_ids, free.expert_ids.masked_fill(~room, -1)), routing
    sent = torch.bincount(free.expert_ids[room], minlength=experts)
    assert torch.equal(choice.sent, sent)
    expected = free.weights.masked_fill(~room, 0)
    assert torch.equal(choice.weights.nan_to_num(7), expected.nan_to_num(7))
    seed = torch.randn_like(expected)
    for x, y in ((choice.routed.balancing_loss, free.balancing_loss), (choice.weights, expected)):
        slopes = [
            torch.autograd.grad((value * seed).sum(), of, retain_graph=True)[0].nan_to_num(7)
            for value, of in ((x, leaf), (y, other))
        ]
        assert torch.equal(*slopes), routing


def check_gate() -> None:
    """Errors against float64 at most those of torch's own fp32 product, forward and backward."""
    for dim in (0, 1):
        matrix = torch.randn(75, 50, device="cuda")
        assert torch.equal(split(matrix, dim), split_torch(matrix, dim))
    for dtype, experts in product((torch.bfloat16, torch.float32), (6, 96, 200)):
        hidden = torch.randn(512, 1024, device="cuda").bfloat16().requires_grad_()
        weight = (torch.randn(experts, 1024, device="cuda") / 32).to(dtype).requires_grad_()
        seed, later = torch.randn(512, experts, device="cuda"), torch.randn_like(hidden)

        def gradients(
            logits: Tensor,
            passed: Tensor,
            *leaves: Tensor,
            seed: Tensor = seed,
            later: Tensor = later,
        ) -> list[Tensor]:
            total = (logits * seed).sum() + (passed * later).sum()
            return [logits, *torch.autograd.grad(total, leaves)]

        doubles = [t.detach().double().requires_grad_() for t in (hidden, weight)]
        exact = gradients(doubles[0] @ doubles[1].T, doubles[0], *doubles)
        found = gradients(*gate_logits(hidden, weight), hidden, weight)
        wide = [t.detach().float().requires_grad_() for t in (hidden, weight)]
        plain = [
            x.to(t.dtype)
            for x, t in zip(gradients(wide[0] @ wide[1].T, wide[0], *wide), found, strict=True)
        ]
        for name, x, y, z in zip(("logits", "tokens", "weight"), found, plain, exact, strict=True):
            ours, fp32 = error(x, z) ** 0.5, error(y, z) ** 0.5
            print(f"{dtype} {experts} {name}: error {ours:.2e}, torch fp32 {fp32:.2e}")
            assert ours <= (2 * fp32 if name == "logits" else 1.1 * fp32 + 1e-6), (
                dtype,
                experts,
                name,
            )


def check_add_product(device: str) -> None:
    """Of any sizes; the left matrix may be part of a wider one, the right one is taken twice."""
    dtype = torch.float16 if device == "cpu" else torch.bfloat16  # interpreted: it has no bf16
    for rows, depth, columns, height in ((5, 6, 40, 6), (130, 100, 200, 50), (0, 8, 16, 4)):
        left = torch.randn(rows, depth + 8, device=device).to(dtype)[:, :depth]
        right, added = (torch.randn(n, columns, device=device).to(dtype) for n in (height, rows))
        exact = added.double() + left.double() @ right.double().repeat(depth // height, 1)
        for found in (add_product(added, left, right), add_product_torch(added, left, right)):
            assert found.dtype == dtype
            assert_close(found, exact, torch.bfloat16, "sum")


def check_join(device: str) -> None:
    """Three blocks in one, of more than a program's numbers too: the same bits as the twin's."""
    for rows, columns in ((1, 1), (8, 100), (3, 700), (0, 8)):
        parts = torch.randn(3 * rows, columns, device=device)
        exact = parts.double().view(3, rows, columns).sum(0)
        # The interpreter cuts bf16, which fp32 and fp16 show nothing of.
        for dtype in (torch.float32, torch.float16 if device == "cpu" else torch.bfloat16):
            found = join(parts, dtype)
            assert found.dtype == dtype
            assert torch.equal(found, join_torch(parts, dtype))
            assert error(found, exact) < 1e-5


def check_all(device: str) -> None:
    torch.manual_seed(0)
    check_add_product(device)
    check_join(device)
    for case in CASES:
        check(*case, device)
    check_ties(device)
    check_programs_with_several_tiles(device)
    check_one_expert(device)
    check_saturated_sigmoid(device)
    check_not_finite(device)
    check_capacity(device)


if __name__ == "__main__":
    check_all(sys.argv[1])
