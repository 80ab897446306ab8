"""Putting our block where Megatron looks its own up, and taking it out again."""

import functools
import inspect
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from ep_plugin import __version__
from ep_plugin.checkpoint.moe_layers import hybrid_layers
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.cpu import gpu_packages
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.distill import seam as distillation
from ep_plugin.megatron.seams import (
    alike,
    apex,
    attention,
    audit_save,
    built,
    captured,
    chained,
    check_save,
    copies,
    expert_bias,
    failed_save,
    hybrid,
    rope_factor,
    served,
    sharded,
    torch_adam,
    touchpoints,
    upcycling_by_hand,
    watch_ranks,
    wheel,
    workers_end,
)
from ep_plugin.megatron.seams.patches import Patches
from ep_plugin.megatron.workers import layout_run

MODULE_SPECS = "megatron.core.models.gpt.moe_module_specs"
ARGUMENTS = "megatron.training.arguments"
SCHEDULES = "megatron.core.pipeline_parallel.schedules"
GLOBAL_VARS = "megatron.training.global_vars"
TRANSFORMER_CONFIG = "megatron.core.transformer.transformer_config:TransformerConfig"
MODULE = "megatron.core.transformer.module:MegatronModule"

_patches = Patches()  # the one piece of state: what `install` changed in this process


def install(settings: Any = None) -> None:
    """Make Megatron build our block in every MoE layer, with CPU mode where there is no GPU.

    `settings`, an EdgeSettings, is for loops that do not parse Megatron's arguments; where they
    are parsed, the --ep-* flags take its place. A second call does nothing. Every touch point is
    verified first: raises ConfigError when the installed Megatron is not one we know. On any error
    nothing is changed.
    """
    global _patches
    if _patches.active:
        return
    had_cpu_mode, on_cpu = cpu_mode.active(), cpu_mode.wanted()
    try:
        if on_cpu:
            gpu_packages.hide()  # before the first import of Megatron, which its version takes
        foreign = apex.foreign_apex()
        if foreign is not None:
            raise ConfigError(foreign)
        release = touchpoints.release_for(touchpoints.installed_version())
        if on_cpu:
            cpu_mode.enable()
        patches = Patches()
        checked = touchpoints.verify()
        changes(patches, release, settings)
        patches.apply()
    except BaseException:
        if not had_cpu_mode:
            cpu_mode.disable()
        raise
    _patches = patches
    version = touchpoints.installed_version()
    _say(f"{len(checked)} touch points checked in megatron-core {version}")
    if (about := touchpoints.experimental(version)) is not None:
        _print(about)


def uninstall() -> None:
    """Put back every attribute that `install` replaced, CPU mode included, if it did.

    What somebody replaced after us stays as it is, and is named.
    """
    for left in (*_patches.undo(), *cpu_mode.disable()):
        _print(f"{left}; it is left as it is")


def say_unused() -> None:
    """Say so where Megatron neither parsed its flags nor built a block of ours in this process."""
    layer_class = import_module(MODULE_SPECS).MoELayer
    if not getattr(layer_class, "used", True):
        _print(
            "no MoE layer was built in this process, and no flag of Megatron's parsed; a script "
            "that starts workers of its own needs ep_plugin.megatron.install() in the worker: "
            f"{served.PAGE}"
        )


def seams() -> list[tuple[str, str]]:
    """Return (place, why there) of all that `install` would change here; changes nothing."""
    patches = Patches()
    if cpu_mode.wanted():
        gpu_packages.changes(patches)
        cpu_mode.torch_changes(patches)
        cpu_mode.megatron_changes(patches)
    changes(patches, touchpoints.release_for(touchpoints.installed_version()))
    return patches.table()


