"""Megatron's unmodified training loop on CPU with gloo.

Megatron speaks of CUDA everywhere: `.cuda()`, `device="cuda"`, streams, events, memory
statistics, NCCL. In CPU mode each such word gets its CPU meaning, in two ways:

* a table of attributes (torch.cuda.*, torch.distributed.*, a few of Megatron's) that are replaced;
* a TorchFunctionMode that turns CUDA devices in the arguments of torch functions into the CPU.

`enable` is called only where there is no GPU or `EP_PLUGIN_DEVICE=cpu` asks for it, and `disable`
puts everything back; a run on GPUs never enters this file's replacements. One generator
serves as both the CPU's and the GPU's: Megatron saves and restores the state it forks from, which
is all it needs.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.cpu import gpu_packages, local_layers, stand_ins, words
from ep_plugin.megatron.cpu.arguments import to_cpu
from ep_plugin.megatron.cpu.zero_centered import zero_centered
from ep_plugin.megatron.seams.patches import Patches

_LEGAL = ("cpu", "cuda")
_IS_INFERENCE = "is_inference_column_parallel_linear"


_patches = Patches()  # the one piece of state: what CPU mode changed in this process


def wanted() -> bool:
    """Whether this process runs on the CPU: EP_PLUGIN_DEVICE says so, or there is no GPU.

    Raises ConfigError for another value, and for `cuda` where there is no GPU.
    """
    asked = os.environ.get("EP_PLUGIN_DEVICE")
    if asked is not None and asked not in _LEGAL:
        raise ConfigError(f"EP_PLUGIN_DEVICE must be one of {', '.join(_LEGAL)}; got {asked!r}")
    if active():
        return True
    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        raise ConfigError(
            "EP_PLUGIN_DEVICE = 'cuda' needs a GPU and torch sees none; use EP_PLUGIN_DEVICE=cpu"
        )
    return asked == "cpu" or not has_gpu


def active() -> bool:
    """Whether CPU mode is on."""
    return _patches.active


def enable() -> None:
    """Switch CPU mode on; a second call does nothing. Megatron may be imported before or after.

    On an error nothing is changed. Raises ConfigError where Megatron was imported before with
    packages that only a GPU can run.
    """
    global _patches
    if active():
        return
    patches = Patches()
    gpu_packages.hide()
    try:
        torch_changes(patches)
        patches.apply()  # Megatron is imported below, and has to find torch like this
        megatron_changes(patches)
        patches.apply()
    except BaseException:
        patches.undo()
        gpu_packages.show_again()
        raise
    _patches = patches


def disable() -> list[str]:
    """Put everything back; does nothing when CPU mode is off.

    What somebody replaced after us is left, with one sentence for each in what is returned.
    """
    return [*_patches.undo(), *gpu_packages.show_again()]


class EagerStance:
    """Nothing is compiled."""

    def __enter__(self) -> None:
        self.stance = torch.compiler.set_stance("force_eager")

    def __exit__(self, *error: Any) -> None:
        self.stance.__exit__(*error)


def torch_changes(patches: Patches) -> None:
    """Note what CPU mode changes in torch and in the environment."""
    why = "compiling for the CPU costs more than it gives"
    patches.environment("TORCHDYNAMO_DISABLE", "1", f"{why}; read at the first torch.compile")
    patches.enter(EagerStance(), f"{why}; for functions that are compiled already")
    patches.environment("CUDA_DEVICE_MAX_CONNECTIONS", "1", "Megatron asks for it with TP or CP")
    words.changes(patches)


def megatron_changes(patches: Patches) -> None:
    """Note what CPU mode changes in Megatron; imports it."""
    patches.wrap(
        "megatron.core.transformer.transformer_config:TransformerConfig.__post_init__",
        _with_kept_outputs,
        "Megatron frees a sent output once the send is queued; gloo's threads still read it",
    )
    random = "megatron.core.tensor_parallel.random"
    why = "random states are set and forked through it, without a device here"
    patches.replace(f"{random}:_lazy_call", words.call_now, why)
    patches.replace(f"{random}:device_ctx_manager", stand_ins.device_context, why)
    patches.wrap(
        "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
        _norm_with_mark,
        "torch's norms are made here; it refuses sequence parallelism and zero-centred weights",
    )
    patches.wrap(
        "megatron.core.models.backends:LocalSpecProvider.core_attention",
        _latent_too,
        "local attention has no place for latent attention's widths; ours has",
    )
    latent = "megatron.core.transformer.multi_latent_attention"
    patches.replace(f"{latent}:HAVE_TE", False, "layers are not its; 0.16 takes it to be there")
    patches.wrap(
        f"{latent}:MLASelfAttention.__init__",
        _with_whole_rotary_keys,
        "its local layers sum the gradient of the keys' rotary part over no tensor-parallel rank",
    )
    prediction = "megatron.core.transformer.multi_token_prediction"
    if hasattr(importlib.import_module(prediction), _IS_INFERENCE):  # from 0.20 on
        why = "it asks for classes that are functions where Transformer Engine is not there"
        patches.replace(f"{prediction}:{_IS_INFERENCE}", _is_none, why)
    if importlib.util.find_spec("megatron.core.models.hybrid") is not None:
        why = "its layers are Transformer Engine's; here they are Megatron's local ones"
        patches.wrap(
            f"{local_layers.MODEL}:HybridModel.__init__", local_layers.with_local_layers, why
        )
        patches.replace(f"{local_layers.BLOCK}:TENorm", local_layers.local_norm, why)
        if importlib.util.find_spec("megatron.training") is not None:
            local_layers.changes(patches)
    if importlib.util.find_spec("megatron.training") is not None:
        for place in validators():
            patches.wrap(
                place, _with_cpu_arguments, "flags that only a GPU can honour get their CPU value"
            )
        patches.replace(
            "megatron.training.training:set_jit_fusion_options",
            _no_warm_up,
            "its warm-up draws from the generator of initial weights, how much depends on TP",
        )
    patches.at_exit(_end_groups, "gloo's threads end while Python can still wait for them")


def validators() -> list[str]:
    """Return every place where Megatron's loop looks `validate_args` up; imports it.

    Until 0.17 initialize_megatron calls the name that is bound in its own module.
    """
    modules = ("megatron.training.arguments", "megatron.training.initialize")
    name = "validate_args"
    return [f"{m}:{name}" for m in modules if hasattr(importlib.import_module(m), name)]


def _end_groups() -> None:
    """End gloo's threads; Megatron leaves them running.

    A thread that drops its last tensor after Python has ended takes the process down with SIGABRT.
    After an error they are left: what is under way may wait for ranks that will never come.
    """
    if dist.is_initialized() and not hasattr(sys, "last_exc"):
        dist.destroy_process_group()


def _is_none(module: Any) -> bool:
    """Stand in for is_inference_column_parallel_linear: on the CPU no layer is for inference."""
    return False


def _no_warm_up(tp_size: int | None = None) -> None:
    """Stand in for set_jit_fusion_options: nothing is compiled in CPU mode."""


def _with_cpu_arguments(original: Callable[..., Any], args: Any, *rest: Any, **kwargs: Any) -> Any:
    """Give flags that only a GPU can honour their CPU value, and say which in one line."""
    changed = to_cpu(args)
    if os.environ.get("RANK", "0") == "0":
        print(f"ep_plugin: CPU mode (gloo, no GPU used): {changed}", flush=True)
    return original(args, *rest, **kwargs)


def _with_kept_outputs(original: Callable[..., Any], config: Any) -> None:
    """Keep the memory of a pipeline stage's output while it is sent.

    Megatron frees it when the send is queued, which a stream orders and gloo's threads do not.
    """
    config.deallocate_pipeline_outputs = False
    original(config)


def _latent_too(original: Callable[..., Any], provider: Any) -> Any:
    """Return Megatron's local attention as one that latent attention can build, too."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    from ep_plugin.megatron.cpu.latent_attention import LatentDotProductAttention

    found = original(provider)
    return LatentDotProductAttention if found is DotProductAttention else found


def _with_whole_rotary_keys(
    original: Callable[..., Any], attention: Any, *args: Any, **kwargs: Any
) -> None:
    """Build latent attention whose rotary keys get the gradient of all tensor-parallel ranks."""
    from ep_plugin.megatron.cpu.latent_attention import sum_gradient_of_rotary_keys

    original(attention, *args, **kwargs)
    sum_gradient_of_rotary_keys(attention)


def _norm_with_mark(
    original: Callable[..., Any], cls: type, config: Any, *args: Any, **kwargs: Any
) -> Any:
    """Let torch's norms work with sequence parallelism, and with weights that are centred at zero.

    For the first they lack a mark on their parameters: with it, Megatron sums their gradients over
    the tensor-parallel ranks, which hold other tokens. For the second ours take their place.
    """
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
