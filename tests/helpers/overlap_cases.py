"""A layer under each schedule: the cases, and what is compared.

With whole numbers all sums are exact, so products over fewer rows give equal bits on any device.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from routings import NUM_EXPERTS, NUM_RANKS, count, hard_cases
from torch import Tensor, nn

from ep_plugin import ExpertGroups, MoEConfig, MoELayer
from ep_plugin.moe.interfaces import Routing

SIZES = {"off": (16, 32), "rowwise": (16, 32), "blockwise": (200, 80)}  # fp8 -> H, F


def routings() -> dict[str, list[Tensor]]:
    """Name -> expert ids [T, K] of each of 4 ranks; the hard cases and larger top-4."""
    generator = torch.Generator().manual_seed(5)

    def top4(tokens: int) -> Tensor:
        ids = torch.rand(tokens, NUM_EXPERTS, generator=generator).topk(4, dim=1).indices
        return ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -1)

    return hard_cases() | {"top-4": [top4(tokens) for tokens in (19, 8, 0, 31)]}


class ScriptedRouter(nn.Module):
    """Sends tokens where a case says, with weights that are parameters."""

    def __init__(self, ids: Tensor, probs: Tensor, num_experts: int = NUM_EXPERTS) -> None:
        super().__init__()
        self.ids, self.num_experts = ids, num_experts
        self.probs = nn.Parameter(probs.masked_fill(ids < 0, 0))

    def forward(self, hidden: Tensor, num_sequences: int) -> Routing:
        return Routing(self.ids, self.probs, count(self.ids, self.num_experts))


@dataclass(frozen=True)
class Draw:
    """Numbers for one rank: whole ones and powers of two, or normal ones."""

    generator: torch.Generator
    whole: bool
    device: torch.device
    dtype: torch.dtype

    def matrix(self, *shape: int) -> Tensor:
        if self.whole:
            values = torch.randint(-2, 3, shape, generator=self.generator).float()
        else:
            values = torch.randn(*shape, generator=self.generator)
        return values.to(self.device, self.dtype)

    def probs(self, *shape: int) -> Tensor:
        values = torch.rand(*shape, generator=self.generator)
        return (0.5 ** (3 * values).floor() if self.whole else values).to(self.device)


def run(
    config: MoEConfig, groups: ExpertGroups, ids: list[Tensor], whole: bool, device: Any = "cpu"
) -> dict[str, Tensor]:
    """Return this rank's output and gradients."""
    rank, narrow = dist.get_rank(), config.fp8 != "off" or torch.device(device).type == "cuda"
    dtype = torch.bfloat16 if narrow else torch.float32
    generator = torch.Generator().manual_seed(rank)
    draw = Draw(generator, whole, torch.device(device), dtype)
    shared = nn.Linear(config.hidden_size, config.hidden_size, bias=False, device=device)
    shared = shared.to(dtype)
    layer = MoELayer(
        config, groups, shared_expert=shared, init_method=None, device=device, dtype=dtype
    )
    chosen = ids[rank].to(device)
    layer.router = ScriptedRouter(chosen, draw.probs(*chosen.shape))
    with torch.no_grad():
        for parameter in (*layer.experts.parameters(), *shared.parameters()):
            parameter.copy_(draw.matrix(*parameter.shape))
    hidden = draw.matrix(len(chosen), config.hidden_size).requires_grad_()
    output = layer(hidden)
    (output * draw.matrix(*output.shape)).sum().backward()
    leaves = {"hidden": hidden, **dict(layer.named_parameters())}
    return {"output": output.detach()} | {name: leaf.grad for name, leaf in leaves.items()}  # type: ignore[dict-item]


def sized(config: MoEConfig, **changes: Any) -> MoEConfig:
    """Return `config` with changes, and sizes that its FP8 recipe takes."""
    fp8 = changes.get("fp8", config.fp8)
    hidden, ffn = SIZES[fp8]
    if fp8 != "off" and changes.get("fp8_wgrad") != "bf16":  # no product is left for a grouped GEMM
        changes["gemm"] = "auto"
    return replace(config, hidden_size=hidden, ffn_hidden_size=ffn, **changes)


BASE = MoEConfig(
    hidden_size=16,
    ffn_hidden_size=32,
    num_experts=NUM_EXPERTS,
    activation="relu",
    gemm="torch_grouped",
)
VARIANTS: list[dict[str, Any]] = [
    {"save": "recompute"},
    {"save": "fp8"},
    {"fp8": "rowwise", "save": "recompute"},
    {"fp8": "rowwise", "save": "fp8"},
    {"fp8": "rowwise", "fp8_wgrad": "bf16"},
    {"fp8": "blockwise"},
    {"fp8": "blockwise", "save": "recompute"},
    {"fp8": "blockwise", "save": "fp8"},
    {"fp8": "blockwise", "fp8_wgrad": "bf16"},
]
SOME = ("different counts", "a rank without tokens", "top-4")


def cases_of(layout: int) -> list[tuple[str, dict[str, Any]]]:
    """Return the cases of one of three layouts.

    All routings, and each variant with one of `SOME`, another at each layout: together the layouts
    have every pair.
    """
    return [
        *((case, {"fp8": fp8}) for case in routings() for fp8 in ("off", "rowwise")),
        *((SOME[(i + layout) % len(SOME)], variant) for i, variant in enumerate(VARIANTS)),
    ]


assert NUM_RANKS == 4
