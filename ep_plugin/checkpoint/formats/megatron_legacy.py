"""Megatron's per-rank files (`--ckpt-format torch`), read as if one rank had saved them.

    latest_checkpointed_iteration.txt
    iter_NNNNNNN/mp_rank_TT/model_optim_rng.pt            tensor-parallel rank
    iter_NNNNNNN/mp_rank_TT_PPP/...                       and pipeline-parallel rank
    iter_NNNNNNN/mp_rank_TT_EEE/, mp_rank_TT_PPP_EEE/     and expert-parallel rank, last

Each is a dictionary with the run arguments and one state dictionary per pipeline chunk (`model`, or
`model0`, `model1` ...), in which layers and experts count from 0 on every rank. Files are mapped
into memory; of a tensor only its parts are read. What is listed has the names of a torch_dist
checkpoint with an expert's tensors apart (`experts.experts.3.linear_fc1.weight`).

Tensor parallelism cuts a gated fc1 so that each rank has a piece of both halves:

    rank 0  gate 0, up 0     rank 1  gate 1, up 1     whole  gate 0, gate 1, up 0, up 1
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ep_plugin.checkpoint.carried import engine_reads
from ep_plugin.checkpoint.family import gated
from ep_plugin.checkpoint.formats import _rank_arguments, _rank_files
from ep_plugin.checkpoint.formats._iteration import inside, iteration_folder
from ep_plugin.checkpoint.formats._mapped import map_state
from ep_plugin.checkpoint.formats._metadata import MAX_NAME
from ep_plugin.checkpoint.inert import Unreadable, explained
from ep_plugin.checkpoint.tensors import Source, TensorInfo
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import cut

FILE = "model_optim_rng.pt"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# Experts of Megatron's sequential and grouped implementations, and of ours, stacked.
_EXPERTS = (
    re.compile(r"mlp\.experts\.local_experts\.(?P<expert>\d+)\.(?P<rest>linear_fc[12]\.\w+)"),
    re.compile(r"mlp\.experts\.(?P<rest>linear_fc[12]\.(?:weight|bias))(?P<expert>\d+)"),
)
_STACKED = re.compile(r"mlp\.experts\.(linear_fc[12]\.(?:weight|bias))")
_COLUMN = re.compile(
    r"embedding\.word_embeddings\.weight|output_layer\.(weight|bias)|"
    r".+\.linear_(qkv|fc1|q_proj|q_up_proj|kv_up_proj)\.(weight|bias)"
)
_ROW = re.compile(r".+\.linear_(proj|fc2)\.weight")
_DOWN = re.compile(r".+\.linear_(q|kv)_down_proj\.weight")
_AGAIN = "copy the checkpoint again"
Check = Callable[[Tensor], None]


@dataclass(frozen=True)
class RankPart:
    """A tensor-parallel rank's piece: an entry of a state dictionary, or one expert of it."""

    file: Path
    check: Check  # raises ConfigError where its bytes are not those that were written
    values: Tensor  # mapped, not read
    expert: int | None = None
    copies: list["RankPart"] = field(default_factory=list)  # of other expert-parallel ranks

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape if self.expert is None else self.values.shape[1:])

    def read(self, name: str) -> Tensor:
        """Return its values; raises ConfigError where another rank has others in its place."""
        self.check(self.values)
        values = self.values if self.expert is None else self.values[self.expert]
        for copy in self.copies:
            _rank_files.check_copy(name, self.file, values, copy.file, copy.read(name))
        return values


def open_checkpoint(path: Path) -> Source:
    """Open the checkpoint at `path`. Reads no tensor.

    Raises ConfigError when a rank's file is missing or damaged, or experts are cut otherwise than
    the rest of the model.
    """
    first = _first_file(path)
    folder, (common, _) = first.parents[1], _load(first)
    args = common.get("args")
    if not isinstance(args, argparse.Namespace):
        raise ConfigError(f"{first} holds no run arguments; give a checkpoint that Megatron saved")
    _rank_arguments.check(args, folder, sum(1 for _ in folder.glob(f"mp_rank_*/{FILE}")))
    parts, unread = _parts(folder, args)
    return Source(
        folder=folder,
        common=_without_weights(common),
        common_in_file=False,
        tensors={name: _info(name, pieces, args) for name, pieces in parts.items()},
        objects=frozenset(),
        read_tensor=lambda name: _whole(name, parts[name], args),
        read_object=partial(_no_object, folder),
        unread=tuple(sorted(unread)),
    )


def read_common(path: Path) -> dict[str, Any]:
    """Return what stands beside the weights of the checkpoint at `path`; raises ConfigError."""
    return _without_weights(_load(_first_file(path))[0])


def _first_file(path: Path) -> Path:
    folder = iteration_folder(path, lambda folder: any(folder.glob(f"mp_rank_*/{FILE}")))
    first = next(iter(sorted(folder.glob(f"mp_rank_*/{FILE}"))), None)
    if first is None:
        raise ConfigError(f"{folder} has no mp_rank_*/{FILE}; give the folder that --save named")
    return first


