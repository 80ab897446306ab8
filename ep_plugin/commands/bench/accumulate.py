"""What becomes of weight gradients in a step: made anew, or added to fp32 totals.

Training adds them: Megatron's DDP gives each parameter a `main_grad`, and a fused product adds to
it. A gradient that a contender's products cannot add is made, then added by a kernel of its own, as
DDP's hook does; that is in its time.
"""

import torch
from torch import Tensor, nn

from ep_plugin.commands.bench.case import Case, Contender
from ep_plugin.commands.bench.floors import Gradients
from ep_plugin.commands.bench.measure import Step


class WeightGradients:
    """The weight gradients of one contender in one kind of step."""

    def __init__(self, case: Case, contender: Contender, gradients: Gradients) -> None:
        self.contender, self.added = contender, gradients == "added"
        self.by_hand: list[nn.Parameter] = []
        if self.added:
            give_totals(case, contender.parameters)
            fused = {id(parameter) for parameter in self._fuse()}
            self.by_hand = [p for p in contender.parameters if id(p) not in fused]

    def start(self) -> None:
        """Say to the contender's products where their gradients go; before a forward."""
        self._fuse()

    def finish(self, *tensors: Tensor) -> None:
        """Add what no product has added, and forget all gradients, those of `tensors` too."""
        for parameter in self.by_hand:
            if parameter.grad is not None:
                total_of(parameter).add_(parameter.grad)
        for tensor in (*tensors, *self.contender.parameters):
            tensor.grad = None

    def _fuse(self) -> list[nn.Parameter]:
        return [] if self.contender.fuse is None else self.contender.fuse(self.added)


def train_step(case: Case, contender: Contender, gradients: Gradients = "anew") -> Step:
    """Return one step, forward and backward."""
    weights = WeightGradients(case, contender, gradients)

    def step(index: int) -> None:
        tokens = case.tokens[index]
        weights.start()
        torch.autograd.backward(contender.forward(tokens), case.grads[index])
        weights.finish(tokens)

    return step


def give_totals(case: Case, parameters: list[nn.Parameter]) -> None:
    """Give each parameter a `main_grad` of its shape in fp32.

    All contenders of a case share them: their sums are not read, and they would not fit in memory.
    """
    seen: dict[torch.Size, int] = {}
    for parameter in parameters:
        number = seen.get(parameter.shape, 0)
        seen[parameter.shape] = number + 1
        key = parameter.shape, number
        if key not in case.totals:
            case.totals[key] = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.main_grad = case.totals[key]  # type: ignore[attr-defined]
        parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]


def total_of(parameter: nn.Parameter) -> Tensor:
    """Return the totals that `give_totals` gave."""
    total: Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return total
