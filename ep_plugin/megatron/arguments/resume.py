"""Optimizer state that can be resumed at another layout, and a clear word where it cannot.

Megatron's distributed optimizer saves by buckets of the layout (`dp_reshardable`) unless it is told
otherwise. With experts a bucket of another expert-parallel size holds other experts, and nothing
says so. Runs with experts therefore save by parameter (`fully_reshardable`).
"""

from pathlib import Path
from typing import Any

from ep_plugin.checkpoint.formats.megatron_dist import TRACKER, open_stored
from ep_plugin.errors import ConfigError

BY_PARAMETER, BY_BUCKET = "fully_reshardable", "dp_reshardable"
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
    if not args.save:
        return None
    return (
        "optimizer state is saved by parameter (--dist-ckpt-optim-fully-reshardable), to be "
        f"resumed at any layout; --ep-optimizer-format {BY_BUCKET} keeps Megatron's default"
    )


def check_resumable(args: Any) -> None:
    """Raise ConfigError for state by buckets of another layout, which would be read as if of ours.

    Asks the checkpoint that `--load` names, where its optimizer is wanted.
    """
    if args.num_experts is None or not args.use_distributed_optimizer or not args.load:
        return
    if args.finetune or args.no_load_optim or args.ckpt_format != "torch_dist":
        return
    folder = Path(args.load)
    if args.ckpt_step is not None:
        folder /= f"iter_{args.ckpt_step:07d}"
    elif not (folder / TRACKER).is_file():
        return  # nothing to load: Megatron starts afresh
    try:
        common = open_stored(folder).common
    except ConfigError:
        return  # of another format, or not whole: Megatron has words for it
    metadata, saved = common.get("content_metadata") or {}, common.get("args")
    if metadata.get("distrib_optim_sharding_type") != BY_BUCKET:
        return
    theirs, ours = ({n: _size(a, n) for n in SIZES} for a in (saved, args))
    if theirs != ours:
        at, wanted = (", ".join(f"{n}={s}" for n, s in sizes.items()) for sizes in (theirs, ours))
        raise ConfigError(
            f"{folder} holds optimizer state by buckets of its layout ({BY_BUCKET}, {at}), and "
            f"this run has {wanted}; resume at that layout, which then saves by parameter, or "
            "leave the optimizer out with --no-load-optim"
        )


def _size(args: Any, name: str) -> int:
    size = getattr(args, SIZES[name], None)
    if size is None:  # as tensor parallelism, Megatron's default
        return _size(args, "tp") if name == "etp" else 1
    return int(size)
