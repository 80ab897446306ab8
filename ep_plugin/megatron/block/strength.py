"""How much an auxiliary loss weighs under `--calculate-per-token-loss`.

Without the flag every micro-batch has the same weight, in the main loss and in auxiliary losses.
With the flag Megatron sums the main loss over tokens, and divides every gradient by the number of
tokens at the end of the step. An auxiliary loss is a mean, so it would become too weak. Therefore
that of micro-batch m is multiplied by n_m, its number of counted tokens over all context parallel
ranks:

    sum_m (main_m + n_m * aux_m) / sum_m n_m        main_m: summed over counted tokens

The loss function returns n_m on the last pipeline stage, after the layers' forward. It is needed in
their backward. If a loss function returns no number of tokens, Megatron does not divide; then an
auxiliary loss gets the factor that Megatron gives the main loss.

The other stages get n_m through the store of the default process group. The last stage puts it
there before its own backward of the micro-batch; theirs run later. So they never read what a run
before left there.

A micro-batch's output is the first that its backward passes on a stage, in Megatron's combined 1F1B
schedule too: that one runs forwards in between, but no other backward.
"""

import functools
import inspect
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Weight = Tensor | float


class Strength:
    """The weight `now` of the micro-batch in backward; None where no loss function gave one."""

    def __init__(self) -> None:
        self.now: Weight | None = None
        self._calls: Counter[int | None] = Counter()  # vp_stage -> micro-batches trained on
        self._world: Callable[[], Any] = lambda: None  # the process group they were counted in

    def weigh(self, loss: Tensor, otherwise: Weight) -> Tensor:
        """Return `loss` []; its gradient is multiplied by the weight, or else by `otherwise`."""
        weighed: Tensor = _Weigh.apply(loss, self, otherwise)
        return weighed

    def around_loss(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run Megatron's `forward_step_calc_loss`; the backward of its output sets the weight."""
        self.now = None  # the backward of an earlier micro-batch, if one was under way, has ended
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if not _is_weighed(given["config"]) or not torch.is_grad_enabled():
            return original(*args, **kwargs)
        returned: list[Any] = []
        if given["loss_func"] is not None:
            given["loss_func"] = _keeping(given["loss_func"], returned)
        output, num_tokens = original(*bound.args, **bound.kwargs)
        stage, number = given["vp_stage"], given["num_microbatches"]
        weight = _weight(returned[0], number) if returned else None
        if _stages() > 1:
            call = self._count(stage)
            key = f"ep_plugin/counted/{_last_rank()}/{stage is None}/{{}}".format
            if weight is not None:
                _publish(key(call), float(weight), key(call - number))
            begin = functools.partial(self._begin_with, key(call))
        else:
            begin = functools.partial(self._begin, weight)
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(begin)  # type: ignore[no-untyped-call]
        return output, num_tokens

    def _count(self, stage: int | None) -> int:
        """Return how many micro-batches this virtual stage has trained on, and count one more.

        All begin at 0 in a new process group: after a restart in the process some ranks may be new.
        """
        world = dist.distributed_c10d._get_default_group()
        if self._world() is not world:
            self._world = weakref.ref(world)
            self._calls.clear()
        self._calls[stage] += 1
        return self._calls[stage] - 1

    def _begin(self, weight: Weight | None, grad: Tensor) -> None:
        self.now = weight

    def _begin_with(self, key: str, grad: Tensor) -> None:
        self.now = float(_store().get(key))


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, strength: Strength, otherwise: Weight) -> Tensor:
        ctx.strength, ctx.otherwise = strength, otherwise
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        now = ctx.strength.now
        return grads[0] * (ctx.otherwise if now is None else now), None, None


def _is_weighed(config: Any) -> bool:
    """Whether auxiliary losses are weighed here."""
    is_moe = getattr(config, "num_moe_experts", None) is not None
    return config.calculate_per_token_loss and is_moe


def _keeping(loss_func: Callable[..., Any], returned: list[Any]) -> Callable[..., Any]:
    def kept(*args: Any, **kwargs: Any) -> Any:
        returned.append(loss_func(*args, **kwargs))
        return returned[-1]

    return kept


def _weight(returned: Any, num_microbatches: int) -> Weight | None:
    """Return n_m from what a loss function `returned`, or else the factor of the main loss.

    n_m is [], summed over context parallel ranks. None if what was returned is not a loss.
    """
    from megatron.core import parallel_state

    if not isinstance(returned, tuple | list):
        return None
    ranks = parallel_state.get_context_parallel_world_size()
    if len(returned) != 3:
        return float(ranks / num_microbatches)
    counted: Tensor = torch.as_tensor(returned[1]).detach().clone()
    if ranks > 1:
        dist.all_reduce(counted, group=parallel_state.get_context_parallel_group())
    return counted


def _publish(key: str, weight: float, done: str) -> None:
    """Put a micro-batch's weight into the store under `key`; delete that of the step before."""
    store = _store()
    store.set(key, str(weight))
    store.delete_key(done)  # it waits for the store, which then has the new weight too


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _stages() -> int:
    from megatron.core import parallel_state

    size: int = parallel_state.get_pipeline_model_parallel_world_size()
    return size


def _last_rank() -> int:
    from megatron.core import parallel_state

    rank: int = parallel_state.get_pipeline_model_parallel_last_rank()
    return rank
