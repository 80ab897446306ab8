"""What a router did, in a few numbers, for the logs."""

import torch
from torch import Tensor

from ep_plugin.moe.router._choice import Choice


@torch.no_grad()
def metrics(choice: Choice, expert_ids: Tensor, padding: Tensor | None = None) -> dict[str, Tensor]:
    """Return sums over this rank's tokens but `padding` [T], each []; a mean divides by `tokens`.

    tokens              how many there were
    choices             how many they made, without those the second-expert policy left out
    dropped             choices that no expert had room for
    confidence          score of the first choice
    entropy             of all scores, in nats; ln E when the router cannot tell experts apart
    first, second       tokens whose first (second) choice was sent
    none                tokens that no expert saw
    """
    sent = expert_ids >= 0  # [T, K]
    wanted = choice.expert_ids >= 0
    entropy, confidence = choice.sums()
    columns = sent.sum(dim=0)  # [K]
    tokens, none = torch.full_like(columns[0], len(sent)), ~sent.any(dim=1)
    if padding is not None:
        tokens, none = (~padding).sum(), none & ~padding
    return {
        "tokens": tokens,
        "choices": wanted.sum(),
        "dropped": (wanted & ~sent).sum(),
        "confidence": confidence,
        "entropy": entropy,
        "first": columns[0],
        "second": columns[1] if len(columns) > 1 else torch.zeros_like(columns[0]),
        "none": none.sum(),
    }
