"""What the model in a folder computes, asked of the software that the folder is for."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ep_plugin.checkpoint.formats.megatron_dist import read_common
from ep_plugin.checkpoint.moe_layers import hybrid_pattern
from ep_plugin.checkpoint.open import is_hf


@dataclass(frozen=True)
class Outputs:
    """What one model computed."""

    logits: Tensor  # [B, S, V] fp32
    layers: list[Tensor]  # of [B, S, H] fp32
    experts_used: dict[int, int] = field(default_factory=dict)  # layer -> how many, where counted


@torch.no_grad()
def run_model(folder: Path, tokens: Tensor, seed: int) -> Outputs:
    """Return what the model in a Hugging Face or an iteration folder makes of `tokens` [B, S]."""
    if not is_hf(folder):
        megatron = worker()
        if hybrid_pattern(read_common(folder).get("args")):  # read as the GPT that it is
            return _outputs(megatron.trace_foreign(folder, tokens, seed, None))
        return _outputs(megatron.trace(folder, tokens, seed))
    return Outputs(*import_module("ep_plugin.commands.convert.run_hf").trace(folder, tokens))


def worker() -> Any:
    """Return the module that runs a model of Megatron's; raises ImportError, and ConfigError."""
    load = import_module("ep_plugin.megatron.workers.load").load
    return load("ep_plugin.megatron.workers.model_run", on_cpu=True)


def _outputs(trace: Any) -> Outputs:
    layers = [layer.transpose(0, 1) for layer in trace.layers]
    return Outputs(trace.logits, layers, trace.experts_used)


@torch.no_grad()
def run_source(folder: Path, tokens: Tensor, seed: int, router: str | None) -> Outputs:
    """Return the same of a folder that is not trusted; nothing in it is run.

    `router`: the name that takes the place of the checkpoint's own. Raises ConfigError when its
    software makes no model of it.
    """
    if is_hf(folder):
        return run_model(folder, tokens, seed)
    return _outputs(worker().trace_foreign(folder, tokens, seed, router))


@contextmanager
def aside() -> Iterator[None]:
    """Keep what loading prints off stdout; drop warnings about packages not needed here."""
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
