"""Do two models compute the same? Asked of `transformers` and of Megatron, in float32 on the CPU.

Each model is loaded by the software that its folder is for and given the same tokens; one is in
memory at a time.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ep_plugin.checkpoint.prompts import Batch, Prompts, draw, fill

NUM_TOKENS = 512


@dataclass(frozen=True)
class Outputs:
    """What one model computed."""

    logits: Tensor  # [B, S, V] fp32
    layers: list[Tensor]  # of [B, S, H] fp32


def compare(
    source: Path, target: Path, seed: int, prompts: Prompts | None = None
) -> dict[str, Any]:
    """Compare two models, each a Hugging Face folder or an iteration folder of Megatron's.

    Without prompts, on random tokens. Returns the largest absolute difference of the logits and of
    each layer's output, and how large they are. Raises ConfigError for tokens of no vocabulary.
    """
    batch = _batch(source if _is_hf(source) else target, seed, prompts)
    old, new = _outputs(source, batch.tokens, seed), _outputs(target, batch.tokens, seed)
    largest = batch.max_abs
    layers = [
        {"layer": layer, "max_abs_diff": largest(before - after), "max_abs": largest(before)}
        for layer, (before, after) in enumerate(zip(old.layers, new.layers, strict=True))
    ]
    return {
        "logits_max_abs_diff": largest(old.logits - new.logits),
        "logits_max_abs": largest(old.logits),
        "layers": layers,
        "tokens": int(batch.kept.sum()),
        "prompts": None if prompts is None else len(prompts),
        "sequence_length": batch.tokens.shape[1],
        "seed": seed,
        "dtype": "float32",
    }


def _is_hf(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _batch(folder: Path, seed: int, prompts: Prompts | None) -> Batch:
    """Return tokens of a Hugging Face model's vocabulary."""
    config = AutoConfig.from_pretrained(folder)
    sizes = config.vocab_size, config.max_position_embeddings
    return draw(NUM_TOKENS, *sizes, seed) if prompts is None else fill(prompts, *sizes)


@torch.no_grad()
def _outputs(folder: Path, tokens: Tensor, seed: int) -> Outputs:
    if not _is_hf(folder):
        trace = import_module("ep_plugin.megatron.workers.model_run").trace(folder, tokens, seed)
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
