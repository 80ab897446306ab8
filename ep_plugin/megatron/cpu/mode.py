"""Megatron's unmodified training loop on CPU with gloo.

Megatron speaks of CUDA everywhere: `.cuda()`, `device="cuda"`, streams, events, memory
statistics, NCCL. In CPU mode each such word gets its CPU meaning, in two ways:

* a table of attributes (torch.cuda.*, torch.distributed.*, a few of Megatron's) that are replaced;
* a TorchFunctionMode that turns CUDA devices in the arguments of torch functions into the CPU.

`enable` is called only where there is no GPU or `EP_PLUGIN_DEVICE=cpu` asks for it, and `disable`
puts every attribute back; a run on GPUs never enters this file's replacements. One generator
serves as both the CPU's and the GPU's: Megatron saves and restores the state it forks from, which
is all it needs.
"""

import atexit
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.cpu import words
from ep_plugin.megatron.cpu.zero_centered import zero_centered

VALIDATE = "validate_args"
_LEGAL = ("cpu", "cuda")
_INHERITED = object()  # the attribute was found on a base class


class CpuMode:
    """What `enable` changed, newest last, so that it can be put back."""

    def __init__(self) -> None:
        self.replaced: list[tuple[Any, str, Any]] = []
        self.environment: dict[str, str | None] = {}
        self.mode = words.CudaMeansCpu()
        self.active = False

    def replace(self, owner: Any, name: str, value: Any) -> None:
        self.replaced.append((owner, name, owner.__dict__.get(name, _INHERITED)))
        setattr(owner, name, value)

    def set_environment(self, name: str, value: str) -> None:
        self.environment[name] = os.environ.get(name)
        os.environ.setdefault(name, value)


_cpu_mode = CpuMode()  # the one piece of state: what is replaced in this process


def wanted() -> bool:
    """Whether this process runs on the CPU: EP_PLUGIN_DEVICE says so, or there is no GPU.

    Raises ConfigError for another value, and for `cuda` where there is no GPU.
    """
    asked = os.environ.get("EP_PLUGIN_DEVICE")
    if asked is not None and asked not in _LEGAL:
        raise ConfigError(f"EP_PLUGIN_DEVICE must be one of {', '.join(_LEGAL)}; got {asked!r}")
    if _cpu_mode.active:
        return True
    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        raise ConfigError("EP_PLUGIN_DEVICE = 'cuda' needs a GPU and torch sees none; use cpu")
    return asked == "cpu" or not has_gpu


def active() -> bool:
    """Whether CPU mode is on."""
    return _cpu_mode.active


def enable() -> None:
    """Switch CPU mode on; a second call does nothing. Megatron may be imported before or after."""
    mode = _cpu_mode
    if mode.active:
        return
    mode.active = True
    # Compiling for the CPU costs more than it gives. The variable counts where torch.compile is
    # first used later, the stance where Megatron was imported before.
    mode.set_environment("TORCHDYNAMO_DISABLE", "1")
    torch.compiler.set_stance("force_eager")
    mode.set_environment("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asks for it with TP or CP
    for owner, name, value in words.replacements():
        mode.replace(owner, name, value)
    mode.mode.__enter__()  # type: ignore[no-untyped-call]
    for owner, name, value in _megatron_replacements():
        mode.replace(owner, name, value)
    atexit.register(_end_groups)


def _end_groups() -> None:
    """End gloo's threads while Python can still wait for them; Megatron leaves them running.

    A thread that drops its last tensor after Python has ended takes the process down with SIGABRT.
    After an error they are left: what is under way may wait for ranks that will never come.
    """
    if dist.is_initialized() and not hasattr(sys, "last_exc"):
        dist.destroy_process_group()


def disable() -> None:
    """Put everything back; does nothing when CPU mode is off."""
    mode = _cpu_mode
    if not mode.active:
        return
    mode.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
    while mode.replaced:
        owner, name, value = mode.replaced.pop()
        if value is _INHERITED:
            delattr(owner, name)
        else:
            setattr(owner, name, value)
    for name, value in mode.environment.items():
        if value is None:
            os.environ.pop(name, None)
    mode.environment.clear()
    atexit.unregister(_end_groups)
    torch.compiler.set_stance("default")
    mode.active = False


# Megatron flags that need a GPU or a package for GPUs -> the value CPU mode gives them, and why.
_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "transformer_impl": ("local", "--transformer-impl local"),
    "distributed_backend": ("gloo", "--distributed-backend gloo"),
    "gradient_accumulation_fusion": (False, "--no-gradient-accumulation-fusion"),
    "masked_softmax_fusion": (False, "--no-masked-softmax-fusion"),
    "apply_rope_fusion": (False, "--no-rope-fusion"),
    "persist_layer_norm": (False, "--no-persist-layer-norm"),
    "no_persist_layer_norm": (True, "--no-persist-layer-norm"),
}


