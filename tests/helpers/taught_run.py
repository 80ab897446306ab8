"""Run a script under the plugin, and print after each step what there is of its teacher.

python taught_run.py SCRIPT [ARGS ...]

One line a rank: `teacher at RANK of SIZE: GROUPS/WEIGHTS ...`: the parameters that it holds, then
process groups of the process and living weights of the teacher, first where the student is there
alone, then after each step.
"""

import os
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ep_plugin.megatron.distill.seam import Distillation
from ep_plugin.run import main

weights: list["weakref.ref[torch.Tensor]"] = []
sizes: list[int] = []
seen: list[tuple[int, int]] = []


def look() -> None:
    alive = sum(weight() is not None for weight in weights)
    seen.append((len(dist.distributed_c10d._world.pg_map), alive))


def watch() -> None:
    """Look before the teacher is made and after each step."""
    set_up, step = Distillation.set_up, Distillation.step

    def watched_set_up(
        self: Distillation, original: Callable[..., Any], *rest: Any, **named: Any
    ) -> Any:
        def student(*given: Any, **named: Any) -> Any:
            made = original(*given, **named)
            look()
            return made

        result = set_up(self, student, *rest, **named)
        for weight in self.teacher.parameters():
            weights.append(weakref.ref(weight))
            sizes.append(weight.numel())
        return result

    def watched_step(self: Distillation, *rest: Any, **named: Any) -> Any:
        result = step(self, *rest, **named)
        look()
        return result

    Distillation.set_up = watched_set_up  # type: ignore[method-assign,assignment]
    Distillation.step = watched_step  # type: ignore[method-assign]


if __name__ == "__main__":
    watch()
    code = main(sys.argv[1:])
    found = " ".join(f"{groups}/{alive}" for groups, alive in seen)
    line = f"teacher at {os.environ['RANK']} of {sum(sizes)}: {found}\n"
    sys.stdout.write(line)  # one write: ranks share the stream
    sys.stdout.flush()
    sys.exit(code)
