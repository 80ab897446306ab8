"""Laws every dispatcher obeys: adjoint, conservation, layout. A new file is tested at once."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from routings import NUM_EXPERTS, NUM_RANKS, count, hard_cases
from spawn import run_ranks
from tolerance import assert_close
from torch import Tensor

from ep_plugin import ConfigError, ExpertGroups, MoEConfig, ParallelConfig, create_expert_groups
from ep_plugin.moe.interfaces import Dispatched, Dispatcher, Routing, combine, dispatch
from ep_plugin.registry import available, resolve

H = 4
CONFIG = MoEConfig(hidden_size=H, ffn_hidden_size=8, num_experts=NUM_EXPERTS)
SEVERAL = [(2, 1, None), (4, 1, None), (2, 2, None), (1, 4, None)]
DEGREES: dict[str, list[tuple[int, int, int | None]]] = {  # name -> ep, etp, ranks of a node
    "local": [(1, 1, None)],
    "alltoall": SEVERAL,
    "symm_mem": SEVERAL,
    # Nodes of one, two and four ranks, and of three: then groups span them unevenly.
    "hierarchical": [(4, 1, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2), (4, 1, 4), (4, 1, 3), (2, 1, 3)],
}
ON_GPUS = ("deepep",)  # bf16 over NVLink alone: tests/moe/test_deepep.py
ON_CPU = [name for name in available("dispatcher") if name not in ON_GPUS]


def origin(rank: int, num_tokens: int) -> Tensor:
    """Rows that say where they come from: [T, H], columns rank and token."""
    rows = torch.zeros(num_tokens, H, dtype=torch.float64)
    rows[:, 0], rows[:, 1] = rank, torch.arange(num_tokens)
    return rows


def routing_of(ids: Tensor, rank: int) -> Routing:
    """Probabilities encode (rank, token, choice) as well."""
    tokens, topk = ids.shape
    probs = 1000.0 * rank + torch.arange(tokens * topk, dtype=torch.float64).view(tokens, topk)
    return Routing(ids, probs, count(ids))


def expected_rows(ids: list[Tensor], sources: list[int], expert: int) -> list[tuple[int, ...]]:
    """(rank, token, choice) of every row of `expert`, from each source rank in order."""
    return [
        (rank, token, choice)
        for rank in sources
        for token, chosen in enumerate(ids[rank].tolist())
        for choice, chosen_expert in enumerate(chosen)
        if chosen_expert == expert
    ]


def check_layout(
    inbox: Dispatched, ids: list[Tensor], groups: ExpertGroups, in_order: bool
) -> None:
    """Each expert's tokens come in source order, and each is what its origin says."""
    sources = [dist.get_rank()]
    if groups.ep_etp is not None:
        sources = dist.get_process_group_ranks(groups.ep_etp)
    local = NUM_EXPERTS // groups.ep_size
    topk = ids[0].shape[1]
    for i in range(local):
        expected = expected_rows(ids, sources, groups.ep_rank * local + i)
        assert int(inbox.tokens_per_expert[i]) == len(expected)
        found = [
            (int(row[0]), int(row[1]), int(prob) - 1000 * int(row[0]) - int(row[1]) * topk)
            for row, chosen, probs in zip(inbox.tokens, inbox.expert_ids, inbox.probs, strict=True)
            for prob in probs[chosen == i]
        ]
        # Rows that were passed on come by relay; those of one source are in order all the same.
        assert (found if in_order else sorted(found, key=lambda row: row[0])) == expected
    assert int(inbox.tokens_per_expert.sum()) == int((inbox.expert_ids >= 0).sum())


def check_adjoint(dispatcher: Dispatcher, routing: Routing, rank: int) -> None:
    """Summed over ranks <dispatch(x), y> = <x, combine(y)>, and each is the other's backward."""
    generator = torch.Generator().manual_seed(rank)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = random(routing.expert_ids.shape[0], H).requires_grad_()
    inbox = dispatch(dispatcher, x, routing)
    y = random(*inbox.tokens.shape).requires_grad_()
    combined = combine(dispatcher, y, inbox)
    products = torch.stack([(inbox.tokens * y).sum(), (x * combined).sum()]).detach()
    dist.all_reduce(products)
    assert_close(products[0], products[1], torch.float64, "adjoint")
    backward_of_dispatch = torch.autograd.grad(inbox.tokens, x, y.detach(), retain_graph=True)[0]
    assert_close(backward_of_dispatch, combined, torch.float64, "backward of dispatch")
    backward_of_combine = torch.autograd.grad(combined, y, x.detach())[0]
    assert_close(backward_of_combine, inbox.tokens, torch.float64, "backward of combine")


def check_conservation(inbox: Dispatched, ids: list[Tensor], groups: ExpertGroups) -> None:
    """Choices received over all ranks = choices kept by all routers, once per etp rank."""
    received = (inbox.expert_ids >= 0).sum()
    dist.all_reduce(received)
    kept = sum(int((rank_ids >= 0).sum()) for rank_ids in ids)
    assert int(received) == kept * groups.etp_size


def check_dispatcher(name: str, dedup: bool) -> int:
    checked = 0
    rank = dist.get_rank()
    for ep, etp, ranks_per_node in DEGREES[name]:
        parallel = ParallelConfig(world_size=NUM_RANKS, ep=ep, etp=etp)
        groups = create_expert_groups(parallel, ranks_per_node)
        dispatcher = resolve("dispatcher", name)(replace(CONFIG, dispatch_dedup=dedup), groups)
        for ids in hard_cases().values():
            routing = routing_of(ids[rank], rank)
            inbox = dispatch(dispatcher, origin(rank, len(ids[rank])), routing)
            check_layout(inbox, ids, groups, in_order=name != "hierarchical")
            check_conservation(inbox, ids, groups)
            check_adjoint(dispatcher, routing, rank)
            checked += 1
    return checked


WAYS = [(name, dedup) for name in ON_CPU for dedup in (False, True)]
WAYS.remove(("hierarchical", True))  # it reads no such setting


@pytest.mark.parametrize(("name", "dedup"), WAYS)
def test_laws(name: str, dedup: bool) -> None:
    cases = len(DEGREES[name]) * len(hard_cases())
    assert run_ranks(NUM_RANKS, check_dispatcher, name, dedup) == [cases] * NUM_RANKS


@pytest.mark.parametrize("name", ["alltoall", "hierarchical"])
def test_no_groups_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="use dispatcher='local'"):
        resolve("dispatcher", name)(CONFIG, ExpertGroups())
