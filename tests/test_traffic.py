"""What travels: bytes and messages of an exchange, counted on 8 ranks, against closed forms.

The hidden vectors are counted, whose rows are wider than any other tensor that is exchanged.
"""

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from routings import count
from spawn import run_ranks
from torch import Tensor

from ep_plugin import MoEConfig, ParallelConfig, create_expert_groups
from ep_plugin.contracts import Routing, combine, dispatch
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


CASES = {"balanced": balanced, "random": random}


def sent(case: str, dedup: bool, etp: int) -> tuple[int, int]:
    """Return bytes and messages of hidden vectors that this rank sent to others, there and back."""
    ep = RANKS // etp
    groups = create_expert_groups(ParallelConfig(world_size=RANKS, ep=ep, etp=etp))
    config = MoEConfig(hidden_size=H, ffn_hidden_size=8, num_experts=EXPERTS, dispatch_dedup=dedup)
    dispatcher = resolve("dispatcher", "alltoall")(config, groups)
    ids, rank = CASES[case](dist.get_rank()), dist.get_rank()
    routing = Routing(ids, torch.rand(TOKENS, K, dtype=torch.float64), count(ids, EXPERTS))
    counted: list[int] = []
    real = dist.all_to_all_single

    def recording(out: Tensor, rows: Tensor, *splits: Any, **more: Any) -> Any:
        if rows.dim() == 2 and rows.shape[1] == H:
            others = [n for other, n in enumerate(splits[1]) if other != rank]
            counted.append(sum(others) * rows.element_size() * H)
            counted.append(len(others))
        return real(out, rows, *splits, **more)

    with patch.object(dist, "all_to_all_single", recording):
        inbox = dispatch(dispatcher, torch.rand(TOKENS, H, dtype=torch.float64), routing)
        combine(dispatcher, inbox.tokens, inbox)
    there, back = counted[::2]
    total = torch.tensor([there, back])
    dist.all_reduce(total)
    assert total[0] == total[1]  # every row comes home
    return there, counted[1]


def rows_to_others(case: str, rank: int, dedup: bool, etp: int) -> int:
    """Rows that `rank` must send to other ranks: one for each choice, or each rank of a token."""
    per_rank = EXPERTS // (RANKS // etp)
    ranks = [
        [expert // per_rank * etp + copy for expert in chosen if expert >= 0 for copy in range(etp)]
        for chosen in CASES[case](rank).tolist()
    ]
    return sum(r != rank for chosen in ranks for r in (set(chosen) if dedup else chosen))


ALL = [("balanced", 1), ("random", 1), ("random", 2)]


def sent_in_all_cases() -> list[tuple[int, int]]:
    return [sent(case, dedup, etp) for case, etp in ALL for dedup in (False, True)]


def test_bytes_are_those_of_the_closed_form() -> None:
    found = run_ranks(RANKS, sent_in_all_cases)
    for rank, results in enumerate(found):
        for index, (size, messages) in enumerate(results):
            (case, etp), dedup = ALL[index // 2], bool(index % 2)
            assert size == rows_to_others(case, rank, dedup, etp) * BYTES, (case, etp, dedup)
            assert messages == RANKS - 1
        assert results[0][0] == K * TOKENS * BYTES * (RANKS - 1) // RANKS  # k T h b (EP - 1) / EP
        assert results[1][0] < results[0][0]