def _megatron_replacements() -> list[tuple[Any, str, Any]]:
    """Return (owner, attribute, replacement) inside Megatron; imports what it replaces in."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    norm = importlib.import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm
    config = importlib.import_module("megatron.core.transformer.transformer_config")
    config = config.TransformerConfig
    table = [
        (config, "__post_init__", _with_kept_outputs(config.__post_init__)),
        (random, "_lazy_call", words.call_now),
        (random, "device_ctx_manager", words.device_context),
        (norm, "__new__", _norm_with_mark(norm.__new__)),
    ]
    if importlib.util.find_spec("megatron.training") is not None:
        arguments = importlib.import_module("megatron.training.arguments")
        training = importlib.import_module("megatron.training.training")
        initialize = importlib.import_module("megatron.training.initialize")
        # Until 0.17 initialize_megatron calls the name that is bound in its own module.
        callers = [module for module in (arguments, initialize) if hasattr(module, VALIDATE)]
        table += [
            *((m, VALIDATE, _with_cpu_arguments(getattr(m, VALIDATE))) for m in callers),
            # Its warm-up draws numbers, how many depends on TP; here that would move the generator
            # which initial weights come from.
            (training, "set_jit_fusion_options", _no_warm_up),
        ]
    return table


def _no_warm_up(tp_size: int | None = None) -> None:
    """Stand in for set_jit_fusion_options: nothing is compiled in CPU mode."""


def _with_cpu_arguments(original: Callable[..., Any]) -> Callable[..., Any]:
    """Give flags that only a GPU can honour their CPU value, and say which in one line."""

    @functools.wraps(original)
    def validate_args(args: Any, *rest: Any, **kwargs: Any) -> Any:
        changed = []
        for name, (value, flag) in _ARGUMENTS.items():
            if getattr(args, name, value) != value:
                setattr(args, name, value)
                changed.append(flag)
        if os.environ.get("RANK", "0") == "0":
            listed = " ".join(dict.fromkeys(changed)) or "no flag changed"
            print(f"ep_plugin: CPU mode (gloo, no GPU used): {listed}", flush=True)
        return original(args, *rest, **kwargs)

    return validate_args


def _with_kept_outputs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the memory of a pipeline stage's output while it is sent.

    Megatron frees it when the send is queued, which a stream orders and gloo's threads do not.
    """

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:  # noqa: N807
        self.deallocate_pipeline_outputs = False
        original(self)

    return __post_init__


def _norm_with_mark(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch's norms work with sequence parallelism, and with weights that are centred at zero.

    For the first they lack a mark on their parameters: with it, Megatron sums their gradients over
    the tensor-parallel ranks, which hold other tokens. For the second ours take their place.
    """

    def __new__(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        sequence_parallel, centered = config.sequence_parallel, config.layernorm_zero_centered_gamma
        config.sequence_parallel = config.layernorm_zero_centered_gamma = False
        try:
            norm = original(cls, config, *args, **kwargs)
        finally:
            config.sequence_parallel = sequence_parallel
            config.layernorm_zero_centered_gamma = centered
        if centered:
            norm = zero_centered(norm)
        for parameter in norm.parameters():
            parameter.sequence_parallel = sequence_parallel
        return norm

    return __new__
