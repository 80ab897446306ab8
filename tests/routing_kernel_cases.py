"""The fused routing kernel beside its twin; run with TRITON_INTERPRET=1 on the CPU."""

import sys
from typing import Any

import torch
from tolerance import error
from torch import Tensor

from ep_plugin.config import RoutingConfig
from ep_plugin.groups import ExpertGroups
from ep_plugin.kernels import routing as kernel
from ep_plugin.kernels.gate import gate_logits
from ep_plugin.router._choose import PlainChoice, choose
from ep_plugin.router._losses import Pools, load_balancing_loss

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
]
POOL = Pools(1, None, None)


def check(tokens: int, experts: int, settings: dict[str, Any], device: str) -> None:
    """Choices and counts are equal, sums and gradients to fp32's last digits."""
    routing = RoutingConfig(**settings)
    logits = torch.randn(tokens, experts, device=device) * 2
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


def check_gate() -> None:
    """Errors against float64 at most those of torch's own fp32 product, forward and backward."""
    for dtype in (torch.bfloat16, torch.float32):
        hidden = torch.randn(512, 1024, device="cuda").bfloat16().requires_grad_()
        weight = (torch.randn(96, 1024, device="cuda") / 32).to(dtype).requires_grad_()
        seed = torch.randn(512, 96, device="cuda")

        def gradients(logits: Tensor, hidden: Tensor, weight: Tensor, seed: Tensor) -> list[Tensor]:
            return [logits, *torch.autograd.grad(logits, (hidden, weight), seed.to(logits.dtype))]

        doubles = [t.detach().double().requires_grad_() for t in (hidden, weight)]
        exact = gradients(doubles[0] @ doubles[1].T, *doubles, seed)
        found = gradients(gate_logits(hidden, weight), hidden, weight, seed)
        plain = gradients(hidden.float() @ weight.float().T, hidden, weight, seed)
        for name, x, y, z in zip(("logits", "tokens", "weight"), found, plain, exact, strict=True):
            ours, fp32 = error(x, z) ** 0.5, error(y, z) ** 0.5
            print(f"{dtype} {name}: error {ours:.2e}, torch fp32 {fp32:.2e}")
            assert ours <= (2 * fp32 if name == "logits" else 1.1 * fp32 + 1e-6), (dtype, name)


def check_all(device: str) -> None:
    torch.manual_seed(0)
    for case in CASES:
        check(*case, device)
    check_ties(device)


if __name__ == "__main__":
    check_all(sys.argv[1])
