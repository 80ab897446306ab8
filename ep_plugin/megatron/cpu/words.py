"""The CPU meaning of torch's CUDA words: the table that `mode.py` applies and takes back."""

import contextlib
import inspect
import os
import types
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ep_plugin.megatron.cpu.stand_ins import CPU, Event, Generators, Stream, device_context
from ep_plugin.megatron.seams.patches import Patches

MEMORY = 8 << 30  # bytes; what the pretended device reports


def to_cpu(device: Any) -> Any:
    """Return the CPU for a CUDA device, however it is written; anything else as it is."""
    if isinstance(device, bool):
        return device
    if isinstance(device, int):
        return CPU
    if isinstance(device, str) and device.startswith("cuda"):
        return CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return CPU
    return device


class CudaMeansCpu(TorchFunctionMode):
    """Turns CUDA devices in the arguments of torch functions into the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = to_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        name = getattr(func, "__name__", "")
        if name == "to" and len(args) > 1:
            args = (args[0], *(to_cpu(a) if _names_device(a) else a for a in args[1:]))
        if name == "type" and len(args) == 1:
            return func(*args).replace(
                "torch.", "torch.cuda."
            )  # Megatron compares with CUDA's name
        return func(*args, **kwargs)


def _names_device(value: Any) -> bool:
    return isinstance(value, str | torch.device) or type(value) is int


def call_now(function: Callable[..., Any], **kwargs: Any) -> None:
    """torch.cuda._lazy_call without a device to wait for."""
    function()


# TorchDynamo keeps a table of functions by identity, so every replacement is a function of its own.


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _nothing() -> Callable[..., Any]:
    return _constant(None)


def _same() -> Callable[..., Any]:
    return lambda self, *args, **kwargs: self


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _get_rng_state(*device: Any, **kwargs: Any) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(state: torch.Tensor, *device: Any, **kwargs: Any) -> None:
    torch.default_generator.set_state(state)


def _num_devices() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _with_gloo(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    bound = inspect.signature(original).bind(*args, **kwargs)
    for name in ("device_id", "pg_options"):
        bound.arguments.pop(name, None)
    bound.arguments["backend"] = "gloo"
    return original(*bound.args, **bound.kwargs)


def _with_list_splits(
    original: Callable[..., Any],
    output: Any,
    input: Any,  # torch's own name
    output_split_sizes: Any = None,
    input_split_sizes: Any = None,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    splits = [
        sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
        for sizes in (output_split_sizes, input_split_sizes)
    ]
    return original(output, input, *splits, group=group, async_op=async_op)


def _with_cpu_words(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with CudaMeansCpu():
        return original(*args, **kwargs)


def changes(patches: Patches) -> None:
    """Give each of torch's CUDA words its CPU meaning."""
    for place, value in _meanings().items():
        patches.replace(place, value, "a word for CUDA, which gets its CPU meaning")
    patches.wrap(
        "torch.autograd:_engine_run_backward",
        _with_cpu_words,
        "every kind of backward calls it, and torch switches function modes off before",
    )
    for name in ("init_process_group", "new_group"):
        patches.wrap(
            f"torch.distributed:{name}",
            _with_gloo,
            "a group is made here, and takes gloo without what only NCCL takes",
        )
    patches.wrap(
        "torch.distributed:all_to_all_single",
        _with_list_splits,
        "gloo wants the splits as lists; Megatron also passes tensors",
    )
    patches.enter(CudaMeansCpu(), "CUDA devices in the arguments of torch functions mean the CPU")


def _meanings() -> dict[str, Any]:
    """Return place -> what it means on the CPU."""
    cuda: dict[str, Any] = {
        "is_available": _constant(True),
        "is_initialized": _constant(True),
        "is_bf16_supported": _constant(True),
        "device_count": _num_devices,
        "current_device": _constant(0),
        "set_device": _nothing(),
        "synchronize": _nothing(),
        "empty_cache": _nothing(),
        "init": _nothing(),
        "_lazy_init": _nothing(),
        "_lazy_call": call_now,
        "get_device_name": _constant("cpu"),
        "get_device_capability": _constant((8, 0)),
        "get_device_properties": _constant(
            types.SimpleNamespace(
                name="cpu", major=8, minor=0, multi_processor_count=1, total_memory=MEMORY
            )
        ),
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda *device, **kwargs: Stream(),
        "default_stream": lambda *device, **kwargs: Stream(),
        "set_stream": _nothing(),
        "stream": lambda stream: contextlib.nullcontext(),
        "device": device_context,
        "is_current_stream_capturing": _constant(False),
        "manual_seed": _seed,
        "manual_seed_all": _nothing(),  # torch.manual_seed calls it after seeding the CPU
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "default_generators": Generators(),
        "memory_stats": lambda *device, **kwargs: defaultdict(int),
        "mem_get_info": _constant((MEMORY, MEMORY)),
        "reset_peak_memory_stats": _nothing(),
    }
    for counter in ("allocated", "reserved"):
        cuda[f"memory_{counter}"] = cuda[f"max_memory_{counter}"] = _constant(0)
    for kind in ("Float", "Double", "Half", "BFloat16", "Int", "Long", "Byte"):
        cuda[f"{kind}Tensor"] = getattr(torch, f"{kind}Tensor")
    return {
        **{f"torch.cuda:{name}": value for name, value in cuda.items()},
        "torch.cuda.random:get_rng_state": _get_rng_state,
        "torch.cuda.random:set_rng_state": _set_rng_state,
        "torch.cuda.nvtx:range_push": _nothing(),
        "torch.cuda.nvtx:range_pop": _nothing(),
        "torch.accelerator:is_available": _constant(False),
        "torch.accelerator:current_device_index": _constant(0),
        "torch.accelerator:current_stream": lambda *device, **kwargs: Stream(),
        "torch:Tensor.cuda": _same(),
        "torch:Tensor.pin_memory": _same(),
        "torch:Tensor.record_stream": _nothing(),
        "torch.nn:Module.cuda": _same(),
    }
