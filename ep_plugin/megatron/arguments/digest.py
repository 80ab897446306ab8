"""What all ranks must have set alike, and the list of what may differ between them.

An argument that stands in no list here must be equal on all ranks; so must one of a Megatron to
come. Imports neither torch nor Megatron.
"""

import hashlib
import json
from argparse import Namespace
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

from ep_plugin.megatron.arguments.table import TABLE, TYPED

# May differ freely: argument -> why that is harmless.
OWN = {
    "rank": "says which process it is",
    "local_rank": "says which process of its host it is",
    "logging_level": "what a process prints of its own",
    "profile_ranks": "each rank looks for itself in it, and only records",
    "tensorboard_queue_size": "a buffer of the one rank that writes",
    "wandb_entity": "a name for the one rank that logs",
    "wandb_exp_name": "a name for the one rank that logs",
    "one_logger_project": "a name for the one rank that logs",
    "one_logger_run_name": "a name for the one rank that logs",
    "app_tag_run_name": "a name for the one rank that logs",
    "app_tag_run_version": "a name for the one rank that logs",
    TYPED: "the words of the command line; what they mean is compared",
}
# Places that one rank, or each for itself, writes to: whether one is given must be alike, since
# ranks sum up together what is written; which one it is may differ.
PLACES = {
    "tensorboard_dir": "one rank writes there",
    "wandb_save_dir": "one rank writes there",
    "wandb_project": "one rank writes there",
    "memory_snapshot_path": "each rank writes a dump of its own",
    "config_logger_dir": "each rank writes files of its own",
    "flight_recorder_dump_path": "each rank writes a dump of its own",
    "rl_profile_dir": "each rank writes files of its own",
    "moe_routing_trace_path": "each rank writes files of its own",
    "non_persistent_local_ckpt_dir": "the local disk of each host",
}
# Folders that all ranks write together: hosts may know one folder by other names, the ranks of one
# host may not.
TOGETHER = {
    "save": "each rank writes its part of a checkpoint",
    "ckpt_convert_save": "each rank writes its part of a checkpoint",
    "non_persistent_global_ckpt_dir": "each rank writes its part of a checkpoint",
    "data_cache_path": "one rank writes what the others of its host read",
}
# Files and folders that ranks read: hosts may know them by other names; what is in them is
# compared instead (`ranks/contents.py`).
READ = {
    "load": "the iteration in it is compared",
    "pretrained_checkpoint": "the iteration in it is compared",
    "bert_load": "the iteration in it is compared",
    "ict_load": "the iteration in it is compared",
    **dict.fromkeys(
        ("data_path", "train_data_path", "valid_data_path", "test_data_path"),
        "weights, sizes and the index of the data are compared",
    ),
    **dict.fromkeys(
        (
            *("data_args_path", "per_split_data_args_path", "per_dataset_sequences_path"),
            *("tokenizer_model", "tokenizer_metadata", "metadata_path", "vocab_file", "merge_file"),
            *("block_data_path", "embedding_path", "evidence_data_path", "titles_data_path"),
            *("heterogeneous_layers_config_path", "nccl_communicator_config_path"),
            *("te_precision_config_file", "tp_comm_overlap_cfg", "yaml_cfg"),
        ),
        "the content is compared",
    ),
}


def digest(args: Any) -> str:
    """Return a hash of `alike(args)`: equal in every process and run that has these arguments."""
    return hash_of(alike(args))


def hash_of(facts: Any) -> str:
    """Return a short hash of anything that JSON can hold."""
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def alike(args: Any) -> dict[str, str]:
    """Return by name what ranks must have alike, of Megatron's arguments with ours among them."""
    own = OWN.keys() | {row.dest for row in TABLE if not row.alike}
    places = PLACES.keys() | TOGETHER.keys() | READ.keys()
    return {
        name: "given" if name in places and value is not None else text_of(value)
        for name, value in vars(args).items()
        if name not in own
    }


def text_of(value: Any) -> str:
    """Return a value as text without addresses in memory, and in an order of its own."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(text_of, value))}]"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(text_of, value)))}}}"
    if isinstance(value, dict):
        return text_of(sorted((str(key), text_of(part)) for key, part in value.items()))
    name = type(value).__qualname__
    if is_dataclass(value) and not isinstance(value, type) and _has_plain_repr(value):
        shown = {one.name: getattr(value, one.name, None) for one in fields(value) if one.repr}
        return f"{name}({_parts(shown)})"
    if isinstance(value, (Namespace, SimpleNamespace)):
        return f"{name}({_parts(vars(value))})"
    text = repr(value)
    if " at 0x" not in text:
        return text
    own = getattr(value, "__qualname__", None)
    return name if own is None else f"{value.__module__}.{own}"


def _has_plain_repr(value: Any) -> bool:
    """Whether Python made it: one that the class has itself says what of it counts."""
    method = type(value).__repr__
    return hasattr(method, "__wrapped__") and method.__module__ != "builtins"


def _parts(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={text_of(part)}" for name, part in values.items())
