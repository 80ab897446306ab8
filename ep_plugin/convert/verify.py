"""Do two models compute the same? Asked of `transformers` and of Megatron, in float32 on the CPU.

Each model is loaded by the software that its folder is for and given the same random tokens; one is
in memory at a time.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

MAX_SEQUENCE = 256
NUM_TOKENS = 512


@dataclass(frozen=True)
class Outputs:
    """What one model computed."""

    logits: Tensor  # [B, S, V] fp32
    layers: list[Tensor]  # of [B, S, H] fp32


def compare(source: Path, target: Path, seed: int) -> dict[str, Any]:
    """Compare two models, each a Hugging Face folder or an iteration folder of Megatron's.

    Returns the largest absolute difference of the logits and of each layer's output, and how large
    they are.
    """
    tokens = _random_tokens(source if _is_hf(source) else target, seed)
    old, new = _outputs(source, tokens, seed), _outputs(target, tokens, seed)
    layers = [
        {"layer": layer, "max_abs_diff": _max_abs(before - after), "max_abs": _max_abs(before)}
        for layer, (before, after) in enumerate(zip(old.layers, new.layers, strict=True))
    ]
    return {
        "logits_max_abs_diff": _max_abs(old.logits - new.logits),
        "logits_max_abs": _max_abs(old.logits),
        "layers": layers,
        "tokens": tokens.numel(),
        "sequence_length": tokens.shape[1],
        "seed": seed,
        "dtype": "float32",
    }


def _is_hf(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _random_tokens(folder: Path, seed: int) -> Tensor:
    """Return token ids [B, S] int64 of a Hugging Face model's vocabulary."""
    config = AutoConfig.from_pretrained(folder)
    length = min(config.max_position_embeddings, MAX_SEQUENCE)
    generator = torch.Generator().manual_seed(seed)
    shape = (-(-NUM_TOKENS // length), length)
    return torch.randint(config.vocab_size, shape, generator=generator)


@torch.no_grad()
def _outputs(folder: Path, tokens: Tensor, seed: int) -> Outputs:
    if not _is_hf(folder):
        trace = import_module("ep_plugin.megatron.parity").trace(folder, tokens, seed)
        return Outputs(trace.logits, [layer.transpose(0, 1) for layer in trace.layers])
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    layers: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: layers.append(_first(output)))
    return Outputs(model(tokens, use_cache=False).logits, layers)


def _first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def _max_abs(values: Tensor) -> float:
    return float(values.abs().max())
