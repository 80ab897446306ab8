"""Train as recipes/pretrain_gpt.py does, then write what this rank holds, as JSON.

torchrun ... -m ep_plugin.run recipes/evidence/_count.py FOLDER MEGATRON_ARGS
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pretrain_gpt
from megatron.training import training
from torch import Tensor


def main() -> None:
    """Keep hold of model and optimizer while Megatron trains, then count."""
    folder = Path(sys.argv.pop(1))
    built: list[Any] = []
    setup = training.setup_model_and_optimizer

    def caught(*args: Any, **options: Any) -> Any:
        found = setup(*args, **options)
        built[:] = found[:2]
        return found

    training.setup_model_and_optimizer = caught
    pretrain_gpt.main()
    held = counted(*built)
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(held))


def counted(chunks: list[Any], optimizer: Any) -> dict[str, dict[str, int]]:
    """Return parameters, their bytes and the optimizer's, of the dense part and of the experts.

    Without the distributed optimizer, each parameter has its own fp32 copy and state.
    """
    held = {
        part: {"parameters": 0, "parameter_bytes": 0, "optimizer_bytes": 0}
        for part in ("dense", "experts")
    }
    each = [one.optimizer for one in getattr(optimizer, "chained_optimizers", [optimizer])]
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            part = held["experts" if ".experts." in name else "dense"]
            trained = getattr(parameter, "main_param", parameter)
            states = [one.state[trained] for one in each if trained in one.state]
            if not states:
                raise RuntimeError(f"no optimizer has a state of {name}")
            part["parameters"] += parameter.numel()
            part["parameter_bytes"] += parameter.numel() * parameter.element_size()
            own = [] if trained is parameter else [trained]
            for tensor in (*own, *_large(states, parameter)):
                part["optimizer_bytes"] += tensor.numel() * tensor.element_size()
    return held


def _large(states: list[dict[str, Any]], parameter: Tensor) -> list[Tensor]:
    """Return the tensors that are as large as the parameter: Adam's step counter is not."""
    values = [value for state in states for value in state.values()]
    return [x for x in values if isinstance(x, Tensor) and x.numel() == parameter.numel()]


if __name__ == "__main__":
    main()
