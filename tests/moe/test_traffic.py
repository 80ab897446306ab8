"""What travels: bytes and messages of an exchange, counted on 8 ranks, against closed forms.

The hidden vectors are counted, whose rows are wider than any other tensor that is exchanged.
"""

from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from routings import count
from spawn import run_ranks
from torch import Tensor

from ep_plugin import MoEConfig, ParallelConfig, create_expert_groups
from ep_plugin.commands.plan.network import Network, Traffic, load
from ep_plugin.moe.interfaces import Routing, combine, dispatch
from ep_plugin.moe.layer import settled
from ep_plugin.registry import resolve

RANKS, EXPERTS, TOKENS, H, K = 8, 32, 64, 24, 4
BYTES = 8 * H  # of a hidden vector in float64


def balanced(rank: int) -> Tensor:
    """Consecutive tokens choose consecutive blocks of K experts, so all experts get as many."""
    first = K * torch.arange(TOKENS).unsqueeze(1) + 3 * rank
    return (first + torch.arange(K)) % EXPERTS


def random(rank: int) -> Tensor:
    """Distinct experts, a third of the choices dropped."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).topk(K, dim=1).indices
    return ids.masked_fill(torch.rand(TOKENS, K, generator=generator) < 0.3, -1)


def every_pair(rank: int) -> Tensor:
    """Every pair of experts once, on every rank: counts are what a model of chance expects."""
    return torch.combinations(torch.arange(EXPERTS), 2)


CASES = {"balanced": balanced, "random": random, "every pair": every_pair}


class Leg(NamedTuple):
    """One exchange of hidden vectors."""

    size: int  # bytes to others
    messages: int


def sent(case: str, etp: int, ranks_per_node: int | None = None, **how: Any) -> list[Leg]:
    """Return the exchanges of this rank's dispatch; those of combine send as much in all."""
    parallel = ParallelConfig(world_size=RANKS, ep=RANKS // etp, etp=etp)
    groups = create_expert_groups(parallel, ranks_per_node)
    config = MoEConfig(hidden_size=H, ffn_hidden_size=8, num_experts=EXPERTS, **how)
    config = settled(config, groups, torch.device("cpu"))
    dispatcher = resolve("dispatcher", config.dispatcher)(config, groups)
    ids = CASES[case](dist.get_rank())
    routing = Routing(ids, torch.rand(ids.shape, dtype=torch.float64), count(ids, EXPERTS))
    legs: list[Leg] = []
    real = dist.all_to_all_single

    def recording(out: Tensor, rows: Tensor, *splits: Any, group: Any, **more: Any) -> Any:
        if rows.dim() == 2 and rows.shape[1] == H:
            own = dist.get_rank(group)
            others = [n for other, n in enumerate(splits[1]) if other != own]
            legs.append(Leg(sum(others) * rows.element_size() * H, len(others)))
        return real(out, rows, *splits, group=group, **more)

    with patch.object(dist, "all_to_all_single", recording):
        inbox = dispatch(dispatcher, torch.rand(len(ids), H, dtype=torch.float64), routing)
        combine(dispatcher, inbox.tokens, inbox)
    there = len(legs) // 2
    total = torch.tensor([leg.size for leg in legs])
    dist.all_reduce(total)
    assert torch.equal(total[:there], total[there:].flip(0))  # every row comes home
    return legs[:there]


def hosts(case: str, rank: int, etp: int) -> list[list[int]]:
    """The ranks each token of `rank` goes to, once for each of its choices."""
    per_rank = EXPERTS // (RANKS // etp)
    return [
        [expert // per_rank * etp + copy for expert in chosen if expert >= 0 for copy in range(etp)]
        for chosen in CASES[case](rank).tolist()
    ]


def rows_to_others(case: str, rank: int, dedup: bool, etp: int) -> int:
    """Rows that `rank` must send to other ranks: one for each choice, or each rank of a token."""
    return sum(r != rank for to in hosts(case, rank, etp) for r in (set(to) if dedup else to))


def rows_on_two_legs(case: str, rank: int, etp: int, near: int) -> list[int]:
    """Rows that `rank` sends to its place on other nodes, and those it passes on inside its own."""
    node, place = divmod(rank, near)
    between = sum(
        other != node for to in hosts(case, rank, etp) for other in {r // near for r in to}
    )
    passed_on = sum(
        r != rank and r // near == node
        for source in range(place, RANKS, near)
        for to in hosts(case, source, etp)
        for r in set(to)
    )
    return [between, passed_on]


ALL = [("balanced", 1), ("random", 1), ("random", 2), ("every pair", 1)]
NODES = [4, 2]  # ranks of a node


def sent_in_all_cases() -> list[list[Leg]]:
    flat = [sent(case, etp, dispatch_dedup=dedup) for case, etp in ALL for dedup in (False, True)]
    return flat + [
        sent(case, etp, near, dispatcher="hierarchical") for case, etp in ALL for near in NODES
    ]


@pytest.fixture(scope="module")
def found() -> list[list[list[Leg]]]:
    """For each rank what it sent: flat and de-duplicated in each case, then on nodes of 4 and 2."""
    return run_ranks(RANKS, sent_in_all_cases)


def test_bytes_are_those_of_the_closed_form(found: list[list[list[Leg]]]) -> None:
    for rank, results in enumerate(found):
        for index, legs in enumerate(results[: 2 * len(ALL)]):
            (case, etp), dedup = ALL[index // 2], bool(index % 2)
            size = rows_to_others(case, rank, dedup, etp) * BYTES
            assert legs == [Leg(size, RANKS - 1)], (case, etp, dedup)
        flat, dedup = results[0][0].size, results[1][0].size
        assert flat == K * TOKENS * BYTES * (RANKS - 1) // RANKS  # k T h b (EP - 1) / EP
        assert dedup < flat


def test_on_two_legs_a_token_crosses_once_to_a_node(found: list[list[list[Leg]]]) -> None:
    """Bytes and messages, (G-1) + (p/G-1) of them, of 8 ranks as 2 nodes of 4 and 4 of 2."""
    for rank, results in enumerate(found):
        for index, legs in enumerate(results[2 * len(ALL) :]):
            (case, etp), near = ALL[index // 2], NODES[index % 2]
            rows = rows_on_two_legs(case, rank, etp, near)
            messages = [RANKS // near - 1, near - 1]
            sizes = [n * BYTES for n in rows]
            assert legs == [*map(Leg, sizes, messages)], (case, etp, near)


def test_the_network_model_counts_the_same_bytes(found: list[list[list[Leg]]]) -> None:
    traffic = Traffic(tokens=len(every_pair(0)), topk=2, hidden=H, experts=EXPERTS)
    for results in found:
        flat, dedup = results[2 * ALL.index(("every pair", 1)) :][:2]
        for how, (leg,) in (("flat", flat), ("dedup", dedup)):
            assert leg.size == pytest.approx(load(traffic, Network(RANKS), RANKS, how, 8).inside)
        for near, (between, inside) in zip(NODES, results[-len(NODES) :], strict=True):
            model = load(traffic, Network(near), RANKS, "hierarchical", 8)
            assert between.size == pytest.approx(model.outside, rel=1e-12)
            assert inside.size == pytest.approx(model.inside, rel=1e-12)
            assert between.messages == model.messages
