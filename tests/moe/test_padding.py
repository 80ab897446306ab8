"""Padding is as if it were not there: for losses, counts, capacity, experts and exchanges."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from torch import Tensor, nn

from ep_plugin import (
    ConfigError,
    ExpertGroups,
    MoEConfig,
    MoELayer,
    ParallelConfig,
    RoutingConfig,
    create_expert_groups,
)
from ep_plugin.moe.interfaces import Routing
from ep_plugin.moe.router._capacity import capacities, capacity
from ep_plugin.overlap.two_batch import two_batch
from ep_plugin.registry import resolve

LOSSES = {"aux_loss_coeff": 0.3, "z_loss_coeff": 0.2}
AXES: dict[str, tuple[Any, ...]] = {
    "topk": (1, 2, 3),
    "score_function": ("softmax", "sigmoid"),
    "normalize": ("before_drop", "after_drop", "none"),
    "expert_bias": (False, True),
    "second_expert": ("all", "threshold"),
    "aux_loss_scope": ("micro_batch", "sequence", "global", "group"),
    "aux_loss_counts": ("topk", "top1"),
    "drop_policy": ("none", "position", "rank_position", "probs", "bpr"),
    "capacity_rounding": ("floor", "round", "ceil", "floor_x4"),
    "capacity_counts_topk": (False, True),
    "min_capacity": (0, 2),
    "group_tokens": (None, 3, 7),
    "groups": (False, True),
}


def random_routing(rng: random.Random) -> RoutingConfig | None:
    """Return settings of every axis that draws no numbers; None where they exclude each other."""
    given = {name: rng.choice(values) for name, values in AXES.items()}
    if given.pop("groups"):
        given |= {"num_groups": 4, "group_topk": 2}
    if given["drop_policy"] == "none":
        for name in ("capacity_rounding", "capacity_counts_topk", "min_capacity"):
            del given[name]
    else:
        given |= {"capacity_factor": rng.choice((0.4, 0.8, 1.3)), "eval_capacity_factor": 0.7}
    if given["second_expert"] == "threshold":
        given["second_threshold"] = 0.3
    if given["drop_policy"] == "none" and given["aux_loss_scope"] != "group":
        del given["group_tokens"]
    try:
        return RoutingConfig(router_dtype="fp64", **LOSSES, **given)
    except ConfigError:
        return None


def make_router(routing: RoutingConfig, name: str = "topk") -> Any:
    config = MoEConfig(
        hidden_size=5, ffn_hidden_size=4, num_experts=8, routing=routing, router=name
    )
    router: Any = resolve("router", name)(config, ExpertGroups(), None, torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        router.weight.copy_(torch.randn(8, 5, generator=generator, dtype=torch.float64))
        if routing.expert_bias:
            router.expert_bias.copy_(torch.rand(8, generator=generator) / 5)
    router.collect_metrics = True
    return router


def routed(router: Any, hidden: Tensor, sequences: int, *padding: Tensor) -> dict[str, Tensor]:
    """Return all that a router gives for `hidden`, with what it leaves behind and its gradients."""
    router.zero_grad()
    leaf = hidden.clone().requires_grad_()
    routing: Routing = router(leaf, sequences, *padding)
    cotangent = torch.arange(1.0, 1 + routing.probs.shape[1], dtype=torch.float64)
    (routing.probs * cotangent).sum().backward()
    found = {"ids": routing.expert_ids, "probs": routing.probs, "hidden": leaf.grad}
    found |= {"weight": router.weight.grad, "counts": routing.tokens_per_expert}
    found |= dict(routing.losses) | {f"metric {k}": v for k, v in routing.metrics.items()}
    for name in ("local_tokens_per_expert", "global_tokens_per_expert"):
        if getattr(router, name, None) is not None:
            found[name] = getattr(router, name).clone()
            getattr(router, name).zero_()
    return {name: value.detach() for name, value in found.items() if value is not None}


def check_law(router: Any, hidden: Tensor, positions: Tensor, sequences: int) -> int:
    """Route with padding at some positions of every sequence, and without those positions."""
    padding = positions.repeat_interleave(sequences)
    with_mask = routed(router, hidden, sequences, padding)
    without = routed(router, hidden[~padding], sequences)
    assert with_mask.keys() == without.keys()
    for name, expected in without.items():
        value = with_mask[name]
        if name in ("ids", "probs", "hidden"):
            nothing = -1 if name == "ids" else 0
            assert (value[padding] == nothing).all(), name
            value = value[~padding]
        torch.testing.assert_close(
            value, expected, rtol=1e-10, atol=1e-12, msg=f"{name}: {router.routing}"
        )
    return int((without["ids"] < 0).sum())


def test_any_router_s_padding_is_as_if_it_were_not_there() -> None:
    rng = random.Random(4)
    generator = torch.Generator().manual_seed(4)
    seen: dict[str, set[Any]] = {name: set() for name in AXES}
    checked = dropped = 0
    while checked < 150:
        routing = random_routing(rng)
        if routing is None:
            continue
        try:
            router = make_router(routing).train(rng.random() < 0.8)
        except ConfigError:
            continue
        length, sequences = rng.choice((1, 6, 13)), rng.choice((1, 2, 3))
        hidden = torch.randn(length * sequences, 5, generator=generator, dtype=torch.float64)
        positions = torch.rand(length, generator=generator) < rng.choice((0.2, 0.6, 1.0))
        dropped += check_law(router, hidden, positions, sequences)
        checked += 1
        for name in seen.keys() - {"groups"}:
            seen[name].add(getattr(routing, name))
    assert dropped > 100
    missing = {n: set(AXES[n]) - found for n, found in seen.items() if n != "groups"}
    assert not any(missing.values()), missing


@pytest.mark.parametrize("group_tokens", [None, 4])
def test_expert_choice_takes_no_padding(group_tokens: int | None) -> None:
    routing = RoutingConfig(
        router_dtype="fp64",
        capacity_factor=1.5,
        group_tokens=group_tokens,
        force_expert_choice=True,
    )
    router = make_router(routing, "expert_choice")
    hidden = torch.randn(13, 5, dtype=torch.float64)
    for positions in (torch.arange(13) % 3 == 0, torch.arange(13) < 11, torch.ones(13).bool()):
        check_law(router, hidden, positions, 1)


def test_capacities_are_those_of_each_number() -> None:
    sizes = torch.arange(40)
    for rounding in AXES["capacity_rounding"]:
        for counts in (False, True):
            routing = RoutingConfig(
                capacity_factor=1.0, drop_policy="probs", capacity_rounding=rounding,
                capacity_counts_topk=counts, min_capacity=1,
            )  # fmt: skip
            for factor in (0.3, 1.0, 1.25, 2.7):
                found = capacities(sizes, 6, 2, factor, routing).tolist()
                assert found == [capacity(n, 6, 2, factor, routing) for n in sizes.tolist()]


def test_sequences_with_other_padding_each_count_alike() -> None:
    """A loss per sequence is the mean over those that are not padding alone."""
    routing = RoutingConfig(router_dtype="fp64", aux_loss_scope="sequence", **LOSSES)
    router = make_router(routing)
    hidden = torch.randn(7, 3, 5, dtype=torch.float64)
    padding = torch.zeros(7, 3, dtype=torch.bool)
    padding[4:, 1], padding[:, 2] = True, True
    found = router(hidden.reshape(21, 5), 3, padding.reshape(-1)).losses
    alone = [router(hidden[~padding[:, b], b]).losses["seq_load_balancing_loss"] for b in range(2)]
    torch.testing.assert_close(found["seq_load_balancing_loss"], torch.stack(alone).mean())


SPREAD: list[dict[str, Any]] = [
    {"dispatcher": "alltoall"},
    {"dispatcher": "alltoall", "dispatch_dedup": True},
    {"dispatcher": "alltoall", "overlap": "chunked"},
    {"dispatcher": "alltoall", "overlap": "shared_expert"},
    {"dispatcher": "symm_mem"},
    {"dispatcher": "symm_mem", "overlap": "chunked"},
    {"dispatcher": "hierarchical"},
    {"dispatcher": "alltoall", "fp8": "rowwise"},
    {"dispatcher": "alltoall", "fp8": "blockwise", "overlap": "chunked"},
    {"dispatcher": "alltoall", "fp8": "rowwise", "dispatch_dtype": "fp8"},
]


def make_layer(how: dict[str, Any], groups: ExpertGroups) -> MoELayer:
    routing = RoutingConfig(topk=2, capacity_factor=0.9, drop_policy="probs", **LOSSES)
    config = MoEConfig(
        hidden_size=128,
        ffn_hidden_size=128,
        num_experts=8,
        routing=routing,
        deterministic=True,
        **how,
    )
    torch.manual_seed(5)
    shared = nn.Linear(128, 128, bias=False, dtype=torch.bfloat16)
    layer = MoELayer(config, groups, shared_expert=shared, dtype=torch.bfloat16)
    torch.manual_seed(6)
    nn.init.normal_(layer.router.weight)  # type: ignore[attr-defined]
    return layer


def passed(layer: MoELayer, hidden: Tensor, padding: Tensor | None) -> list[Tensor]:
    layer.zero_grad()
    leaf = hidden.clone().requires_grad_()
    output = layer(leaf, padding)
    output.float().square().sum().backward()
    grads = [parameter.grad for parameter in layer.parameters()]
    return [output.detach(), leaf.grad, *grads]  # type: ignore[list-item]


def check_layers() -> int:
    """On every way, unpadded tokens and all weights get what they get without the padding."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    parallel = ParallelConfig(world_size=ranks, ep=ranks)
    groups = create_expert_groups(parallel, ranks_per_node=1)
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(17, 128, generator=generator).bfloat16()
    padding = torch.rand(17, generator=generator) < 0.5
    padding[:] = True if rank == 1 else padding  # a rank with nothing else
    for how in SPREAD:
        layer = make_layer(how, groups)
        output, grad, *weights = passed(layer, hidden, padding)
        expected, expected_grad, *others = passed(layer, hidden[~padding], None)
        torch.testing.assert_close(output[~padding], expected, rtol=1e-2, atol=1e-2, msg=str(how))
        torch.testing.assert_close(grad[~padding], expected_grad, rtol=1e-2, atol=2e-2)
        shared: Any = layer.shared_expert
        assert torch.equal(output[padding], shared(hidden[padding])), how
        inbox = layer.dispatcher.start_dispatch(hidden, layer.route(hidden, padding)).wait()
        arrived = torch.tensor(len(inbox.tokens))
        dist.all_reduce(arrived)
        if how == SPREAD[0]:  # a row for each choice that is sent
            chosen = layer.route(hidden, padding).tokens_per_expert.sum()
            dist.all_reduce(chosen)
            assert int(arrived) == int(chosen) > 0
        for found, other in zip(weights[1:], others[1:], strict=True):
            if found is not None and found.dim() == 3:
                torch.testing.assert_close(found, other, rtol=1e-2, atol=5e-2, msg=str(how))
    return len(SPREAD)