def _without_weights(common: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in common.items() if not key.startswith("model")}


def _no_object(folder: Path, name: str) -> bytes:
    raise KeyError(f"{folder} has no object {name}")


def _load(path: Path) -> tuple[dict[str, Any], Check]:
    """Return what a rank saved, and the check of a tensor in it; both raise ConfigError."""
    inside(path, path.parents[1])
    try:
        content, check = map_state(path)
        if type(content) is not dict or not all(type(key) is str for key in content):
            raise Unreadable("it is no dictionary")
    except (Unreadable, OSError, MemoryError) as error:
        raise _damaged(path, error) from error
    return content, partial(_checked, path, check)


def _checked(path: Path, check: Check, tensor: Tensor) -> None:
    try:
        check(tensor)
    except Unreadable as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path} {explained(error, 'is truncated or damaged')}")


def _parts(folder: Path, args: argparse.Namespace) -> tuple[dict[str, list[RankPart]], set[str]]:
    """Return for every whole tensor its pieces, tensor-parallel rank 0 first.

    And the names of states that only Transformer Engine reads, and that hold something.
    """
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    ep = getattr(args, "expert_model_parallel_size", 1) or 1
    etp = getattr(args, "expert_tensor_parallel_size", None) or tp
    if getattr(args, "num_experts", None) and etp != tp:
        raise ConfigError(
            f"{folder} has experts cut over {etp} ranks and the rest over {tp}; save it with "
            "--ckpt-format torch_dist"
        )
    ranks = {rank: _path(folder, rank, pp, ep) for rank in product(range(tp), range(pp), range(ep))}
    missing = [str(path.relative_to(folder)) for path in ranks.values() if not path.is_file()]
    if missing:
        raise ConfigError(f"{folder} lacks {', '.join(missing)}; {_AGAIN}")
    loaded = {rank: _load(path) for rank, path in ranks.items()}
    states = {rank: state for rank, (state, _) in loaded.items()}
    _rank_files.check_one_save({ranks[rank]: state for rank, state in states.items()})
    parts: dict[str, list[RankPart]] = {}
    unread: set[str] = set()
    for tp_rank in range(tp):
        first_layer = 0
        for chunk in _chunks(states[0, 0, 0]):  # interleaved: chunk by chunk over all ranks
            for pp_rank in range(pp):
                dense: dict[str, RankPart] = {}  # of the first expert-parallel rank
                for ep_rank in range(ep):
                    state = states[tp_rank, pp_rank, ep_rank].get(chunk)
                    if not isinstance(state, dict) or not all(type(name) is str for name in state):
                        raise ConfigError(
                            f"{ranks[tp_rank, pp_rank, ep_rank]} has no weights under {chunk}; "
                            f"{_AGAIN}"
                        )
                    for name in state:
                        if len(name) > MAX_NAME or not name.isprintable():
                            raise ConfigError(
                                f"{ranks[tp_rank, pp_rank, ep_rank]} has a tensor of the name "
                                f"{cut(name)}, which none has; {_AGAIN}"
                            )
                    unread |= _unread(state, first_layer)
                    check = loaded[tp_rank, pp_rank, ep_rank][1]
                    file = ranks[tp_rank, pp_rank, ep_rank]
                    own: dict[str, RankPart] = {}
                    part_of = partial(RankPart, file, check)
                    for name, part in _named(state, part_of, first_layer, ep_rank, ep, args):
                        if ".experts.experts." in name:
                            parts.setdefault(name, []).append(part)
                        else:
                            own[name] = part
                    if ep_rank == 0:
                        dense = own
                    _rank_files.check_names(own, file, dense, ranks[tp_rank, pp_rank, 0])
                    for name, part in own.items():
                        if ep_rank == 0:
                            parts.setdefault(name, []).append(part)
                        else:
                            dense[name].copies.append(part)
                first_layer += _num_layers(states[tp_rank, pp_rank, 0][chunk])
    return parts, unread


def _unread(state: dict[str, Any], first_layer: int) -> set[str]:
    """Return the layers' states that are not read, under the names of the whole model."""
    found = set()
    for name, value in state.items():
        if engine_reads(name, value):
            match = _LAYER.fullmatch(name)
            at = f"decoder.layers.{first_layer + int(match[1])}.{match[2]}" if match else name
            found.add(at)
    return found


def _path(folder: Path, rank: tuple[int, int, int], pp: int, ep: int) -> Path:
    tp_rank, pp_rank, ep_rank = rank
    name = f"mp_rank_{tp_rank:02d}"
    name += f"_{pp_rank:03d}" if pp > 1 else ""
    name += f"_{ep_rank:03d}" if ep > 1 else ""
    return folder / name / FILE


