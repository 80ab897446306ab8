"""What every backend is given alike: weights, tokens, gradients, and where each token goes.

No router is touched. The gate's weight has orthogonal rows, and tokens are random apart from their
part along those rows, which is chosen such that their logits are the wanted ones: the K experts a
token shall go to have logits in [2, 3), the others in [0, 1). Rounding to bf16 moves a logit by
less than 0.02, so each backend's own router, whatever its precision, chooses the same experts.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ep_plugin.commands.bench.floors import Precision
from ep_plugin.commands.bench.shapes import Shape
from ep_plugin.errors import BackendUnavailable

ROUTINGS = ("balanced", "zipf", "zipf1.2", "recorded", "one_empty", "half")
EXPONENTS = {"zipf": 1.0, "zipf1.2": 1.2}
RECORDED = Path(__file__).parent / "recorded_routing.json"  # by benchmarks/record_routing.py
SETS = 3  # of tokens and gradients, taken in turn, so that none stays in a cache


@dataclass(frozen=True)
class Case:
    """One shape under one routing, in bf16."""

    shape: Shape
    routing: str
    router: Tensor  # [e, H]
    fc1: Tensor  # [e, 2F, H], the gate's rows before those of up
    fc2: Tensor  # [e, H, F]
    choices: tuple[Tensor, ...]  # [T, K] int64 each, one of each set
    tokens: tuple[Tensor, ...]  # [T, H] each, they want gradients
    grads: tuple[Tensor, ...]  # [T, H] each, of the output
    # fp32 sums of weight gradients; all contenders add to the same
    totals: dict[tuple[torch.Size, int], Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.router.device

    def ends(self, index: int) -> Tensor:
        """Return the row behind each expert's last [e] int32, for the set `index`."""
        return self.counts(index).cumsum(0, dtype=torch.int32)

    def counts(self, index: int) -> Tensor:
        """Return how many choices are each expert's [e] int64, for the set `index`."""
        return torch.bincount(self.choices[index].flatten(), minlength=self.shape.experts)

    def experts_of(self, rank: int, ranks: int) -> slice:
        """Return which experts a rank has where `ranks` share them."""
        return slice(*(self.shape.experts // ranks * (rank + i) for i in (0, 1)))

    def largest_share(self) -> float:
        """Return the busiest expert's share of all rows."""
        counts = torch.bincount(self.choices[0].flatten(), minlength=self.shape.experts)
        return float(counts.max()) / self.shape.rows


@dataclass(frozen=True)
class Contender:
    """A whole layer with this case's weights, router to combine."""

    backend: str
    precision: Precision
    forward: Callable[[Tensor], Tensor]  # [T, H] -> [T, H]
    parameters: list[nn.Parameter]
    quantize: Callable[[], object] | None = None  # the weights, as a new optimizer step needs
    renew: Callable[[], object] | None = None  # where that cannot be called: next step does it
    # Have products add gradients to `main_grad` of their weights, or no longer; returns whose.
    fuse: Callable[[bool], list[nn.Parameter]] | None = None
    dispatcher: str = "alltoall"  # where experts are on several ranks
    switches: str = ""  # what is not as the backend's users get it, for a reader


# What a backend has for a case: the name of each of its recipes, and what makes it.
Makers = Mapping[str, Callable[[], Contender]]


def require_cuda(name: str, device: torch.device, legal: str = "--backends ep_plugin") -> None:
    """Raise BackendUnavailable, which names what is `legal`, unless `device` is a GPU."""
    if device.type != "cuda":
        raise BackendUnavailable(f"{name} needs a CUDA device; this is {device}; use {legal}")


def draw_choices(shape: Shape, routing: str, generator: torch.Generator) -> Tensor:
    """Return distinct experts for each token [T, K].

    balanced: uniform. zipf: expert i as popular as 1/(i+1); zipf1.2: as that to the power of 1.2.
    recorded: as popular as the experts of a real run, see `recorded_shares`. one_empty: uniform
    over all but the last. half: expert 0 has half of all rows where K <= 2; a token chooses an
    expert once, so for larger K every token chooses it, 1/K of all rows.
    """
    device = generator.device
    uniform = torch.rand(shape.tokens, shape.experts, generator=generator, device=device)
    scores = -torch.log(-torch.log(uniform.clamp(1e-7, 1 - 1e-7)))  # Gumbel: top-k samples
    if routing in EXPONENTS:
        scores -= EXPONENTS[routing] * torch.arange(1, shape.experts + 1, device=device).log()
    elif routing == "recorded":
        scores += recorded_shares(shape.experts).to(device).log()
    elif routing == "one_empty":
        scores[:, -1] = -torch.inf
    elif routing == "half":
        scores[:, 0] = torch.inf
        if shape.topk == 1:
            scores[::2, 0] = -torch.inf
    choices: Tensor = scores.topk(shape.topk, dim=1).indices
    return choices


def recorded_shares(num_experts: int) -> Tensor:
    """Return the share of all rows that each expert had in a real run, largest first: [e].

    The run had its own number of experts. Each layer's shares are sorted and the layers' mean is
    taken; another number of experts gets points of the same curve, from the most popular expert to
    the least.
    """
    counts = torch.tensor(json.loads(RECORDED.read_text())["counts"], dtype=torch.float32)
    curve = counts.sort(dim=1, descending=True).values.mean(dim=0)
    points = nn.functional.interpolate(
        curve.clamp(min=1.0)[None, None], size=num_experts, mode="linear", align_corners=True
    )
    shares: Tensor = points[0, 0] / points.sum()
    return shares


def plant(choices: Tensor, router: Tensor, generator: torch.Generator) -> Tensor:
    """Return random tokens [T, H] that `router` [e, H] sends to `choices` [T, K]."""
    (num_tokens, _), (experts, hidden) = choices.shape, router.shape
    device, wide = router.device, router.float()
    logits = torch.rand(num_tokens, experts, generator=generator, device=device)
    logits.scatter_add_(1, choices, torch.full(choices.shape, 2.0, device=device))
    noise = torch.randn(num_tokens, hidden, generator=generator, device=device)
    missing = logits - noise @ wide.T
    back: Tensor = torch.linalg.solve(wide @ wide.T, wide)  # [e, H], of logits to tokens
    return (noise + missing @ back).bfloat16()


def make_case(shape: Shape, routing: str, device: torch.device) -> Case:
    """Return the case; the same numbers on each call."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        values = torch.empty(size, dtype=torch.bfloat16, device=device)
        return values.normal_(std=std, generator=generator)

    hidden, ffn, experts = shape.hidden, shape.ffn, shape.experts
    directions = torch.randn(hidden, experts, generator=generator, device=device)
    router = torch.linalg.qr(directions).Q.T.bfloat16().contiguous()
    choices = tuple(draw_choices(shape, routing, generator) for _ in range(SETS))
    tokens = tuple(plant(c, router, generator).requires_grad_() for c in choices)
    return Case(
        *(shape, routing, router),
        *(normal(experts, 2 * ffn, hidden, std=0.02), normal(experts, hidden, ffn, std=0.02)),
        *(choices, tokens),
        tuple(normal(shape.tokens, hidden) for _ in range(SETS)),
    )


def reference(case: Case, num_tokens: int = 64) -> tuple[Tensor, Tensor]:
    """Return the layer's output and input gradient [n, H] for set 0's first tokens, in fp32."""
    tokens = case.tokens[0][:num_tokens].detach().float().requires_grad_()
    logits = tokens @ case.router.float().T
    chosen, experts = logits.topk(case.shape.topk, dim=1)
    probs = chosen.softmax(dim=1)
    output = torch.zeros_like(tokens)
    for expert in sorted(set(experts.flatten().tolist())):
        token, choice = (experts == expert).nonzero(as_tuple=True)
        gate, up = (tokens[token] @ case.fc1[expert].float().T).chunk(2, dim=1)
        active = nn.functional.silu(gate) * up * probs[token, choice].unsqueeze(1)
        output = output.index_add(0, token, active @ case.fc2[expert].float().T)
    (grad,) = torch.autograd.grad(output, tokens, case.grads[0][:num_tokens].float())
    return output.detach(), grad


def relative_error(value: Tensor, wanted: Tensor) -> float:
    """Return |value - wanted| / |wanted| in the Frobenius norm."""
    return float((value.float() - wanted.float()).norm() / wanted.float().norm())
