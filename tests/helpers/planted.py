"""A pretrain script with a bug in it: `planted.py SCRIPT ARGS`, run by `ep-plugin parity`.

Which bug is told by the run's number in `--ep-parity-dump .../run3` and EP_TEST_BUGS, a list such
as `run2:scale,run3:norm`; in other runs there is none.
"""

import os
import runpy
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def scale() -> None:
    """Experts' gradients are twice what they should be."""
    module = import_module("megatron.core.distributed.distributed_data_parallel")
    wrap(module.DistributedDataParallel, "finish_grad_sync", _double)


def _double(original: Any, chunk: Any, *rest: Any, **settings: Any) -> None:
    original(chunk, *rest, **settings)
    for parameter in chunk.parameters():
        if not getattr(parameter, "allreduce", True):
            parameter.main_grad.mul_(2)


def norm() -> None:
    """The gradient norm leaves the experts out."""
    optimizer = import_module("megatron.core.optimizer.optimizer").MegatronOptimizer
    names = ("get_grads_for_grad_norm", "get_main_grads_for_grad_norm")  # 0.19, older
    wrap(optimizer, next(name for name in names if hasattr(optimizer, name)), _without_experts)


def _without_experts(original: Any, optimizer: Any, *rest: Any) -> Any:
    experts = any(not getattr(p, "allreduce", True) for p in optimizer.get_parameters())
    return [] if experts else original(optimizer, *rest)


def router() -> None:
    """The router's gradient is not summed over tensor-parallel ranks."""
    wrap(import_module("ep_plugin.megatron.block.adapter"), "set_tags", _router_alone)


def _router_alone(original: Any, replicated: Any, *rest: Any) -> None:
    original(replicated, *rest)
    for module in replicated:
        for parameter in module.parameters():
            parameter.sequence_parallel = False


def swap() -> None:
    """The first two experts of every rank are loaded in each other's place."""
    module = import_module("ep_plugin.megatron.block.sharded_state")
    wrap(
        module._Merge, "__call__", lambda original, merge, pieces: _swapped(original(merge, pieces))
    )


def _swapped(stacked: Any) -> Any:
    return stacked[[1, 0, *range(2, len(stacked))]]


def moments() -> None:
    """Moments are forgotten when a checkpoint is loaded."""
    module = import_module("megatron.core.optimizer.distrib_optimizer")
    wrap(module.DistributedOptimizer, "load_state_dict", _forget)


def _forget(original: Any, optimizer: Any, state: Any) -> None:
    original(optimizer, state)
    for values in optimizer.optimizer.state.values():
        values["exp_avg"].zero_()
        values["exp_avg_sq"].zero_()


def wrap(owner: Any, name: str, wrapper: Any) -> None:
    original = getattr(owner, name)
    setattr(owner, name, lambda *rest, **settings: wrapper(original, *rest, **settings))


if __name__ == "__main__":
    run = Path(sys.argv[sys.argv.index("--ep-parity-dump") + 1]).name
    bugs = dict(entry.split(":") for entry in os.environ["EP_TEST_BUGS"].split(",") if entry)
    if run in bugs:
        {f.__name__: f for f in (scale, norm, router, swap, moments)}[bugs[run]]()
    runpy.run_path(sys.argv.pop(1), run_name="__main__")
