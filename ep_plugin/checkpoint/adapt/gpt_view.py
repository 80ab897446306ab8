"""A stored HybridModel under the names of the GPT that it is, for what reads GPTs."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ep_plugin.checkpoint.adapt.class_names import ONLY_HYBRID, to_gpt
from ep_plugin.checkpoint.adapt.model_class import gpt_args, pairs_of_hybrid
from ep_plugin.checkpoint.adapt.renamed import OPTIMIZER
from ep_plugin.checkpoint.moe_layers import hybrid_pattern
from ep_plugin.checkpoint.tensors import Chunk, Stored


@dataclass(frozen=True)
class _Named:
    folder: Path
    args: argparse.Namespace


def gpt_view(stored: Stored) -> Stored:
    """Return the same weights under a GPT's names and run arguments; a GPT as it is.

    State of the optimizer is left out. Raises ConfigError for layers that a GPT has not.
    """
    args = stored.common.get("args")
    pattern = hybrid_pattern(args)
    if not isinstance(args, argparse.Namespace) or not isinstance(pattern, str):
        return stored
    named = _Named(stored.folder, args)
    pairs = pairs_of_hybrid(named, pattern)
    spell = to_gpt(named, pairs)
    old = {spell(name): name for name in stored.tensors if not OPTIMIZER.fullmatch(name)}
    objects = (name for name in stored.objects if name != ONLY_HYBRID)

    said = stored.common.get("content_metadata")
    # A HybridModel names each layer; of a GPT whose layers are alike Megatron stacks them.
    metadata = (said if isinstance(said, dict) else {}) | {"non_homogeneous_layers": True}

    def read_chunk(name: str, chunk: Chunk) -> Tensor:
        return stored.read_chunk(old[name], chunk)

    return replace(
        stored,
        common=stored.common | {"args": gpt_args(args, pairs), "content_metadata": metadata},
        tensors={name: stored.tensors[before] for name, before in old.items()},
        chunks={name: stored.chunks[before] for name, before in old.items()},
        objects=frozenset(spell(name) for name in objects if not OPTIMIZER.fullmatch(name)),
        read_chunk=read_chunk,
    )
