"""The teacher of `ep-plugin plan`: a preset, or a checkpoint, of which no tensor is read."""

import argparse
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ep_plugin.commands.law import Need
from ep_plugin.errors import ConfigError
from ep_plugin.moe.config import GATED, Activation
from ep_plugin.moe.routing_config import RoutingConfig
from ep_plugin.presets import (
    LatentAttention,
    LayerParams,
    Model,
    Preset,
    layer_params,
    load,
    presets,
)
from ep_plugin.untrusted import shown

if TYPE_CHECKING:
    from ep_plugin.checkpoint.tensors import TensorInfo

PADDING = 1024  # entries by which vocabularies may differ: Megatron pads for 8 ranks
_OURS = re.compile(r"(embedding|decoder|output_layer)\..*(?<!expert_bias)")
_CUT = re.compile(
    r".*(linear_(qkv|q_proj|q_up_proj|kv_up_proj|proj|fc1|fc2)|word_embeddings|output_layer)"
    r"\.weight|.*(linear_(qkv|fc1)|output_layer)\.bias"
)
_EXPERTS = re.compile(r"decoder\.layers\.(\d+)\.mlp\.experts\..*")


NEEDS = (
    Need(
        "--ep-teacher-layout --ep-distill-stop",
        lambda args: args.ep_teacher is not None,
        "{flag} is about a teacher, and there is none; use --ep-teacher CKPT",
    ),
    Need(
        "--ep-teacher",
        lambda args: args.pp in (None, 1),
        "--ep-teacher needs a student on one pipeline stage, whose ranks have its logits; use "
        "--pp 1",
    ),
    Need(
        "--ep-teacher",
        lambda args: args.cp == 1,
        "--ep-teacher needs whole sequences on each rank; use --cp 1",
    ),
)


@dataclass(frozen=True)
class Teacher:
    """A teacher's model, and its parameters by the ranks that share them."""

    preset: Preset
    params: LayerParams  # outside of experts
    experts: tuple[tuple[int, int], ...]  # of each MoE layer: how many, and their parameters
    args: argparse.Namespace  # its sizes, under Megatron's names


def add_arguments(group: Any) -> None:
    """Add the teacher's flags, under the names that they have in a run."""
    group.add_argument(
        "--ep-teacher",
        metavar="CKPT",
        help="a teacher beside the model: a checkpoint, or a name of ep-plugin presets",
    )
    group.add_argument(
        "--ep-teacher-layout", metavar="tp=T,ep=E", help="its layout (default: the model's)"
    )
    group.add_argument(
        "--ep-distill-stop",
        type=float,
        default=0.7,
        metavar="PART",
        help="part of the run after which it is gone (default: 0.7)",
    )


def read_teacher(args: argparse.Namespace, student: Preset) -> Teacher:
    """Return the preset or the checkpoint of --ep-teacher; raises ConfigError. Reads no tensor."""
    word, stop = args.ep_teacher, args.ep_distill_stop
    if not 0 < stop <= 1:
        raise ConfigError(
            f"--ep-distill-stop must be above 0 and at most 1; got {stop}; use "
            "--ep-distill-stop 0.7"
        )
    if os.path.exists(word):  # False also for a name that no file can have
        found = _of_checkpoint(Path(word), args)
    elif word in presets():
        found = _of_preset(load(word))
    else:
        raise ConfigError(
            f"--ep-teacher {shown(word)} is neither a folder nor a preset; use the folder that "
            "--save named, or a name that `ep-plugin presets` lists"
        )
    rows, ours = found.preset.model.vocab, student.model.vocab
    if abs(rows - ours) > PADDING:
        raise ConfigError(
            f"--ep-teacher {word} has a vocabulary of {rows}, and {student.name} one of {ours}; "
            "use a teacher with the student's tokenizer"
        )
    return found


