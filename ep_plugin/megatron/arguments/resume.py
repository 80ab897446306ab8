"""What a run loads: state that can be resumed at another layout, a clear word where it cannot.

Megatron's distributed optimizer saves by buckets of the layout (`dp_reshardable`) unless it is told
otherwise. With experts a bucket of another expert-parallel size holds other experts, and nothing
says so. Runs with experts therefore save by parameter (`fully_reshardable`).
"""

import argparse
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from ep_plugin.checkpoint.formats import megatron_dist, megatron_legacy
from ep_plugin.checkpoint.formats.megatron_dist import TRACKER
from ep_plugin.checkpoint.open import is_hf
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.other_class import check_class
from ep_plugin.megatron.arguments.other_settings import other_settings

BY_PARAMETER, BY_BUCKET = "fully_reshardable", "dp_reshardable"
SHARDING = "param_state_sharding_type"  # in the state of a distributed optimizer alone
SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}


def choose_format(args: Any) -> str | None:
    """Make saves resumable at any layout, unless `--ep-optimizer-format` says otherwise.

    Returns what to say of it, once; None when Megatron was told so already, or nothing is saved.
    """
    if args.num_experts is None or not args.use_distributed_optimizer:
        return None
    if args.ckpt_format != "torch_dist" or args.dist_ckpt_optim_fully_reshardable:
        return None
    if args.ep_optimizer_format == BY_BUCKET:
        return None
    args.dist_ckpt_optim_fully_reshardable = True
    if not args.save or args.no_save_optim:
        return None
    return (
        "optimizer state is saved by parameter (--dist-ckpt-optim-fully-reshardable), to be "
        f"resumed at any layout; --ep-optimizer-format {BY_BUCKET} keeps Megatron's default"
    )


def note_vocabulary(args: Any) -> None:
    """Note the size of the vocabulary for the checkpoint; rows beyond the tokenizer's pad it.

    What a loaded checkpoint said stays: a model may have more words than its tokenizer.
    """
    if getattr(args, "ep_vocab_size", None) is not None:
        return
    try:
        tokenizer = import_module("megatron.training.global_vars").get_tokenizer()
    except AssertionError:  # Megatron's word for a script that made none
        return
    if tokenizer.vocab_size <= args.padded_vocab_size:
        args.ep_vocab_size = tokenizer.vocab_size


def check_resumable(args: Any) -> str | None:
    """Raise ConfigError for a checkpoint that this run cannot load, before Megatron tries.

    Returns what it has set otherwise than the run that saved; None where it is nothing. Asks what
    --load names, or --pretrained-checkpoint where that has none. The size of the vocabulary in it
    goes along, as `args.ep_vocab_size`.
    """
    folder, goes_on, release = _loaded(args)
    if folder is None:
        return None  # Megatron starts afresh
    common, is_dist = _beside_the_weights(folder)
    saved = common.get("args")
    if not isinstance(saved, argparse.Namespace):
        return None  # of another format, or not whole: Megatron has words for it
    if getattr(saved, "ep_vocab_size", None) is not None:
        args.ep_vocab_size = saved.ep_vocab_size
    _check_experts(args, folder, saved)
    optimizer = not (release or args.no_load_optim or getattr(saved, "no_save_optim", False))
    other = check_class(args, folder, saved, common.get("content_metadata"), optimizer)
    trains = (args.train_iters or args.train_samples) and not args.skip_train
    if not (trains and is_dist) or args.no_load_optim:
        return None
    goes_on = goes_on and not args.finetune
    translated = other and optimizer  # which Megatron does to begin anew, too
    if translated or goes_on:
        _check_optimizer(args, folder, saved, common, translated)
        _check_buckets(args, folder, saved, common)
    if not goes_on:
        return None
    _check_schedule(args, folder, common)
    return other_settings(args, saved)


def loaded_model(args: Any) -> tuple[Path | None, argparse.Namespace | None]:
    """Return the folder that is loaded, and the run arguments in it; None where there are none.

    Raises ConfigError for a folder that Megatron does not read, and would begin without.
    """
    folder = _loaded(args).folder
    if folder is None:
        return None, None
    saved = _beside_the_weights(folder)[0].get("args")
    return folder, saved if isinstance(saved, argparse.Namespace) else None


class _Loaded(NamedTuple):
    """What a run begins with."""

    folder: Path | None
    goes_on: bool = False  # the run that saved it
    release: bool = False  # weights alone: of others or converted


