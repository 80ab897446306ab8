"""Hard routings: for each case, the expert choices of four ranks (E = 4), -1 = dropped."""

import torch
from torch import Tensor

NUM_RANKS = 4
NUM_EXPERTS = 4


def hard_cases() -> dict[str, list[Tensor]]:
    """Name -> expert ids [T, K] of each rank; T differs between ranks and may be zero."""
    generator = torch.Generator().manual_seed(0)

    def random(tokens: int, topk: int, experts: int = NUM_EXPERTS) -> Tensor:
        scores = torch.rand(tokens, experts, generator=generator)
        return scores.topk(topk, dim=1).indices

    dropped = [random(tokens, 2) for tokens in (5, 4, 6, 3)]
    for ids in dropped:
        ids[torch.rand(ids.shape, generator=generator) < 0.4] = -1
    dropped[1][:] = -1  # a rank that sends nothing although it has tokens
    return {
        "different counts": [random(tokens, 2) for tokens in (7, 3, 5, 2)],
        "an expert without tokens": [random(tokens, 2, experts=3) for tokens in (4, 4, 3, 5)],
        "all tokens to one expert": [torch.full((tokens, 1), 2) for tokens in (4, 3, 2, 5)],
        "a rank without tokens": [random(tokens, 2) for tokens in (4, 0, 3, 5)],
        "no tokens at all": [random(0, 2) for _ in range(NUM_RANKS)],
        "top-1": [random(tokens, 1) for tokens in (6, 2, 4, 3)],
        "top-3": [random(tokens, 3) for tokens in (3, 2, 4, 1)],
        "dropped": dropped,
    }


def count(ids: Tensor, num_experts: int = NUM_EXPERTS) -> Tensor:
    """Rows per expert [E] of `ids` [T, K], dropped choices left out."""
    return torch.bincount(ids[ids >= 0], minlength=num_experts)
