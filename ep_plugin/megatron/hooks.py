"""Putting our block where Megatron looks its own up, and taking it out again."""

import functools
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

from ep_plugin import __version__
from ep_plugin.config import ConfigError
from ep_plugin.megatron import apex, chained, cpu, dump, saved, torch_adam, touchpoints, wheel

MODULE_SPECS = "megatron.core.models.gpt.moe_module_specs"
ARGUMENTS = "megatron.training.arguments"
TRANSFORMER_CONFIG = "megatron.core.transformer.transformer_config"
MOE_LOGGING = "megatron.core.transformer.moe.moe_logging"
MODULE = "megatron.core.transformer.module"


def install() -> None:
    """Make Megatron build our block in every MoE layer, with CPU mode where there is no GPU.

    A second call does nothing. Every touch point is verified first: raises ConfigError, with
    nothing changed, when the installed Megatron is not one we know.
    """
    foreign = apex.foreign_apex()
    if foreign is not None:
        raise ConfigError(foreign)
    touchpoints.table_for(touchpoints.installed_version())
    if cpu.wanted():
        cpu.enable()
    specs: Any = import_module(MODULE_SPECS)
    if hasattr(specs.MoELayer, "ep_original"):
        return
    try:
        checked = touchpoints.verify()
    except ConfigError:
        cpu.disable()
        raise
    layer_class = _make_layer_class(specs.MoELayer)
    arguments = import_module(ARGUMENTS)
    tracker_class = import_module(MOE_LOGGING).MoEMetricsTracker
    specs.MoELayer = layer_class
    _wrap(arguments, "add_megatron_arguments", _with_our_flags)
    _wrap(arguments, "validate_args", functools.partial(_with_our_checks, layer_class))
    _wrap(tracker_class, "report", functools.partial(_with_our_metrics, layer_class))
    config_class = import_module(TRANSFORMER_CONFIG).TransformerConfig
    _wrap(config_class, "__post_init__", functools.partial(_with_our_activation, layer_class))
    module_class = import_module(MODULE).MegatronModule
    _wrap(module_class, "set_is_first_microbatch", _with_our_weights)
    for part in (chained, saved, dump):
        part.watch(_wrap)
    wheel.without_compilation()
    torch_adam.correct()
    _say(f"{len(checked)} touch points checked in megatron-core {touchpoints.installed_version()}")


def uninstall() -> None:
    """Put back every attribute that `install` replaced, CPU mode included, if it did."""
    specs: Any = import_module(MODULE_SPECS)
    if hasattr(specs.MoELayer, "ep_original"):
        arguments = import_module(ARGUMENTS)
        for part in (dump, saved, chained):
            part.unwatch(_unwrap)
        _unwrap(import_module(MOE_LOGGING).MoEMetricsTracker, "report")
        _unwrap(import_module(TRANSFORMER_CONFIG).TransformerConfig, "__post_init__")
        _unwrap(import_module(MODULE).MegatronModule, "set_is_first_microbatch")
        _unwrap(arguments, "validate_args")
        _unwrap(arguments, "add_megatron_arguments")
        wheel.with_compilation()
        torch_adam.uncorrect()
        specs.MoELayer = specs.MoELayer.ep_original
    cpu.disable()


def _make_layer_class(original: type) -> Any:
    """Return a fresh subclass of the adapter, so that settings of one install do not outlive it."""
    adapter = import_module("ep_plugin.megatron.adapter")
    tracking = import_module("ep_plugin.megatron.tracking")
    fields = {"ep_original": original, "tracker": tracking.RoutingTracker(), "shared": {}}
    return type("MoELayer", (adapter.EPMoELayer,), fields)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace `owner.name` by `wrapper(original, ...)`, which remembers the original."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    replacement.ep_original = original  # type: ignore[attr-defined]
    setattr(owner, name, replacement)


def _unwrap(owner: Any, name: str) -> None:
    setattr(owner, name, getattr(owner, name).ep_original)


def _with_our_flags(original: Callable[..., Any], parser: Any) -> Any:
    from ep_plugin.megatron.flags import add_ep_arguments

    return add_ep_arguments(original(parser))


def _with_our_checks(
    layer_class: Any, original: Callable[..., Any], args: Any, *rest: Any, **kwargs: Any
) -> Any:
    from ep_plugin.megatron.arguments import check_arguments, settings_from_args
    from ep_plugin.megatron.refusal import refuse
    from ep_plugin.megatron.resume import check_resumable, choose_format
    from ep_plugin.megatron.settings import check_supported, fp8_recipe

    try:
        layer_class.settings = settings_from_args(args)
        check_arguments(args, layer_class.settings)
        said = choose_format(args)
        validated = original(args, *rest, **kwargs)
        check_resumable(args)
        if said is not None:
            _print(said)
        if args.num_experts is not None:
            check_supported(args)
            _say_recipe(args, fp8_recipe(args, layer_class.settings))
    except ConfigError as error:
        refuse(error)
    return validated


def _with_our_activation(layer_class: Any, original: Callable[..., Any], config: Any) -> None:
    """Give the dense blocks the activation of `--ep-dense-activation`."""
    from ep_plugin.megatron.settings import ACTIVATIONS

    wanted = layer_class.settings.dense_activation
    if wanted is not None:
        config.activation_func, config.gated_linear_unit = ACTIVATIONS[wanted]
        config.bias_activation_fusion = False  # fused kernels exist for Megatron's own pairs alone
    original(config)


def _with_our_weights(original: Callable[..., Any], module: Any) -> None:
    """Pass on to our experts that a step begins: weights in e4m3 are made anew, once a step.

    Megatron's schedules call it; under a loop that does not, experts quantise at every call.
    """
    from ep_plugin.experts import Experts

    original(module)
    for part in module.modules():
        if isinstance(part, Experts):
            part.weights_change_every_call, part.is_first_microbatch = False, True


def _with_our_metrics(
    layer_class: Any,
    original: Callable[..., Any],
    tracker: Any,
    loss_scale: float,
    iteration: int,
    writer: Any = None,
    wandb_writer: Any = None,
    *rest: Any,
    num_layers: int | None = None,
    **kwargs: Any,
) -> Any:
    from megatron.training import get_args

    text = original(
        tracker,
        loss_scale,
        iteration,
        writer,
        wandb_writer,
        *rest,
        num_layers=num_layers,
        **kwargs,
    )
    if iteration % get_args().tensorboard_log_interval == 0 and num_layers is not None:
        layer_class.tracker.write(iteration, num_layers, writer, wandb_writer)
    return text


def _say_recipe(args: Any, recipe: str) -> None:
    if args.fp8 is not None:
        _print(
            f"--fp8-format {args.fp8} --fp8-recipe {args.fp8_recipe}: the experts run with "
            f"--ep-fp8 {recipe}, in e4m3 forward and backward"
        )


def _say(what: str) -> None:
    device = "CPU mode (gloo)" if cpu.wanted() else "GPU"
    _print(f"hosts Megatron's MoE layers; {what}; {device}")


def _print(what: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"ep_plugin {__version__}: {what}", flush=True)