def test_a_layer_s_padding_is_sent_nowhere() -> None:
    assert run_ranks(2, check_layers) == [len(SPREAD)] * 2


def test_on_one_rank_and_two_at_a_time() -> None:
    layer = make_layer({}, ExpertGroups())
    first, second = torch.randn(2, 9, 2, 128).bfloat16()
    masks = torch.rand(2, 9, 2) < 0.4
    together = two_batch(layer, first, second, (masks[0], masks[1]))
    for found, hidden, mask in zip(together, (first, second), masks, strict=True):
        assert torch.equal(found, layer(hidden, mask))
        assert not torch.equal(found, layer(hidden))


def check_shared_losses() -> int:
    """Two ranks that share sequences, one with more padding: their parts are one rank's losses."""
    rank = dist.get_rank()
    groups = create_expert_groups(ParallelConfig(world_size=2, tp=2, ep=2, etp=1))
    hidden = torch.randn(2, 10, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    padding = torch.arange(20).view(2, 10) % torch.tensor([[2], [5]]) == 0
    for scope in ("micro_batch", "sequence", "global"):
        routing = RoutingConfig(router_dtype="fp64", aux_loss_scope=scope, **LOSSES)
        config = MoEConfig(hidden_size=5, ffn_hidden_size=4, num_experts=8, routing=routing)
        alone = make_router(routing)
        router: Any = resolve("router", "topk")(config, groups, None, torch.float64)
        router.load_state_dict(alone.state_dict())
        found = router(hidden[rank], 2, padding[rank]).losses
        whole = alone(hidden.view(20, 5), 2, padding.view(20)).losses
        for name, value in whole.items():
            total = found[name].clone()
            dist.all_reduce(total)
            total /= 2 if name == "z_loss" else 1
            torch.testing.assert_close(total, value, msg=f"{scope} {name}")
    return 3


def test_losses_are_over_all_ranks_that_share_tokens() -> None:
    assert run_ranks(2, check_shared_losses) == [3, 3]


class Plain(nn.Module):
    """A router of one's own that knows nothing of padding."""

    def forward(self, hidden: Tensor, num_sequences: int = 1) -> Routing:
        raise AssertionError


def test_masks_that_cannot_be_are_refused() -> None:
    layer = make_layer({}, ExpertGroups())
    hidden = torch.randn(4, 2, 128).bfloat16()
    with pytest.raises(ConfigError, match=r"must be \[4, 2\] bool.*got \[2, 4\] bool"):
        layer(hidden, torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ConfigError, match=r"must be \[4, 2\] bool.*got \[4, 2\] float32"):
        layer(hidden, torch.zeros(4, 2))
    layer.router = Plain()
    layer.config = replace(layer.config)
    with pytest.raises(ConfigError, match="takes no padding mask"):
        layer(hidden, torch.zeros(4, 2, dtype=torch.bool))
