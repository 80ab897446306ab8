"""Every routing policy against a reference written from the papers, and laws of its own."""

import math
import random
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import routing_reference as reference
import torch
import torch.distributed as dist
from spawn import run_ranks
from tolerance import assert_close
from torch import Tensor

from ep_plugin import (
    ExpertGroups,
    MoEConfig,
    MoELayer,
    ParallelConfig,
    RoutingConfig,
    create_expert_groups,
)
from ep_plugin.moe.interfaces import Routing
from ep_plugin.moe.router import _random
from ep_plugin.moe.router._capacity import capacity
from ep_plugin.moe.router.expert_choice import ExpertChoiceRouter
from ep_plugin.moe.router.topk import TopKRouter
from ep_plugin.moe.rules import NEEDS

GOLDEN = torch.tensor(
    [[2, 1, 0], [2, 0, 1], [3, 1, 0], [0, 2, 1], [2.5, 0.5, 0], [0, 1, 2]], dtype=torch.float64
)
LOSS = {"micro_batch": "load_balancing_loss", "group": "load_balancing_loss",
        "sequence": "seq_load_balancing_loss", "global": "global_load_balancing_loss"}  # fmt: skip


def make_router(routing: RoutingConfig, experts: int, kind: type = TopKRouter, **more: Any) -> Any:
    """A router whose hidden vectors are its logits."""
    config = MoEConfig(
        hidden_size=experts, ffn_hidden_size=4, num_experts=experts, routing=routing, **more
    )
    router = kind(config, ExpertGroups(), dtype=torch.float64)
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))
    return router


def grad_of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def nonzero(routing: Routing) -> dict[tuple[int, int], float]:
    """(token, expert) -> weight of what is sent."""
    return {
        (t, e): round(p, 6)
        for t, row in enumerate(
            zip(routing.expert_ids.tolist(), routing.probs.tolist(), strict=True)
        )
        for e, p in zip(*row, strict=True)
        if e >= 0
    }


P1, P2 = 0.731059, 0.268941
GSHARD = {(0, 0): P1, (0, 1): P2, (1, 0): P1, (1, 2): P2, (2, 0): 0.880797, (2, 1): 0.119203,
          (3, 1): P1, (3, 2): P2, (5, 2): P1}  # fmt: skip
