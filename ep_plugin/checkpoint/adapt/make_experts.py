"""From one dense FFN tensor to every expert's, and to the shared expert's: pure tensor maths."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ep_plugin.checkpoint.adapt.ffn import FfnTensor, Mode, shard
from ep_plugin.checkpoint.adapt.gains import Gain, divide
from ep_plugin.checkpoint.adapt.upcycling import MODES, Upcycling
from ep_plugin.registry import resolve


@dataclass(frozen=True)
class ExpertMaker:
    """The experts of an upcycled layer.

    A shared expert that is added would double the output, so it and the routed experts each get
    half of it. One that is weighed by the learned softmax (a residual expert, arXiv:2201.05596) is
    whole: the two weights sum to 1 and both sides compute the dense FFN.
    """

    mode: Mode
    num_experts: int
    gated: bool
    routed: Gain
    shared: Gain

    def experts(
        self, dense: Tensor, part: FfnTensor, moments: bool, only: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield each expert, or `only` one, with its tensor made of `dense`.

        moments: it is optimizer state of that tensor, which is cut but neither changed nor scaled
        (Adam's steps do not depend on the scale of its moments).
        """
        parts = self.mode.granularity
        for expert in range(self.num_experts) if only is None else (only,):
            values = shard(dense, part, expert % parts, parts)
            if moments:
                yield expert, values
                continue
            if self.mode.change is not None:
                values = self.mode.change(values, part, expert)
            yield expert, scaled(values, part, self.routed)

    def shared_expert(self, dense: Tensor, part: FfnTensor, moments: bool) -> Tensor:
        """Return the shared expert's tensor: all channels of the dense one."""
        return dense if moments else scaled(dense, part, self.shared)


def make_experts(settings: Upcycling, gated: bool) -> ExpertMaker:
    """Return the experts of `settings`, for an FFN with or without a gate."""
    mode: Mode = resolve(MODES, settings.mode)(settings)
    kept = 0.5 if settings.shared_expert == "copy" else 1.0
    bias = kept / settings.gates.sum(settings.topk, settings.num_experts)
    return ExpertMaker(
        mode=mode,
        num_experts=settings.num_experts,
        gated=gated,
        routed=divide(mode.granularity * bias, bias, gated),
        shared=divide(kept, kept, gated),
    )


def deviations(settings: Upcycling) -> tuple[str, ...]:
    """Return why the new model does not compute what the dense one did; empty when it does."""
    mode: Mode = resolve(MODES, settings.mode)(settings)
    gates = settings.gates.deviation(settings.topk, settings.router_init == "zero")
    return tuple(reason for reason in (mode.deviation, gates) if reason is not None)


def scaled(values: Tensor, part: FfnTensor, gain: Gain) -> Tensor:
    """Return `values` times its factor; itself where that is 1."""
    if part.fc == 2:
        factor = gain.weight if part.is_weight else gain.bias
        return values if factor == 1 else values * factor
    if gain.value == 1 or not part.gated or part.half == "_w":
        return values
    values = values.clone()
    part.halves(values)[-1].mul_(gain.value)
    return values