def changes(patches: Patches, release: Any, settings: Any = None) -> None:
    """Note every change to make in Megatron, of a release in `versions/`."""
    layer_class = _make_layer_class(release.losses.record, settings)
    patches.wrap(
        f"{TRANSFORMER_CONFIG}.__post_init__",
        functools.partial(_with_activation, layer_class),
        "an activation has to be set before this derives others from it; --ep-dense-activation",
    )
    patches.wrap(
        f"{MODULE}.set_is_first_microbatch",
        _with_our_weights,
        "Megatron's schedules call it when a step begins, which is when e4m3 weights are made anew",
    )
    if release.UNMARKED_MTP is not None:
        patches.wrap(
            release.UNMARKED_MTP,
            functools.partial(_with_mtp_marked, layer_class),
            "a layer of multi-token prediction does not tell our block that it is one",
        )
    chained.changes(patches)
    upcycling_by_hand.changes(patches)
    release.muon.changes(patches)
    expert_bias.changes(patches)
    copies.changes(patches)
    built.changes(patches, layer_class)
    sharded.changes(patches, layer_class, release.SHARDERS)
    if release.HYBRID:
        hybrid.changes(patches)
    patches.wrap(
        f"{SCHEDULES}:forward_step_calc_loss",
        layer_class.strength.around_loss,
        "here the number of counted tokens is known, which auxiliary losses weigh by",
    )
    training = touchpoints.has_training()
    if training:
        _argument_changes(patches, layer_class)
        failed_save.changes(patches)
        audit_save.changes(patches)
        check_save.changes(patches)
        layout_run.changes(patches, release.losses.WRITERS)
        served.changes(patches, layer_class)
        attention.changes(patches, _print)
        captured.changes(patches, layer_class)
        rope_factor.changes(patches)
        watch_ranks.changes(patches)
        distillation.changes(patches)
    for place in release.losses.WRITERS:
        if training or not place.startswith("megatron.training"):
            patches.wrap(
                place,
                functools.partial(_with_our_metrics, layer_class),
                "Megatron writes the losses of MoE layers here; the routers' metrics join them",
            )
    workers_end.changes(patches)
    alike.changes(patches, layer_class, training)
    wheel.changes(patches)
    torch_adam.changes(patches)
    patches.at_exit(_end, "Megatron frees no CUDA graphs, and logs after its last flush")
    patches.replace(
        f"{MODULE_SPECS}:MoELayer", layer_class, "every MoE layer's spec is made of this name"
    )


def _argument_changes(patches: Patches, layer_class: Any) -> None:
    patches.wrap(
        f"{ARGUMENTS}:add_megatron_arguments",
        functools.partial(_with_our_flags, layer_class),
        "every parser of Megatron's loop is filled here; the --ep-* flags join",
    )
    for place in cpu_mode.validators():
        patches.wrap(
            place,
            functools.partial(_with_our_checks, layer_class),
            "every flag is parsed and nothing is built yet: a mistake ends the run here",
        )


def _make_layer_class(record_loss: Callable[..., None], settings: Any) -> Any:
    """Return a fresh subclass of the adapter, so that settings of one install do not outlive it."""
    adapter = import_module("ep_plugin.megatron.block.adapter")
    tracker = import_module("ep_plugin.megatron.block.tracking").RoutingTracker(record_loss)
    strength = import_module("ep_plugin.megatron.block.strength")
    fields = {"tracker": tracker, "strength": strength.Strength(), "shared": {}}
    if settings is not None:
        fields["settings"] = settings
    return type("MoELayer", (adapter.EPMoELayer,), fields)


def _with_our_flags(layer_class: Any, original: Callable[..., Any], parser: Any) -> Any:
    from ep_plugin.megatron.arguments.parser import add_ep_arguments

    layer_class.used = True
    layer_class.parser = found = add_ep_arguments(original(parser))
    layer_class.known = {action.dest for action in found._actions}  # a script may add its own
    return found


def _with_our_checks(
    layer_class: Any, original: Callable[..., Any], args: Any, *rest: Any, **kwargs: Any
) -> Any:
    from ep_plugin.megatron.arguments.checks import (
        check_arguments,
        check_block,
        check_typed,
        idle,
        settings_from_args,
        spread,
        take_typed,
    )
    from ep_plugin.megatron.arguments.in_flags import refusal
    from ep_plugin.megatron.arguments.layer_pattern import pattern_of
    from ep_plugin.megatron.arguments.not_saved import at_start
    from ep_plugin.megatron.arguments.optimizers import check_optimizer
    from ep_plugin.megatron.arguments.resume import check_resumable, choose_format
    from ep_plugin.megatron.arguments.speed import take_speed
    from ep_plugin.megatron.arguments.theirs import check
    from ep_plugin.megatron.arguments.unbalanced import unbalanced
    from ep_plugin.megatron.arguments.watched import watch
    from ep_plugin.megatron.block.graphs import check_graphs
    from ep_plugin.megatron.distill.fits_student import check_teacher
    from ep_plugin.megatron.seams.refusal import refuse
    from ep_plugin.megatron.settings import fp8_recipe

    layer_class.typed = typed = take_typed(args)
    try:
        wheel.check_helpers()
        check_typed(args, typed)
        attention.check_installed(args)
        about_speed = take_speed(args, typed)
        layer_class.settings = settings_from_args(args)
        layer_class.pattern = pattern_of(args)
        layer_class.minutes = args.distributed_timeout_minutes
        layer_class.log_interval = args.tensorboard_log_interval
        check_arguments(args, layer_class.settings)
        said, of_watch = choose_format(args), watch(args)
        validated = original(args, *rest, **kwargs)
        otherwise = check_resumable(args)
        check_teacher(args)
        for line in (said, of_watch, otherwise, at_start(args)):
            if line is not None:
                _print(line)
        for line in about_speed:
            _print(line)
        if args.num_experts is not None:
            check(args, layer_class.settings)
            check_optimizer(args)
            check_graphs(args, layer_class.settings)
            check_block(args, layer_class.settings)
            _say_recipe(args, fp8_recipe(args, layer_class.settings))
            _say_idle(idle(args, typed), args.expert_model_parallel_size)
            settings = layer_class.settings
            for line in (spread(args, settings), unbalanced(args, settings)):
                if line is not None:
                    _print(line)
    except ConfigError as error:
        refuse(refusal(error, typed))
    return validated


