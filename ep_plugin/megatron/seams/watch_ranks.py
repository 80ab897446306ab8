"""Each rank keeps where it is in Megatron's loop, and watches the others: `ep_plugin.moe.watch`.

What a rank does outside our layers is entered here: waiting for data, the optimizer step, saves.
"""

import importlib
from collections.abc import Callable
from typing import Any

from ep_plugin.megatron.arguments.watched import room
from ep_plugin.megatron.seams.patches import Patches
from ep_plugin.moe import watch
from ep_plugin.moe.watch.place import Phase, here

TRAINING = "megatron.training.training"
_SAVING = "after a fault the sentence says that a rank was in it"


def changes(patches: Patches) -> None:
    """Enter every place of Megatron's loop, and watch from the first exchange on."""
    training = importlib.import_module(TRAINING)

    def with_watch(original: Callable[..., Any], *rest: Any, **settings: Any) -> Any:
        result = original(*rest, **settings)
        args = training.get_args()
        if args.num_experts is not None:
            # A long save is told of before the timeout of its exchanges, if at all.
            watch.start(args.ep_watch_ranks, slow=room(args))
        return result

    def with_end(original: Callable[..., Any], *rest: Any, **settings: Any) -> Any:
        try:
            result = original(*rest, **settings)
        except BaseException as error:
            watch.failed(error)
            raise
        here.enter(Phase.FINISHED)
        return result

    def with_step(original: Callable[..., Any], *rest: Any, **settings: Any) -> Any:
        here.begin(training.get_args().curr_iteration + 1)
        with here.during(Phase.STEP):
            return original(*rest, **settings)

    patches.wrap(
        "megatron.training.initialize:_initialize_distributed",
        with_watch,
        "ranks can tell each other where they are from here on",
    )
    patches.wrap(
        f"{TRAINING}:train", with_end, "an exchange that fails in it says which rank is to blame"
    )
    patches.wrap(f"{TRAINING}:train_step", with_step, "one call is one iteration")
    patches.wrap(
        "megatron.core.rerun_state_machine:RerunDataIterator.__next__",
        _in(Phase.DATA, then=Phase.STEP),
        "a rank waits for its data here",
    )
    for name in ("save_checkpoint", "load_checkpoint", "evaluate"):
        phase = {"save_checkpoint": Phase.SAVE, "load_checkpoint": Phase.LOAD}.get(name)
        patches.wrap(f"{TRAINING}:{name}", _in(phase or Phase.EVALUATION), _SAVING)
    for kind in ("ChainedOptimizer", "MixedPrecisionOptimizer", "FP32Optimizer"):
        patches.wrap(
            f"megatron.core.optimizer.optimizer:{kind}.step", _in(Phase.OPTIMIZER), _SAVING
        )


def _in(phase: Phase, then: Phase | None = None) -> Callable[..., Any]:
    def wrapper(original: Callable[..., Any], *rest: Any, **settings: Any) -> Any:
        with here.during(phase):
            result = original(*rest, **settings)
        if then is not None:
            here.enter(then)
        return result

    return wrapper
