"""Gemma with experts in Llama's terms: the only family of Hugging Face's that holds it is Mixtral.

norms                w            ->  1 + w
embedding            e            ->  e sqrt(H)
output layer         e, tied      ->  e
"""

import argparse
import copy
from dataclasses import replace

import torch
from torch import Tensor

from ep_plugin.checkpoint.families import gemma
from ep_plugin.checkpoint.tensors import Source

_WORDS, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_NORMS = ("layernorm.weight", "layer_norm_weight")


def applies(args: argparse.Namespace) -> bool:
    """Whether a model with these arguments is a Gemma with experts."""
    own = all(getattr(args, name, None) == value for name, value in gemma.OWN.items())
    return own and bool(getattr(args, "num_experts", None))


def fold(source: Source, args: argparse.Namespace) -> tuple[Source, argparse.Namespace, list[str]]:
    """Return the same function with plain names and Llama's norms, its arguments, and what is lost.

    What is lost is the rounding of 1 + w and of e sqrt(H) in a dtype narrower than fp32. Raises
    ConfigError for other factors than Gemma's: Mixtral has none for its logits.
    """
    gemma.check_factors(args)
    args, scale = copy.copy(args), args.mup_embedding_mult
    args.layernorm_zero_centered_gamma = args.use_mup = False
    tied = not args.untie_embeddings_and_output_weights
    args.untie_embeddings_and_output_weights = True
    tensors = source.tensors | ({_HEAD: source.tensors[_WORDS]} if tied else {})

    def read_tensor(name: str) -> Tensor:
        values = source.read_tensor(_WORDS if tied and name == _HEAD else name)
        if name == _WORDS:
            return values * torch.tensor(scale, dtype=values.dtype)  # as transformers multiplies
        if name.endswith(_NORMS):
            return (1 + values.float()).to(values.dtype)
        return values

    dtype = source.tensors[_WORDS].dtype
    lost = [] if dtype.itemsize >= 4 else [f"1 + w of the norms is rounded to {dtype}"]
    return replace(source, tensors=tensors, read_tensor=read_tensor), args, lost
