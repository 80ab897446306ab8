"""Optimizers of emerging-optimizers beside settings that Megatron, or that package, trips over.

What Megatron refuses in words of its own while it checks arguments is left to it.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from ep_plugin.checkpoint.formats.megatron_dist import open_stored
from ep_plugin.errors import ConfigError
from ep_plugin.extras import pip_install
from ep_plugin.megatron.arguments.resume import experts_apart, size
from ep_plugin.megatron.seams import touchpoints
from ep_plugin.megatron.seams.matrices import PACKAGE, package_version
from ep_plugin.moe.parallel import degree

REPOSITORY = "https://github.com/NVIDIA-NeMo/Emerging-Optimizers"
OF_PACKAGE = ("muon", "dist_muon", "lion")


def check_optimizer(args: Any) -> None:
    """Raise ConfigError where `--optimizer` cannot train experts, or go on from what is loaded.

    `args` are validated ones: from 0.18 on dist_muon is muon with the layer-wise optimizer there.
    """
    if args.optimizer not in OF_PACKAGE:
        return
    named = f"--optimizer ({args.optimizer})"
    core = touchpoints.installed_version()
    _check_package(named, core, package_version())
    layer_wise = getattr(args, "use_layer_wise_distributed_optimizer", None)  # None until 0.17
    if args.fp16 and (layer_wise is not None or args.optimizer != "lion"):
        raise ConfigError(f"{named} has no loss scaling for --fp16; use --bf16")
    if getattr(args, "use_mup", False) and layer_wise is None and args.optimizer != "lion":
        raise ConfigError(
            f"{named} with --use-mup would give the experts' matrices Adam's learning rate in "
            f"megatron-core {core}; use pip install 'megatron-core[training]>=0.18,<0.20'"
        )
    if layer_wise or (layer_wise is None and args.optimizer == "dist_muon"):
        _check_copies(named, args)
    if layer_wise:
        _check_layer_wise(f"{named} with --use-distributed-optimizer", args)
    _check_state(args)


def _check_package(named: str, core: str, installed: tuple[int, int] | None) -> None:
    """Raise ConfigError for a package that this Megatron's optimizers are not made for."""
    lowest, below = touchpoints.release_for(core).EMERGING_OPTIMIZERS
    if installed is not None and lowest <= installed and (below is None or installed < below):
        return
    got = "none is installed" if installed is None else f"got {_dotted(installed)}"
    if below is None:
        raise ConfigError(
            f"{named} needs {PACKAGE} {_dotted(lowest)} or newer, {got}; use {pip_install('muon')}"
        )
    raise ConfigError(
        f"{named} needs {PACKAGE} older than {_dotted(below)} with megatron-core {core}, {got}; "
        f"use pip install 'git+{REPOSITORY}@v{_dotted(lowest)}.0', or megatron-core 0.17 or newer"
    )


def _check_layer_wise(named: str, args: Any) -> None:
    """Raise ConfigError for what Megatron's layer-wise optimizer trips over while it is built."""
    if not args.bf16:
        raise ConfigError(f"{named} trains in bf16 alone; use --bf16")
    if args.add_bias_linear and experts_apart(args) and args.use_layer_wise_param_layout:
        raise ConfigError(
            f"{named} has no place for the experts' biases, which are no matrices; use "
            "--disable-bias-linear, or --no-use-layer-wise-param-layout"
        )


def _check_copies(named: str, args: Any) -> None:
    """Raise ConfigError where several ranks hold an expert: each would save its state as the one.

    Megatron's layer-wise optimizer gives what it saves the place of a first copy, on every rank.
    """
    ep, per_layer = size(args, "ep"), getattr(args, "ep_experts_per_layer", None)
    few = [number for number in per_layer or () if degree(ep, number) < ep]
    if few:
        with_state = " with --use-distributed-optimizer" * (args.optimizer != "dist_muon")
        raise ConfigError(
            f"{named}{with_state} saves each expert from every rank that holds it, and "
            f"--ep-experts-per-layer has layers of {few[0]} experts, which several of "
            f"--expert-model-parallel-size ({ep}) ranks hold; use "
            f"--optimizer {args.optimizer.removeprefix('dist_')} without "
            "--use-distributed-optimizer"
        )


def _check_state(args: Any) -> None:
    """Raise ConfigError for the state of another optimizer, or of experts stepped with the rest.

    Megatron keeps a step and hyperparameters for each group of parameters, and a group of their own
    for experts that are averaged over other ranks than the rest; it loads as many as there are.
    """
    if not args.load or args.finetune or args.no_load_optim or args.ckpt_format != "torch_dist":
        return
    folder = Path(args.load)
    if args.ckpt_step is not None:
        folder /= f"iter_{args.ckpt_step:07d}"
    try:
        saved = open_stored(folder).common.get("args")
    except ConfigError:
        return  # nothing there, or of another format: Megatron has words for it
    if not isinstance(saved, Namespace):
        return
    theirs, ours = _kind(saved), _kind(args)
    if theirs != ours:
        raise ConfigError(
            f"{folder} was saved with {theirs}, and this run has {ours}, whose state is another; "
            f"use {theirs}, or --no-load-optim"
        )
    if experts_apart(saved) != experts_apart(args):
        apart = "apart from" if experts_apart(saved) else "with"
        raise ConfigError(
            f"{folder} holds the state of experts that were stepped {apart} the rest, unlike in "
            f"this run; use --expert-model-parallel-size {size(saved, 'ep')} "
            f"--expert-tensor-parallel-size {size(saved, 'etp')}, or --no-load-optim"
        )


def _kind(args: Any) -> str:
    """Return the flags of an optimizer."""
    distributed = args.use_distributed_optimizer or getattr(
        args, "use_layer_wise_distributed_optimizer", False
    )
    return f"--optimizer {args.optimizer}" + " --use-distributed-optimizer" * bool(distributed)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