def _loaded(args: Any) -> _Loaded:
    """Return the folder that is loaded.

    Raises ConfigError for a folder that Megatron does not read, and would begin without.
    """
    names = [(args.load, True), (getattr(args, "pretrained_checkpoint", None), False)]
    for folder, goes_on in ((Path(name), goes_on) for name, goes_on in names if name):
        tracker = folder / TRACKER
        _check_tracker(tracker)
        if args.ckpt_step is not None:
            return _Loaded(folder / f"iter_{args.ckpt_step:07d}", goes_on)
        if tracker.is_file():
            release = tracker.read_text().strip() == "release"
            return _Loaded(folder, goes_on and not release, release)
        if is_hf(folder):
            raise ConfigError(
                f"{folder} is a Hugging Face model, which Megatron does not read; use ep-plugin "
                f"convert --from {folder} --to {folder}-megatron, then --load {folder}-megatron"
            )
    return _Loaded(None)


def _check_tracker(tracker: Path) -> None:
    """Raise ConfigError for a tracker that names no iteration, as a run killed in a save leaves."""
    text = tracker.read_text(errors="replace").strip() if tracker.is_file() else "release"
    if text.isdecimal() or text == "release":
        return
    whole = [
        int(path.parent.name.removeprefix("iter_"))
        for path in sorted(tracker.parent.glob("iter_*/.metadata"))
        if (path.parent / "metadata.json").is_file()
        and path.parent.name.removeprefix("iter_").isdecimal()
    ]
    use = f"; use echo {max(whole)} > {tracker}" if whole else "; use another --load"
    raise ConfigError(
        f"{tracker} names no iteration (it holds {text[:40]!r}), which a run that was killed while "
        f"it saved may leave; {f'{max(whole)} is the newest that is whole' if whole else ''}"
        f"{'' if whole else 'no iteration beside it is whole'}{use}"
    )


def _beside_the_weights(folder: Path) -> tuple[dict[str, Any], bool]:
    """Return what a checkpoint keeps beside its weights, and whether it is torch_dist's."""
    for format_ in (megatron_dist, megatron_legacy):
        try:
            return format_.read_common(folder), format_ is megatron_dist
        except ConfigError:
            continue
    return {}, False


def _check_experts(args: Any, folder: Path, saved: Any) -> None:
    """Raise ConfigError where the model has experts and the checkpoint others, or none."""
    theirs, ours = getattr(saved, "num_experts", None), args.num_experts
    if ours and not theirs:
        raise ConfigError(
            f"{folder} holds a model without experts, and this run has --num-experts {ours}; use "
            f"ep-plugin convert --from {folder} --to {folder}-experts --num-experts {ours} "
            f"--topk {args.moe_router_topk}, then --load {folder}-experts"
        )
    if theirs and theirs != ours:
        found = f"--num-experts is {ours}" if ours else "this run has none"
        raise ConfigError(
            f"{folder} holds a model with {theirs} experts, and {found}; use --num-experts {theirs}"
        )
    for flag, width in _WIDTHS.items():
        if ours and width(saved) and width(args) and width(saved) != width(args):
            raise ConfigError(
                f"{folder} holds experts of {flag} {width(saved)}, and here it is {width(args)}; "
                f"use {flag} {width(saved)}"
            )


_WIDTHS: dict[str, Callable[[Any], int | None]] = {
    "--moe-ffn-hidden-size": lambda args: (
        getattr(args, "moe_ffn_hidden_size", None) or getattr(args, "ffn_hidden_size", None)
    ),
    "--moe-shared-expert-intermediate-size": lambda args: getattr(
        args, "moe_shared_expert_intermediate_size", None
    ),
}


def _check_optimizer(
    args: Any, folder: Path, saved: Any, common: dict[str, Any], translated: bool
) -> None:
    """Raise ConfigError where the optimizer's state is not there, or not as this run keeps it.

    `translated`: it is loaded into the other class of models, also where a run begins anew.
    Without the distributed optimizer, a run with expert parallelism has a second optimizer for its
    experts, and Megatron loads the state of as many as there are.
    """
    state = common.get("optimizer")
    if not isinstance(state, dict):
        way = "" if translated else "--finetune to begin anew with its weights, or "
        raise ConfigError(
            f"{folder} holds no optimizer state; use {way}--no-load-optim --no-load-rng to keep "
            "its iteration"
        )
    if {getattr(a, "optimizer", "adam") for a in (saved, args)} - {"adam", "sgd"}:
        return  # the others are several optimizers by nature
    parts = {key: part for key, part in state.items() if isinstance(key, int)} or {0: state}
    distributed = any(SHARDING in part for part in parts.values())
    if distributed != bool(args.use_distributed_optimizer):
        said, way = ("with", "use") if distributed else ("without", "leave out")
        raise ConfigError(
            f"{folder} was saved {said} --use-distributed-optimizer, whose state is kept "
            f"otherwise; {way} --use-distributed-optimizer, or use --no-load-optim"
        )
    two = experts_apart(args)
    if not distributed and args.num_experts and two != (len(parts) > 1):
        ep, tp = size(saved, "ep"), args.tensor_model_parallel_size
        way = "--expert-model-parallel-size 1" if two else f"--expert-model-parallel-size {ep}"
        if two and size(args, "etp") != tp:
            way += f" --expert-tensor-parallel-size {tp}"
        if not two and not experts_apart(saved):  # a conversion, which has no layout
            way = f"--expert-model-parallel-size {args.num_experts}"
        raise ConfigError(
            f"{folder} holds the state of {'one optimizer' if two else 'two optimizers'}, and this "
            f"run has {'a second one for its experts' if two else 'one'}; use {way}, or "
            "--no-load-optim"
        )