def _of_preset(preset: Preset) -> Teacher:
    model = preset.model
    if model.positions != "learned":
        model = replace(model, positions="rope")  # as Megatron's decoder has it
    total = LayerParams(
        model.vocab * model.hidden * (1 if model.tied else 2),
        model.hidden * (2 if model.layer_norm else 1)
        + (model.max_positions * model.hidden if model.positions == "learned" else 0),
    )
    layers = [(experts, layer_params(model, experts)) for experts in model.experts]
    for _, layer in layers:
        total += replace(layer, experts=0)
    counts = [experts for experts in model.experts if experts]
    sizes = argparse.Namespace(
        num_layers=len(model.experts),
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        ffn_hidden_size=model.dense_ffn,
        moe_ffn_hidden_size=model.expert_ffn,
        moe_shared_expert_intermediate_size=model.shared_ffn,
        num_experts=max(counts, default=None),
        ep_experts_per_layer=tuple(counts) or None,
        moe_layer_freq=[int(experts > 0) for experts in model.experts],
        padded_vocab_size=None,  # padded for its own layout
        max_position_embeddings=model.max_positions,
        position_embedding_type="learned_absolute" if model.positions == "learned" else "rope",
    )
    routed = tuple((experts, layer.experts) for experts, layer in layers if experts)
    return Teacher(replace(preset, model=model), total, routed, sizes)


def _of_checkpoint(path: Path, args: argparse.Namespace) -> Teacher:
    """Return a checkpoint's model: parameters by its tensors, the rest by its run arguments."""
    from ep_plugin.checkpoint.formats.megatron_dist import open_checkpoint
    from ep_plugin.megatron.distill.fits_student import checked_teacher

    source = open_checkpoint(path)
    any_names = argparse.Namespace(ep_teacher=args.ep_teacher, transformer_impl="local")
    run = checked_teacher(source.common.get("args"), source.folder, any_names)
    tensors = {name: info for name, info in source.tensors.items() if _OURS.fullmatch(name)}
    counts = {
        int(found[1]): info.shape[0]
        for name, info in tensors.items()
        if (found := _EXPERTS.fullmatch(name)) and name.endswith("linear_fc1.weight")
    }
    experts = tuple(counts.get(layer, 0) for layer in range(run.num_layers))
    preset = Preset(
        name=str(path),
        system="checkpoint",
        source=str(source.folder),
        model=_model(run, experts),
        routing=RoutingConfig(topk=getattr(run, "moe_router_topk", None) or 1, normalize="none"),
        seq_length=getattr(run, "seq_length", None) or 1,
    )
    return Teacher(preset, *_counted(tensors, counts), run)


def _counted(
    tensors: Mapping[str, "TensorInfo"], counts: Mapping[int, int]
) -> tuple[LayerParams, tuple[tuple[int, int], ...]]:
    """Return the parameters outside of experts, and each layer's `counts` with its experts'."""
    total, routed = LayerParams(), dict.fromkeys(counts, 0)
    for name, info in tensors.items():
        size = prod(info.shape)
        if found := _EXPERTS.fullmatch(name):
            routed[int(found[1])] += size
        else:
            cut = _CUT.fullmatch(name) is not None
            total += LayerParams(tensor=size) if cut else LayerParams(replicated=size)
    return total, tuple((counts[layer], size) for layer, size in sorted(routed.items()))


def _model(run: argparse.Namespace, experts: tuple[int, ...]) -> Model:
    def said(name: str) -> int:
        return int(getattr(run, name, None) or 0)

    heads, hidden = run.num_attention_heads, run.hidden_size
    latent = None
    if getattr(run, "multi_latent_attention", False):
        latent = LatentAttention(
            q_rank=said("q_lora_rank"),
            kv_rank=said("kv_lora_rank"),
            nope_dim=said("qk_head_dim"),
            rope_dim=said("qk_pos_emb_head_dim"),
            value_dim=said("v_head_dim"),
        )
    return Model(
        hidden=hidden,
        heads=heads,
        head_dim=said("kv_channels") or hidden // heads,
        vocab=run.padded_vocab_size,
        experts=experts,
        kv_heads=said("num_query_groups") or None,
        dense_ffn=run.ffn_hidden_size,
        dense_activation=_activation(run, "ep_dense_activation"),
        expert_ffn=said("moe_ffn_hidden_size") or run.ffn_hidden_size,
        expert_activation=_activation(run, "ep_expert_activation"),
        shared_ffn=said("moe_shared_expert_intermediate_size"),
        tied=not getattr(run, "untie_embeddings_and_output_weights", False),
        latent=latent,
    )


def _activation(run: argparse.Namespace, name: str) -> Activation:
    """Return one of as many matrices; which it is changes no size."""
    gated = getattr(run, "swiglu", False) or getattr(run, "quick_geglu", False)
    return (
        "swiglu" if (getattr(run, name, None) or ("swiglu" if gated else "")) in GATED else "gelu"
    )
