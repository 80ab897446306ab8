"""The worker side of `ep-plugin parity`: equal weights at the start, and what the steps computed.

With `--ep-parity-dump FOLDER` a run

    takes its initial weights from FOLDER/../initial, or keeps its own there when it is the first
    writes its first iteration's gradients to FOLDER/gradients, under the names of its checkpoints
    writes every iteration's losses and gradient norm to FOLDER/scalars.json, on its last rank

A resumed run does the last alone. Gradients are saved as the parameters they are of would be, so
that Megatron's sharded names say where each rank's part of them lies, at any layout.
"""

import importlib
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ep_plugin.checkpoint.formats.megatron_dist import FIRST_ITERATION
from ep_plugin.megatron.seams.patches import Patches

TRAINING = "megatron.training.training"
INITIAL, GRADIENTS, SCALARS = "initial", "gradients", "scalars.json"


def changes(patches: Patches, writers: tuple[str, ...]) -> None:
    """Keep what `--ep-parity-dump` asks for; runs without it are as they were.

    `writers` are the paths of the functions that write Megatron's auxiliary losses.
    """
    training = importlib.import_module(TRAINING)
    seen: dict[int, dict[str, float]] = {}  # iteration -> name -> value
    folders: list[Path] = []  # of this run, once it has taken a step

    def with_dump(original: Callable[..., Any], *step: Any, **settings: Any) -> Any:
        args = training.get_args()
        if args.ep_parity_dump is None:
            return original(*step, **settings)
        folder, model, optimizer = Path(args.ep_parity_dump), step[2], step[3]
        folders[:] = [folder]
        if args.curr_iteration == 0:
            _equal_start(model, optimizer, folder.parent / INITIAL)
            step = (*step[:6], _dumping(step[6], model, folder / GRADIENTS), *step[7:])
        result = original(*step, **settings)
        values = {**result[0], "grad norm": result[5]}  # losses on the last pipeline stage
        found = {name: float(value) for name, value in values.items() if value is not None}
        seen.setdefault(args.curr_iteration + 1, {}).update(found)
        _write(folder, seen)
        return result

    def with_losses(original: Callable[..., Any], *rest: Any, **settings: Any) -> Any:
        if not folders:
            return original(*rest, **settings)
        given = inspect.signature(original).bind(*rest, **settings)
        kept = seen.setdefault(given.arguments["iteration"], {})
        given.arguments["writer"] = _Losses(given.arguments.get("writer"), kept)
        text = original(*given.args, **given.kwargs)
        _write(folders[0], seen)
        return text

    patches.wrap(
        f"{TRAINING}:train_step",
        with_dump,
        "one call is one step, with model, optimizer and gradients; --ep-parity-dump keeps them",
    )
    for path in writers:
        patches.wrap(path, with_losses, "auxiliary losses are summed over ranks only here")


class _Losses:
    """A TensorBoard writer that also keeps the auxiliary losses."""

    def __init__(self, writer: Any, kept: dict[str, float]) -> None:
        self.writer, self.kept = writer, kept

    def add_scalar(self, name: str, value: Any, iteration: int) -> None:
        if name.endswith("_loss"):
            self.kept[name] = float(value)
        if self.writer is not None:
            self.writer.add_scalar(name, value, iteration)


def _equal_start(model: list[Any], optimizer: Any, folder: Path) -> None:
    """Load the initial weights, or save them where no run has yet. Every rank must call it."""
    from megatron.core import dist_checkpointing

    place = folder / FIRST_ITERATION
    state, first = _sharded(model), not (place / ".metadata").is_file()
    dist.barrier()  # all have looked
    if first:
        _save(state, place)
        return
    loaded = dist_checkpointing.load(state, str(place))
    for key, chunk in _chunks(model):
        chunk.load_state_dict(loaded[key])
    optimizer.reload_model_params()


def _dumping(
    forward_backward: Callable[..., Any], model: list[Any], folder: Path
) -> Callable[..., Any]:
    """Return `forward_backward` that saves the gradients it leaves behind.

    They are summed everywhere for it, where the distributed optimizer would leave each rank a part.
    """

    def replacement(*rest: Any, **settings: Any) -> Any:
        for chunk in model:
            chunk.force_all_reduce = True
        result = forward_backward(*rest, **{**settings, "force_all_reduce": True})
        with _gradients_as_values(model):
            _save(_sharded(model), folder / FIRST_ITERATION)
        return result

    return replacement


@contextmanager
def _gradients_as_values(model: list[Any]) -> Iterator[None]:
    """Let every parameter's values be its gradient for a while."""
    parameters = [p for chunk in model for p in chunk.parameters() if hasattr(p, "main_grad")]
    values = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = parameter.main_grad
        yield
    finally:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value


def _chunks(model: list[Any]) -> Iterator[tuple[str, Any]]:
    from megatron.core.utils import unwrap_model

    for number, chunk in enumerate(unwrap_model(model)):
        yield f"model{number}", chunk


def _sharded(model: list[Any]) -> dict[str, Any]:
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"singleton_local_shards": False, "dp_cp_group": group}
    return {key: chunk.sharded_state_dict(metadata=metadata) for key, chunk in _chunks(model)}


def _save(state: dict[str, Any], folder: Path) -> None:
    from megatron.core import dist_checkpointing

    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, str(folder))


def _write(folder: Path, seen: dict[int, dict[str, float]]) -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SCALARS).write_text(json.dumps(seen))