def _with_activation(layer_class: Any, original: Callable[..., Any], config: Any) -> None:
    """Give the dense blocks the activation of `--ep-dense-activation`."""
    from ep_plugin.megatron.settings import ACTIVATIONS

    wanted = layer_class.settings.dense_activation
    if wanted is not None:
        config.activation_func, config.gated_linear_unit = ACTIVATIONS[wanted]
        config.bias_activation_fusion = False  # fused kernels exist for Megatron's own pairs alone
    original(config)


def _with_mtp_marked(
    layer_class: Any, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> None:
    layer_class.inside_mtp = True
    try:
        original(*args, **kwargs)
    finally:
        layer_class.inside_mtp = False


def _with_our_weights(original: Callable[..., Any], module: Any) -> None:
    """Pass on to our experts that a step begins: weights in e4m3 are made anew, once a step.

    Megatron's schedules call it; under a loop that does not, experts quantise at every call.
    """
    from ep_plugin.moe.experts.experts import Experts

    original(module)
    for part in module.modules():
        if isinstance(part, Experts):
            part.weights_change_every_call, part.is_first_microbatch = False, True


def _with_our_metrics(
    layer_class: Any, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Write what our tracker has when and where Megatron writes its losses.

    Of a HybridModel Megatron's loop gives the number of `E`s for that of all layers. A pipeline
    stage without an `E` then has a table of another length than the others, and all wait.
    """
    bound = inspect.signature(original).bind(*args, **kwargs)
    given = bound.arguments
    if layer_class.pattern is not None and given.get("num_layers") is not None:
        layers = hybrid_layers(layer_class.pattern)
        given |= {"num_layers": len(layers), "moe_layer_freq": [int(moe) for moe in layers]}
    text = original(*bound.args, **bound.kwargs)
    iteration, num_layers = given["iteration"], given.get("num_layers")
    if num_layers is not None and iteration % layer_class.log_interval == 0:
        writers = given.get("writer"), given.get("wandb_writer")
        layer_class.tracker.write(iteration, *writers)
    return text


def _end() -> None:
    """Free graphs, which Megatron does not, and flush TensorBoard.

    Megatron logs its last evaluation after it flushed for the last time.
    """
    from ep_plugin.megatron.block.graphs import end_graphs

    end_graphs()
    global_vars = sys.modules.get(GLOBAL_VARS)
    writer = global_vars.get_tensorboard_writer() if global_vars is not None else None
    if writer is not None:
        writer.flush()


def _say_recipe(args: Any, recipe: str) -> None:
    if args.fp8 is not None:
        _print(
            f"--fp8-format {args.fp8} --fp8-recipe {args.fp8_recipe}: the experts run with "
            f"--ep-fp8 {recipe}, in e4m3 forward and backward"
        )


def _say_idle(flags: list[str], ranks: int) -> None:
    if flags:
        _print(f"idle at expert-parallel size {ranks}: {', '.join(flags)}")


def _say(what: str) -> None:
    device = "GPU"
    if cpu_mode.wanted():
        hidden = ", ".join(gpu_packages.installed())
        device = f"CPU mode (gloo{', without ' + hidden if hidden else ''})"
    _print(f"hosts Megatron's MoE layers; {what}; {device}")


def _print(what: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"ep_plugin {__version__}: {what}", flush=True)
