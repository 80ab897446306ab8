"""Every routing policy against a reference written from the papers, and laws of its own."""

import math
import random
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import routing_reference as reference
import torch
import torch.distributed as dist
from spawn import run_ranks
from tolerance import assert_close
from torch import Tensor

from ep_plugin import (
    ConfigError,
    ExpertGroups,
    MoEConfig,
    MoELayer,
    ParallelConfig,
    RoutingConfig,
    create_expert_groups,
)
from ep_plugin.contracts import Routing
from ep_plugin.router import _random
from ep_plugin.router._capacity import capacity
from ep_plugin.router.expert_choice import ExpertChoiceRouter
from ep_plugin.router.topk import TopKRouter

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


def random_case(rng: random.Random, fixed: dict[str, Any]) -> tuple[RoutingConfig, Any, int]:
    """A random setting with `fixed` fields, logits [T, E] and the number of sequences.

    In half of the cases tokens repeat, so that policies meet ties; there are none inside a row.
    """
    experts, num_sequences = rng.choice([2, 3, 4, 6, 8]), rng.choice([1, 2, 3])
    tokens = num_sequences * rng.randint(1, 12)
    topk = fixed.get("topk", rng.randint(1, min(4, experts)))
    policy = fixed.get("drop_policy", "none")
    settings: dict[str, Any] = {
        "topk": topk,
        "score_function": rng.choice(["softmax", "sigmoid"]),
        "normalize": rng.choice(["before_drop", "after_drop", "none"]),
        "scaling_factor": rng.choice([1.0, 2.5]),
        "group_tokens": rng.choice([None, 4, 7]),
        "min_capacity": rng.choice([0, 1, 4]),
        "capacity_rounding": rng.choice(["floor", "round", "ceil", "floor_x4"]),
        "capacity_counts_topk": rng.choice([True, False]),
        "aux_loss_coeff": 0.01,
        "aux_loss_counts": rng.choice(["topk", "top1"]),
        "aux_loss_scope": rng.choice(["micro_batch", "sequence", "global", "group"]),
        "z_loss_coeff": 0.01,
    }
    if policy != "none":
        settings["capacity_factor"] = rng.choice([0.3, 0.5, 1.0, 1.25, 2.5])
        settings["eval_capacity_factor"] = rng.choice([None, 1.0])
    if rng.random() < 0.3 and not fixed.get("second_expert") and not fixed.get("noise"):
        settings["expert_bias"] = True
    if experts in (4, 8) and topk == 2 and rng.random() < 0.5 and "noise" not in fixed:
        settings |= {"num_groups": experts // 2, "group_topk": rng.choice([1, 2])}
    settings |= fixed
    if settings["aux_loss_scope"] == "group" and settings["group_tokens"] is None:
        settings["group_tokens"] = 5
    logits = np.random.randn(tokens, experts) * 2
    if rng.random() < 0.5:
        logits = logits[np.random.randint(0, tokens, tokens)]
    return RoutingConfig(router_dtype="fp64", **settings), logits, num_sequences


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
            self.drawn[before:] = [values.numpy()]  # in place of what it was made of
            return values

        return draw


@pytest.mark.parametrize("policy", POLICIES)
def test_a_thousand_random_cases(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, recorder = random.Random(policy), Recorder(monkeypatch)
    np.random.seed(1)
    torch.manual_seed(1)
    dropped = 0
    for _ in range(1000):
        routing, logits, num_sequences = random_case(rng, POLICIES[policy])
        router = make_router(routing, logits.shape[1])
        bias = np.zeros(logits.shape[1])
        if routing.expert_bias:
            bias = np.random.rand(logits.shape[1]) / 7
            router.expert_bias.copy_(torch.tensor(bias))
            bias = router.expert_bias.double().numpy()
        training = rng.random() < 0.8
        router.train(training)
        recorder.drawn.clear()
        found = router(torch.tensor(logits), num_sequences)
        names = []
        if routing.noise == "rsample" and training:
            names.append("rsample")
        if routing.second_expert in ("sampling", "random"):
            names.append("second")
        factor = routing.capacity_factor if training else routing.eval_capacity_factor
        if routing.drop_policy == "random" and factor is not None:
            names.append("random")
        draws = dict(zip(names, recorder.drawn, strict=True))
        scores = torch.tensor(logits)
        scores = scores.softmax(1) if routing.score_function == "softmax" else scores.sigmoid()
        expected = reference.route(
            *(logits, routing),
            num_sequences=num_sequences,
            training=training,
            bias=bias,
            draws=draws,
            scores=scores.numpy(),
        )
        assert found.expert_ids.tolist() == expected.ids, routing
        weights = torch.tensor(expected.probs, dtype=torch.float64)
        assert torch.allclose(found.probs, weights, rtol=1e-9, atol=1e-12), routing
        if training:
            aux = float(found.losses[LOSS[routing.aux_loss_scope]])
            assert aux == pytest.approx(expected.losses["aux"], rel=1e-9), routing
            assert float(found.losses["z_loss"]) == pytest.approx(expected.losses["z"], rel=1e-9)
        else:
            assert not found.losses
        dropped += int((found.expert_ids < 0).sum())
    assert (dropped > 500) == (policy != "drop none")


def test_fp32_chooses_alike() -> None:
    """Masks equal and weights to 1e-6 for what fp64 and fp32 logits say alike."""
    rng = random.Random(5)
    for _ in range(200):
        routing, logits, num_sequences = random_case(rng, {"drop_policy": "rank_position"})
        routing = replace(routing, expert_bias=False)
        exact = make_router(routing, logits.shape[1])(torch.tensor(logits), num_sequences)
        router = make_router(replace(routing, router_dtype="fp32"), logits.shape[1])
        found = router(torch.tensor(logits), num_sequences)
        assert found.probs.dtype == torch.float32
        assert torch.equal(found.expert_ids, exact.expert_ids)
        assert torch.allclose(found.probs.double(), exact.probs, rtol=1e-6, atol=1e-6)


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
    jittered = router.logits(hidden)
    assert jittered.unique().numel() > 200  # bf16 has five values in 1 +- 0.01
    assert float((jittered - 1).abs().max()) <= 0.01
    assert float((router.eval().logits(hidden) - 1).abs().max()) == 0


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
    fractions = torch.bincount(ids.flatten(), minlength=3) / ids.numel()
    assert_close(loss, 3 * (fractions * second.softmax(1).mean(0)).sum(), torch.float32)
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


def run_layer(ep: int) -> tuple[list[Tensor], int]:
    """Output, input gradient and router gradient of this rank, with experts over `ep` ranks."""
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
    dropped = int((layer.router(hidden.detach()[:, 0]).expert_ids < 0).sum())
    router: Any = layer.router
    return [output.detach(), hidden.grad, router.weight.grad], dropped  # type: ignore[list-item]


def run_degrees() -> list[tuple[list[Tensor], int]]:
    return [run_layer(ep) for ep in (1, 2, 4)]


def test_ep_changes_nothing_with_the_same_routing_groups() -> None:
    for one, *others in run_ranks(4, run_degrees):
        assert one[1] > 0  # tokens were dropped
        for other in others:
            assert other[1] == one[1]
            for x, y in zip(other[0], one[0], strict=True):
                assert_close(x, y, torch.float64)


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "top-1 divided by itself": (
        {"topk": 1}, "normalize = none would do", {"topk": 1, "normalize": "none"}),
    "capacity, dropless": (
        {"capacity_factor": 1.25}, "drop_policy = probs would do",
        {"capacity_factor": 1.25, "drop_policy": "probs"}),
    "policy, no capacity": (
        {"drop_policy": "random"}, "capacity_factor = 1.25 would do",
        {"drop_policy": "random", "capacity_factor": 1.25}),
    "second of one": (
        {"topk": 1, "normalize": "none", "second_expert": "random"},
        "second_expert = all would do", {"topk": 1, "normalize": "none"}),
    "groups without a choice": ({"num_groups": 2}, "both None would do", {}),
    "loss per group of none": (
        {"aux_loss_scope": "group"}, "aux_loss_scope = micro_batch would do", {}),
    "noise over a bias": (
        {"noise": "rsample", "expert_bias": True}, "noise = none would do", {"expert_bias": True}),
    "no such score": ({"score_function": "tanh"}, "must be one of softmax, sigmoid", {}),
    "a negative factor": ({"scaling_factor": -1.0}, "1.0 would do", {"scaling_factor": 1.0}),
    "jitter above one": ({"jitter_eps": 1.5}, "0.01 would do", {"jitter_eps": 0.01}),
    "threshold of zero": ({"second_threshold": 0.0}, "0.2 would do", {"second_threshold": 0.2}),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_refused_with_a_way_out(case: str) -> None:
    settings, message, alternative = CONTRADICTIONS[case]
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        RoutingConfig(**settings)
    assert any(str(value) in str(raised.value) for value in settings.values())
    RoutingConfig(**alternative)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_groups": 3, "group_topk": 1}, "num_groups (3) must divide num_experts (8)"),
        ({"num_groups": 4, "group_topk": 5}, "group_topk (5) must be at most num_groups (4)"),
        ({"num_groups": 4, "group_topk": 2, "topk": 3}, "topk (3) must be a multiple of"),
        ({"topk": 9}, "topk (9) must be at most num_experts (8); topk = 8 would do"),
    ],
)  # fmt: skip
def test_routing_that_does_not_fit_the_experts_is_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        MoEConfig(
            hidden_size=8, ffn_hidden_size=8, num_experts=8, routing=RoutingConfig(**settings)
        )


def test_expert_choice_is_refused_unless_forced() -> None:
    config = {"hidden_size": 8, "ffn_hidden_size": 8, "num_experts": 8, "router": "expert_choice"}
    with pytest.raises(ConfigError, match="a causal model would see its future; router = topk"):
        MoEConfig(**config)  # type: ignore[arg-type]
    forced = RoutingConfig(force_expert_choice=True)
    config["routing"] = forced  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="needs capacity_factor"):
        MoELayer(MoEConfig(**config))  # type: ignore[arg-type]