AUX = {"aux_loss_coeff": 0.01}
TOP1 = {**AUX, "aux_loss_counts": "top1"}
CASES: dict[str, tuple[dict[str, Any], dict[tuple[int, int], float], float]] = {
    "Switch, C=2": (
        {"topk": 1, "normalize": "none", "capacity_factor": 1.0, "capacity_rounding": "floor",
         "drop_policy": "position", **TOP1},
        {(0, 0): 0.665241, (1, 0): 0.665241, (3, 1): 0.665241, (5, 2): 0.665241}, 1.293937,
    ),
    "GShard and GLaM, C=3": (
        {"capacity_factor": 1.5, "capacity_counts_topk": False, "capacity_rounding": "floor",
         "drop_policy": "rank_position", **TOP1}, GSHARD, 1.293937,
    ),
    "divided after dropping": (
        {"normalize": "after_drop", "capacity_factor": 0.75, "drop_policy": "rank_position",
         **TOP1},
        {**GSHARD, (5, 2): 1.0}, 1.293937,
    ),
    "Megatron, probs": (
        {"capacity_factor": 0.75, "drop_policy": "probs", **AUX},
        {(0, 0): P1, (0, 1): P2, (1, 2): P2, (2, 0): 0.880797, (3, 1): P1, (3, 2): P2,
         (4, 0): 0.880797, (5, 1): P2, (5, 2): P1}, 1.004830,
    ),
    "Megatron, top-1 probs": (
        {"topk": 1, "normalize": "none", "capacity_factor": 1.0, "drop_policy": "probs", **AUX},
        {(2, 0): 0.843795, (4, 0): 0.821409, (3, 1): 0.665241, (5, 2): 0.665241}, 1.293937,
    ),
    "batch-prioritised": (
        {"topk": 1, "normalize": "none", "capacity_factor": 1.0, "drop_policy": "bpr", **AUX},
        {(2, 0): 0.843795, (4, 0): 0.821409, (3, 1): 0.665241, (5, 2): 0.665241}, 1.293937,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_golden_vectors(case: str) -> None:
    settings, weights, loss = CASES[case]
    router = make_router(RoutingConfig(router_dtype="fp64", **settings), 3)
    routing = router(GOLDEN)
    assert nonzero(routing) == weights
    assert float(routing.losses["load_balancing_loss"]) == pytest.approx(loss, abs=1e-6)
    assert routing.tokens_per_expert.tolist() == [
        sum(expert == e for _, expert in weights) for e in range(3)
    ]


def test_golden_vector_of_expert_choice() -> None:
    routing = RoutingConfig(router_dtype="fp64", capacity_factor=1.0, force_expert_choice=True)
    router = make_router(routing, 3, ExpertChoiceRouter, router="expert_choice")
    assert nonzero(router(GOLDEN)) == {
        (2, 0): 0.843795, (4, 0): 0.821409, (0, 1): 0.244728, (3, 1): 0.665241,
        (1, 2): 0.244728, (5, 2): 0.665241,
    }  # fmt: skip


def random_case(
    rng: random.Random, fixed: dict[str, Any], repeats: bool = True
) -> tuple[RoutingConfig, Any, int]:
    """A random setting with `fixed` fields, logits [T, E] and the number of sequences.

    With `repeats` tokens repeat in half of the cases, so that policies meet ties; there are none
    inside a row, where the order of torch.topk is unspecified.
    """
    experts, num_sequences = rng.choice([2, 3, 4, 5, 6, 8, 9]), rng.choice([1, 2, 3])
    tokens = num_sequences * rng.randint(1, 40 // num_sequences)
    topk = fixed.get("topk", rng.randint(1, min(4, experts)))
    settings: dict[str, Any] = {
        "topk": topk,
        "score_function": rng.choice(["softmax", "sigmoid"]),
        "normalize": rng.choice(["before_drop", "after_drop", "none"]),
        "scaling_factor": rng.choice([1.0, 2.5]),
        "router_bias": rng.random() < 0.3,
        "jitter_eps": rng.choice([0.0, 0.0, 0.1]),
        "group_tokens": rng.choice([None, 4, 7]),
        "min_capacity": rng.choice([0, 1, 4]),
        "capacity_rounding": rng.choice(["floor", "round", "ceil", "floor_x4"]),
        "capacity_counts_topk": rng.choice([True, False]),
        "aux_loss_coeff": 0.3,
        "aux_loss_counts": rng.choice(["topk", "top1"]),
        "aux_loss_scope": rng.choice(["micro_batch", "sequence", "global", "group"]),
        "aux_loss_layers": rng.choice(["sum", "mean"]),
        "z_loss_coeff": 0.2,
    }
    if fixed.get("drop_policy", "none") != "none":
        settings["capacity_factor"] = rng.uniform(0.3, 2.5)
        settings["eval_capacity_factor"] = rng.choice([None, 1.0])
    if rng.random() < 0.3 and not fixed.get("second_expert") and not fixed.get("noise"):
        settings["expert_bias"] = True
    if rng.random() < 0.4 and "noise" not in fixed:
        settings |= rng.choice(group_limits(experts, topk))
    settings |= fixed
    if settings["aux_loss_scope"] == "group" and settings["group_tokens"] is None:
        settings["group_tokens"] = 5
    logits = np.random.randn(tokens, experts) * 2
    if repeats and rng.random() < 0.5:
        logits = logits[np.random.randint(0, tokens, tokens)]
    return RoutingConfig(**settings), logits, num_sequences


def group_limits(experts: int, topk: int) -> list[dict[str, int]]:
    """Every legal num_groups and group_topk, with and without a legal group_score_topk."""
    return [
        {"num_groups": groups, "group_topk": kept} | ({"group_score_topk": each} if each else {})
        for groups in range(1, experts + 1)
        for kept in range(1, groups + 1)
        for each in range(experts // groups + 1)
        if experts % groups == 0 and topk <= experts // groups * kept
        if each or topk % kept == 0
    ]


POLICIES: dict[str, dict[str, Any]] = {
    **{f"drop {policy}": {"drop_policy": policy}
       for policy in ("none", "position", "rank_position", "probs", "random", "bpr")},
    **{f"second {policy}": {"second_expert": policy, "topk": 2, "drop_policy": "rank_position"}
       for policy in ("sampling", "random", "threshold")},
    "noise rsample": {"noise": "rsample", "drop_policy": "position"},
}  # fmt: skip


class Recorder:
    """Draws that the router makes, kept for the reference."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drawn: list[np.ndarray] = []
        for name in ("uniform", "gumbel"):
            monkeypatch.setattr(_random, name, self._wrap(getattr(_random, name)))

    def _wrap(self, original: Any) -> Any:
        def draw(shape: tuple[int, ...], like: Tensor) -> Tensor:
            before = len(self.drawn)
            values: Tensor = original(shape, like)
            self.drawn[before:] = [values.double().numpy()]  # in place of what it was made of
            return values

        return draw

    def named(self, routing: RoutingConfig, training: bool) -> dict[str, np.ndarray]:
        """What was drawn, by what it was for; fails when the router drew more or less."""
        factor = routing.capacity_factor if training else routing.eval_capacity_factor
        wanted = {
            "jitter": training and routing.jitter_eps > 0,
            "rsample": training and routing.noise == "rsample",
            "second": routing.second_expert in ("sampling", "random"),
            "random": factor is not None and routing.drop_policy == "random",
        }
        return dict(zip([name for name in wanted if wanted[name]], self.drawn, strict=True))


@dataclass
class Case:
    """One setting, routed by the router and by the reference."""

    routing: RoutingConfig
    router: Any
    hidden: Tensor  # [T, E], the router's input
    jitter: Tensor  # [T, E] factors of it
    num_sequences: int
    training: bool
    found: Routing
    expected: reference.Result


def without_idle(routing: RoutingConfig) -> RoutingConfig:
    """Return `routing` without the settings that would do nothing: `MoEConfig` refuses those."""
    for name, needs in NEEDS.items():
        part, _, field = name.partition(".")
        if part == "routing":
            config, value = SimpleNamespace(routing=routing, router="topk"), getattr(routing, field)
            met = (n.when(config) for n in needs if not n.values or value in n.values)
            if not all(met):
                routing = replace(routing, **{field: getattr(RoutingConfig(), field)})
    return routing


def run_case(
    rng: random.Random,
    fixed: dict[str, Any],
    recorder: Recorder,
    dtype: Literal["fp64", "fp32"],
    training: bool,
) -> Case:
    """Route a random case both ways, the reference with the draws that the router made."""
    exact = dtype == "fp64"
    routing, logits, num_sequences = random_case(rng, fixed, repeats=exact)
    routing = without_idle(replace(routing, router_dtype=dtype))
    experts = logits.shape[1]
    router = make_router(routing, experts, num_moe_layers=3)
    bias = np.zeros(experts)
    with torch.no_grad():
        if routing.router_bias:
            router.bias.copy_(torch.tensor(np.random.randn(experts).astype(np.float32)))
        if routing.expert_bias:
            router.expert_bias.copy_(torch.tensor(np.random.rand(experts) / 7))
            bias = router.expert_bias.double().numpy()
    hidden = torch.tensor(logits if exact else logits.astype(np.float32)).requires_grad_()
    recorder.drawn.clear()
    found = router.train(training)(hidden, num_sequences)
    draws = recorder.named(routing, training)
    jitter = torch.ones(1, dtype=torch.float64)
    if "jitter" in draws:
        eps = routing.jitter_eps
        jitter = 1 - eps + 2 * eps * torch.tensor(draws["jitter"])
    seen = hidden.detach().double() * jitter
    seen = seen if router.bias is None else seen + router.bias.detach()
    scores = seen.softmax(1) if routing.score_function == "softmax" else seen.sigmoid()
    expected = reference.route(
        *(seen.numpy(), routing),
        num_sequences=num_sequences,
        training=training,
        bias=bias,
        draws=draws,
        scores=scores.numpy(),
    )
    return Case(routing, router, hidden, jitter, num_sequences, training, found, expected)


def check_case(case: Case, tolerance: float) -> None:
    """Masks are the same; weights, which are of order 1, and losses are within `tolerance`."""
    routing, found, expected = case.routing, case.found, case.expected
    assert found.expert_ids.tolist() == expected.ids, routing
    sent = [e for picks in expected.ids for e in picks if e >= 0]
    assert found.tokens_per_expert.tolist() == [
        sent.count(e) for e in range(len(found.tokens_per_expert))
    ]
    weights = torch.tensor(expected.probs, dtype=torch.float64)
    assert torch.allclose(found.probs.double(), weights, rtol=tolerance, atol=tolerance), routing
    if not case.training:
        assert not found.losses
        return
    losses = {LOSS[routing.aux_loss_scope]: expected.losses["aux"], "z_loss": expected.losses["z"]}
    assert found.losses.keys() == losses.keys()
    for name, value in losses.items():
        assert float(found.losses[name]) == pytest.approx(value, rel=tolerance), (name, routing)


def seeded(
    policy: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[random.Random, Recorder]:
    """What `run_case` draws settings from, and what records the router's draws."""
    np.random.seed(seed)
    torch.manual_seed(seed)
    return random.Random(policy), Recorder(monkeypatch)


@pytest.mark.parametrize("policy", POLICIES)
def test_random_cases(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, recorder = seeded(policy, 1, monkeypatch)
    dropped = 0
    for _ in range(400):
        case = run_case(rng, POLICIES[policy], recorder, "fp64", training=rng.random() < 0.8)
        check_case(case, 1e-12)
        dropped += int((case.found.expert_ids < 0).sum())
    assert (dropped > 200) == (policy != "drop none")


@pytest.mark.parametrize("policy", POLICIES)
def test_fp32_chooses_alike(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, recorder = seeded(policy, 2, monkeypatch)
    for _ in range(200):
        case = run_case(rng, POLICIES[policy], recorder, "fp32", training=rng.random() < 0.8)
        assert case.found.probs.dtype == torch.float32
        check_case(case, 1e-6)


def training_loss(case: Case, weight: Tensor, hidden: Tensor, cotangent: Tensor) -> Tensor:
    """What the backward differentiates, given what was chosen: a formula of plain torch."""
    routing, expected = case.routing, case.expected
    logits = hidden * case.jitter @ weight.T
    if case.router.bias is not None:
        logits = logits + case.router.bias.detach()
    scores = logits.softmax(1) if routing.score_function == "softmax" else logits.sigmoid()
    sent = torch.tensor(expected.ids) >= 0
    weights = scores.gather(1, torch.tensor(expected.chosen))
    if routing.normalize == "before_drop":
        weights = weights / weights.sum(1, keepdim=True)
    weights = torch.where(sent, weights, 0.0)
    if routing.normalize == "after_drop":
        weights = weights / (weights.sum(1, keepdim=True) + ~sent.any(1, keepdim=True))
    total = (weights * routing.scaling_factor * cotangent).sum()
    layers = 3 if routing.aux_loss_layers == "mean" else 1
    pools = reference.pools_of(len(hidden), case.num_sequences, routing)
    aux = balancing_loss(scores, expected.counted, pools)
    total = total + routing.aux_loss_coeff / layers * aux
    return total + routing.z_loss_coeff * logits.exp().sum(1).log().square().mean()


def balancing_loss(scores: Tensor, counted: list[list[int]], pools: list[int]) -> Tensor:
    """Mean over pools of E * sum_e f_e P_e [], differentiable in `scores` [T, E]."""
    losses, experts = [], scores.shape[1]
    for pool in sorted(set(pools)):
        members = [t for t in range(len(scores)) if pools[t] == pool]
        chosen = torch.tensor([e for t in members for e in counted[t]])
        fractions = torch.bincount(chosen, minlength=experts).double() / len(chosen)
        parts = scores[members] / scores[members].sum(1, keepdim=True)
        losses.append(experts * (fractions * parts.mean(0)).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_those_of_the_formula(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, recorder = seeded(policy, 3, monkeypatch)
    for _ in range(60):
        case = run_case(rng, POLICIES[policy], recorder, "fp64", training=True)
        cotangent = torch.randn(case.found.probs.shape, dtype=torch.float64)
        (case.found.probs * cotangent).sum().backward()
        weight = case.router.weight.detach().clone().requires_grad_()
        hidden = case.hidden.detach().clone().requires_grad_()
        training_loss(case, weight, hidden, cotangent).backward()
        for found, leaf in ((case.router.weight, weight), (case.hidden, hidden)):
            assert grad_of(leaf).abs().max() > 1e-3
            bound = 1e-12 * float(grad_of(leaf).abs().max())
            assert float((grad_of(found) - grad_of(leaf)).abs().max()) <= bound, case.routing


def test_expert_choice_takes_the_best_of_each_group() -> None:
    rng = random.Random(6)
    np.random.seed(4)
    for _ in range(300):
        routing, logits, num_sequences = random_case(rng, {"topk": 2, "jitter_eps": 0.0})
        given = RoutingConfig(
            router_dtype="fp64",
            force_expert_choice=True,
            capacity_factor=rng.uniform(0.3, 2.5),
            eval_capacity_factor=rng.choice([None, 1.0]),
            group_tokens=routing.group_tokens,
            capacity_rounding=routing.capacity_rounding,
            min_capacity=routing.min_capacity,
        )
        experts, training = logits.shape[1], rng.random() < 0.8
        router = make_router(given, experts, ExpertChoiceRouter, router="expert_choice")
        found = router.train(training)(torch.tensor(logits), num_sequences)
        factor = given.capacity_factor
        if not training and given.eval_capacity_factor is not None:
            factor = given.eval_capacity_factor
        assert factor is not None
        scores = torch.tensor(logits).softmax(1)
        ids = reference.expert_choice(scores.numpy(), given, factor, num_sequences)
        assert found.expert_ids.tolist() == ids, given
        taken = torch.tensor(ids) >= 0
        assert torch.allclose(found.probs, scores * taken, rtol=1e-12, atol=0)
        assert torch.equal(found.tokens_per_expert, taken.sum(0))


def test_a_sampled_second_stays_inside_the_groups() -> None:
    routing = RoutingConfig(second_expert="sampling", num_groups=4, group_topk=1)
    torch.manual_seed(0)
    ids = make_router(routing, 8)(torch.randn(200, 8)).expert_ids
    assert torch.equal(ids[:, 0] // 2, ids[:, 1] // 2)


def test_capacity_as_each_system_writes_it() -> None:
    rng = random.Random(2)
    for _ in range(10_000):
        tokens, experts, topk = rng.randint(1, 5000), rng.randint(1, 300), rng.randint(1, 8)
        factor = rng.choice([0.5, 1.0, 1.1, 1.25, 1.5, 2.0, 2.4, rng.uniform(0.1, 4)])
        written = {
            ("floor", False, 4): max(min(tokens, int(tokens * factor / experts)), 4),  # Mesh TF
            ("round", False, 4): max(round(factor * tokens / experts), 4),  # T5X
            ("floor_x4", False, 0): -(-(int(tokens * factor / experts) or 4) // 4) * 4,  # Lingvo
            ("ceil", True, 4): max(math.ceil(tokens * topk / experts * factor), 4),  # DeepSpeed
            ("ceil", True, 0): math.ceil(tokens * topk / experts * factor),  # Megatron
        }
        for (rounding, counts, least), expected in written.items():
            routing = RoutingConfig(
                topk=topk,
                normalize="none",
                capacity_rounding=rounding,  # type: ignore[arg-type]
                capacity_counts_topk=counts,
                min_capacity=least,
            )
            found = capacity(tokens, experts, topk, factor, routing)
            assert found == min(expected, tokens), (rounding, tokens, experts, topk, factor)


def test_capacity_of_the_published_example() -> None:
    """1000 tokens, 48 experts, factor 1.25: 26 rounded down or to nearest, 27 up, 28 by fours."""
    found = {
        rounding: capacity(1000, 48, 1, 1.25, RoutingConfig(capacity_rounding=rounding))
        for rounding in ("floor", "round", "ceil", "floor_x4")
    }  # fmt: skip
    assert found == {"floor": 26, "round": 26, "ceil": 27, "floor_x4": 28}


def test_factor_2_of_glam_is_factor_1_of_two_choices() -> None:
    """GShard and GLaM count tokens, DeepSpeed and Megatron choices; bare factors mislead."""
    tokens = RoutingConfig(capacity_counts_topk=False)
    for num_tokens in range(1, 500):
        assert capacity(num_tokens, 64, 2, 2.0, tokens) == capacity(
            *(num_tokens, 64, 2, 1.0), RoutingConfig()
        )


RTS = RoutingConfig(topk=1, normalize="none", router_dtype="fp64", capacity_factor=1.0,
                    drop_policy="random")  # fmt: skip


def test_random_token_selection_is_fair_and_seedable() -> None:
    """Of 12 tokens that want one expert with room for 4, each survives a third of the time."""
    logits = torch.tensor([[2.0, 1.0, 0.0]]).double().repeat(12, 1)
    router, draws = make_router(RTS, 3), 2000
    torch.manual_seed(0)
    survived = sum((router(logits).expert_ids[:, 0] >= 0).double() for _ in range(draws))
    assert isinstance(survived, Tensor)
    assert survived.sum() == 4 * draws
    expected = draws * 4 / 12
    # Each count is binomial, and all sum to a constant: 11 degrees of freedom.
    statistic = float(((survived - expected) ** 2 / (expected * (1 - 4 / 12))).sum()) * 11 / 12
    p_value = torch.special.gammaincc(torch.tensor(11 / 2), torch.tensor(statistic / 2))
    assert float(p_value) > 1e-3
    kept = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        kept.append(router(logits).expert_ids)
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


def test_random_token_selection_keeps_all_where_there_is_room() -> None:
    router = make_router(replace(RTS, capacity_factor=3.0), 3)
    assert bool((router(GOLDEN).expert_ids >= 0).all())


def test_the_switch_router_s_gradient_in_closed_form() -> None:
    """d p_e / d logit_j = p_e (1[j = e] - p_j) for the chosen e; top-1 without division."""
    router = make_router(RoutingConfig(topk=1, normalize="none", router_dtype="fp64"), 3)
    cotangent = torch.arange(1.0, 7.0, dtype=torch.float64)
    routing = router(GOLDEN)
    (routing.probs[:, 0] * cotangent).sum().backward()
    p = GOLDEN.softmax(1)
    chosen = p.argmax(1)
    closed = torch.zeros(6, 3, dtype=torch.float64)
    for t in range(6):
        for j in range(3):
            delta = float(j == chosen[t])
            closed[t, j] = cotangent[t] * p[t, chosen[t]] * (delta - p[t, j])
    assert_close(router.weight.grad, closed.T @ GOLDEN, torch.float64, "router gradient")


def test_jitter_is_fp32_noise_in_training_alone() -> None:
    router = make_router(RoutingConfig(jitter_eps=0.01, aux_loss_coeff=0.0), 64)
    hidden = torch.ones(4, 64, dtype=torch.bfloat16)
    torch.manual_seed(0)
    jittered = router.logits(hidden)[0].detach()
    assert jittered.unique().numel() > 200  # bf16 has five values in 1 +- 0.01
    assert float((jittered - 1).abs().max()) <= 0.01
    assert torch.equal(router.eval().logits(hidden)[0].detach(), torch.ones(4, 64))


def test_expert_bias_moves_towards_even_load() -> None:
    routing = RoutingConfig(expert_bias=True, bias_update_rate=0.25, router_dtype="fp64")
    router = make_router(routing, 3)
    router(GOLDEN)
    load = router.local_tokens_per_expert.clone()
    assert load.tolist() == [4, 5, 3]
    router.update_expert_bias()
    assert router.expert_bias.tolist() == [0.0, -0.25, 0.25]
    assert router.local_tokens_per_expert.sum() == 0
    assert router.bfloat16().expert_bias.dtype == torch.float32


def test_a_global_loss_accumulates_over_micro_batches() -> None:
    routing = RoutingConfig(aux_loss_coeff=1.0, aux_loss_scope="global", router_dtype="fp64")
    router = make_router(routing, 3)
    first, second = GOLDEN[:4], GOLDEN[2:]
    router(first)
    loss = router(second).losses["global_load_balancing_loss"]
    ids = torch.cat([first.topk(2).indices, second.topk(2).indices])
    fractions = torch.bincount(ids.flatten(), minlength=3).double() / ids.numel()
    assert_close(loss, 3 * (fractions * second.softmax(1).mean(0)).sum(), torch.float64)
    router.reset_global_aux_loss_tracker()
    again = router(second).losses["global_load_balancing_loss"]
    alone = make_router(routing, 3)(second).losses["global_load_balancing_loss"]
    assert torch.equal(again, alone)


H, E, T = 8, 4, 10
DROPPING = MoEConfig(
    hidden_size=H,
    ffn_hidden_size=8,
    num_experts=E,
    routing=RoutingConfig(
        router_dtype="fp64",
        capacity_factor=0.8,
        drop_policy="rank_position",
        group_tokens=5,
        aux_loss_coeff=0.1,
        aux_loss_scope="group",
        aux_loss_counts="top1",
    ),
)


def run_layer(ep: int) -> dict[str, Tensor]:
    """Output, gradients, losses and drops of this rank, with experts over `ep` ranks."""
    groups = create_expert_groups(ParallelConfig(world_size=4, ep=ep))
    layer = MoELayer(DROPPING, groups, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    local = slice(groups.ep_rank * E // ep, (groups.ep_rank + 1) * E // ep)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            whole = torch.randn((E, *parameter.shape[1:]), generator=generator, dtype=torch.float64)
            parameter.copy_(whole if name.startswith("router") else whole[local])
    own = torch.Generator().manual_seed(dist.get_rank())
    hidden = torch.randn(T, 1, H, generator=own, dtype=torch.float64).requires_grad_()
    output = layer(hidden)
    (output * torch.arange(H)).sum().backward()
    router: Any = layer.router
    routing: Routing = router(hidden.detach()[:, 0])
    return {
        "output": output.detach(),
        "hidden gradient": grad_of(hidden),
        "router gradient": grad_of(router.weight),
        "dropped": (routing.expert_ids < 0).sum(),
        **routing.losses,
    }


POOLED = ("micro_batch", "sequence", "group", "global")


def pooled_routing(scope: str) -> RoutingConfig:
    return RoutingConfig(
        router_dtype="fp64",
        aux_loss_coeff=0.3,
        z_loss_coeff=0.2,
        aux_loss_scope=scope,  # type: ignore[arg-type]
        group_tokens=4 if scope == "group" else None,
    )


def rank_logits(rank: int) -> Tensor:
    """[6, 3] of two sequences."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(6, 3, generator=generator, dtype=torch.float64)


def run_pooled(scope: str) -> tuple[Tensor, Tensor]:
    """Balancing loss [] and router gradient of this rank; ranks 0 1 and 2 3 share tokens."""
    groups = create_expert_groups(ParallelConfig(world_size=4, tp=2, ep=2, etp=1))
    config = MoEConfig(
        hidden_size=3, ffn_hidden_size=4, num_experts=3, routing=pooled_routing(scope)
    )
    router = TopKRouter(config, groups, dtype=torch.float64)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    routing = router(rank_logits(dist.get_rank()), 2)
    (routing.probs * 0).sum().backward()
    return routing.losses[LOSS[scope]], grad_of(router.weight)


def run_rank() -> tuple[list[dict[str, Tensor]], dict[str, tuple[Tensor, Tensor]]]:
    return [run_layer(ep) for ep in (1, 2, 4)], {scope: run_pooled(scope) for scope in POOLED}


@pytest.fixture(scope="module")
def ranks() -> list[Any]:
    """What `run_rank` returns on each of four ranks."""
    return run_ranks(4, run_rank)


def test_ep_changes_nothing_with_the_same_routing_groups(ranks: list[Any]) -> None:
    for (one, *others), _ in ranks:
        assert one["dropped"] > 0
        for other in others:
            assert other.keys() == one.keys()
            for name in one:
                bound = 1e-12 * float(one[name].abs().max())
                assert float((other[name] - one[name]).abs().max()) <= bound, name


@pytest.mark.parametrize("scope", POOLED)
def test_losses_are_over_all_ranks_that_share_tokens(ranks: list[Any], scope: str) -> None:
    """The parts of ranks that share a batch add up to its loss, and their gradients with them."""
    everyone = torch.cat([rank_logits(rank) for rank in range(4)]).topk(2).indices.tolist()
    for pair in ((0, 1), (2, 3)):
        hidden = torch.cat([rank_logits(rank) for rank in pair])
        weight = torch.eye(3, dtype=torch.float64).requires_grad_()
        logits = hidden @ weight.T
        scores, counted = logits.softmax(1), hidden.topk(2).indices.tolist()
        if scope == "global":  # choices of all ranks, scores of the pair
            counts = torch.bincount(torch.tensor(everyone).flatten(), minlength=3).double()
            aux = 3 * (counts / 48 * scores.mean(0)).sum()
        elif scope == "group":  # groups do not span ranks
            parts = [reference.pools_of(6, 2, pooled_routing(scope)) for _ in pair]
            aux = balancing_loss(scores, counted, parts[0] + [pool + 9 for pool in parts[1]])
        else:
            aux = balancing_loss(scores, counted, reference.pools_of(12, 2, pooled_routing(scope)))
        (0.3 * aux + 0.2 * logits.logsumexp(1).square().mean()).backward()
        found = [ranks[rank][1][scope] for rank in pair]
        assert float(found[0][0] + found[1][0]) == pytest.approx(float(aux.detach()), rel=1e-12)
        error = (found[0][1] + found[1][1] - grad_of(weight)).abs().max()
        assert float(error) <= 1e-12 * float(grad_of(weight).abs().max())