def _chunks(state: dict[str, Any]) -> list[str]:
    return sorted(
        (key for key in state if re.fullmatch(r"model\d*", key)), key=lambda k: (len(k), k)
    )


def _num_layers(state: dict[str, Any]) -> int:
    numbers = {match[1] for name in state if (match := _LAYER.fullmatch(name))}
    return len(numbers)


def _named(
    state: dict[str, Any],
    part_of: Callable[[Tensor], RankPart],
    first_layer: int,
    ep_rank: int,
    ep: int,
    args: argparse.Namespace,
) -> list[tuple[str, RankPart]]:
    """Return the tensors of one chunk on one rank under the names of the whole model."""
    found = []
    for name, value in state.items():
        if not isinstance(value, Tensor) or name.endswith("_extra_state"):
            continue
        if name.startswith("output_layer.") and not args.untie_embeddings_and_output_weights:
            continue  # the last stage's copy of tied embeddings
        match = _LAYER.fullmatch(name)
        if match is None:
            found.append((name, part_of(value)))
            continue
        prefix = f"decoder.layers.{first_layer + int(match[1])}."
        experts = (getattr(args, "num_experts", None) or 0) // ep
        whole = part_of(value)
        for below, part in _experts(match[2], whole, ep_rank * experts, experts):
            found.append((prefix + _stored_norm(below, args), part))
    return found


def _experts(name: str, whole: RankPart, first: int, count: int) -> list[tuple[str, RankPart]]:
    """Return (name below the layer, piece), one for each expert where it is of experts."""
    for pattern in _EXPERTS:
        if (match := pattern.fullmatch(name)) is not None:
            expert = first + int(match["expert"])
            return [(f"mlp.experts.experts.{expert}.{match['rest']}", whole)]
    if (match := _STACKED.fullmatch(name)) is None or not whole.shape:
        return [(name, whole)]
    if whole.shape[0] != count:  # of a tensor without elements it can be any number
        raise ConfigError(
            f"{name} of a rank holds {whole.shape[0]} experts, and the run arguments say {count}; "
            f"{_AGAIN}"
        )
    return [
        (f"mlp.experts.experts.{first + expert}.{match[1]}", replace(whole, expert=expert))
        for expert in range(count)
    ]


def _stored_norm(name: str, args: argparse.Namespace) -> str:
    """Return the name that a norm of the local implementation has in a torch_dist checkpoint."""
    if args.transformer_impl == "local" and not args.multi_latent_attention:
        name = re.sub(r"^input_layernorm\.", "self_attention.linear_qkv.layer_norm_", name)
        name = re.sub(r"^pre_mlp_layernorm\.", "mlp.linear_fc1.layer_norm_", name)
    return name


def _cut_along(name: str, parts: list[RankPart], args: argparse.Namespace) -> int | None:
    """Return the dimension that tensor parallelism cuts; None when every rank has it whole."""
    if _COLUMN.fullmatch(name):
        return 0
    if _ROW.fullmatch(name):
        return 1
    if (match := _DOWN.fullmatch(name)) is not None:  # cut by one implementation, not by the other
        rank = args.q_lora_rank if match[1] == "q" else None
        rows = rank or args.kv_lora_rank + args.qk_pos_emb_head_dim
        return None if parts[0].shape[0] == rows else 0
    return None


def _info(name: str, parts: list[RankPart], args: argparse.Namespace) -> TensorInfo:
    shape = list(parts[0].shape)
    tp = args.tensor_model_parallel_size
    dtypes = sorted({str(part.values.dtype) for part in parts})
    if len(parts) != tp or len(dtypes) > 1:
        raise ConfigError(
            f"{cut(name)} is in {len(parts)} parts of {' and '.join(dtypes)}, where {tp} "
            f"tensor-parallel ranks of one dtype have it; {_AGAIN}"
        )
    dim = _cut_along(name, parts, args)
    if dim is not None and (len({part.shape for part in parts}) > 1 or dim >= len(shape)):
        raise ConfigError(
            f"the parts of {name} have shapes {', '.join(str(part.shape) for part in parts)}, "
            f"which make no tensor; {_AGAIN}"
        )
    if dim is not None:
        shape[dim] = sum(part.shape[dim] for part in parts)
    return TensorInfo(tuple(shape), parts[0].values.dtype)


def _whole(name: str, parts: list[RankPart], args: argparse.Namespace) -> Tensor:
    dim = _cut_along(name, parts, args)
    first, *others = (part.read(name) for part in parts)
    if dim is None:
        for part, values in zip(parts[1:], others, strict=True):
            _rank_files.check_copy(name, parts[0].file, first, part.file, values)
    if dim is None or not others:
        return first
    if ".linear_fc1." in name and gated(name, args):
        halves = zip(*(values.chunk(2) for values in (first, *others)), strict=True)
        return torch.cat([piece for half in halves for piece in half])
    return torch.cat([first, *others], dim=dim)