def experts_apart(args: Any) -> bool:
    """Whether experts are averaged over other ranks than the rest, in groups of their own.

    Arguments of a conversion have no layout, and count as one rank's.
    """
    return size(args, "ep") > 1 or size(args, "etp") != size(args, "tp")


def _check_buckets(args: Any, folder: Path, saved: Any, common: dict[str, Any]) -> None:
    """Raise ConfigError for state by buckets of another layout, read as if of ours."""
    metadata = common.get("content_metadata") or {}
    if args.num_experts is None or not args.use_distributed_optimizer:
        return
    if metadata.get("distrib_optim_sharding_type") != BY_BUCKET:
        return
    theirs, ours = ({n: size(a, n) for n in SIZES} for a in (saved, args))
    if theirs != ours:
        at, wanted = (", ".join(f"{n}={s}" for n, s in sizes.items()) for sizes in (theirs, ours))
        flags = [
            f"--{SIZES[name].replace('_', '-')} {theirs[name]}"
            for name in SIZES
            if theirs[name] != ours[name]
        ]
        raise ConfigError(
            f"{folder} holds optimizer state by buckets of its layout ({BY_BUCKET}, {at}), and "
            f"this run has {wanted}; use {' '.join(flags)}, which then saves by parameter, or "
            "--no-load-optim"
        )


def _check_schedule(args: Any, folder: Path, common: dict[str, Any]) -> None:
    """Raise ConfigError where the scheduler, which goes on with the optimizer, has other settings;
    Megatron demands that they are equal unless a flag says which of the two to follow."""
    theirs = common.get("opt_param_scheduler")
    if not isinstance(theirs, dict):
        return
    if args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler:
        return
    differing = [
        f"{flag} {theirs[name]}, here {ours}"
        for name, (flag, ours) in _schedule(args).items()
        if name in theirs and theirs[name] != ours
    ]
    if differing:
        raise ConfigError(
            f"{folder} goes on with another schedule ({'; '.join(differing)}); use "
            "--override-opt-param-scheduler to follow this command line, "
            "--use-checkpoint-opt-param-scheduler to follow the checkpoint, or --finetune"
        )


def _schedule(args: Any) -> dict[str, tuple[str, Any]]:
    """Return what Megatron's scheduler will be made of: its name there -> (flag, value)."""
    if args.train_iters:
        batch, unit = args.global_batch_size, "iters"
        length, decay, warmup = args.train_iters, args.lr_decay_iters, args.lr_warmup_iters
    else:
        batch, unit = 1, "samples"
        length, decay, warmup = args.train_samples, args.lr_decay_samples, args.lr_warmup_samples
    decayed = (decay or length) * batch
    fraction = args.lr_warmup_fraction
    return {
        "max_lr": ("--lr", args.lr),
        "min_lr": ("--min-lr", args.min_lr),
        "lr_decay_style": ("--lr-decay-style", args.lr_decay_style),
        "lr_decay_steps": (f"--lr-decay-{unit}, in samples,", decayed),
        "lr_warmup_steps": (
            f"--lr-warmup-{unit}, in samples,",
            warmup * batch if fraction is None else fraction * decayed,
        ),
        "start_wd": ("--start-weight-decay", args.start_weight_decay),
        "end_wd": ("--end-weight-decay", args.end_weight_decay),
        "wd_incr_steps": (f"--train-{unit}, in samples,", length * batch),
        "wd_incr_style": ("--weight-decay-incr-style", args.weight_decay_incr_style),
    }


def size(args: Any, name: str) -> int:
    """Return a degree of SIZES; etp is as tp where it is not set, Megatron's default."""
    degree = getattr(args, SIZES[name], None)
    if degree is None:
        return size(args, "tp") if name == "etp" else 1
    return int(degree)
