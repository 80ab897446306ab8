"""What the model in a checkpoint computes, asked of Megatron itself.

It is built from the run arguments in the checkpoint, in float32 on the CPU, in this process alone
(a gloo group of one rank), and loaded through Megatron's own distributed checkpointing, one layer
at a time. A checkpoint that has one tensor for all layers is loaded whole: on one rank Megatron
asks for all parts of a tensor at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.models.gpt import moe_module_specs as specs
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from ep_plugin.megatron.arguments.checks import settings_from_args
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.seams.install import install, uninstall
from ep_plugin.megatron.workers.foreign import as_megatron_loads
from ep_plugin.megatron.workers.layer_by_layer import load_when_called, move, without_memory
from ep_plugin.megatron.workers.saved_model import (
    build,
    load_weights,
    only_layers,
    plain,
    sharded_state,
)


@dataclass
class Trace:
    """What one model computed."""

    logits: Tensor  # [B, S, V] fp32
    layers: list[Tensor] = field(default_factory=list)  # of [S, B, H] fp32
    experts_used: dict[int, int] = field(default_factory=dict)  # layer -> number of experts


def trace(folder: Path, tokens: Tensor, seed: int) -> Trace:
    """Return what the model in an iteration folder makes of `tokens` [B, S].

    Must be called in a process without a process group.
    """
    with _one_rank(seed):
        return _trace(folder, tokens)


def trace_foreign(folder: Path, tokens: Tensor, seed: int, router: str | None) -> Trace:
    """Return the same of a checkpoint that is not trusted: nothing in it is run.

    `router`: the name that takes the place of the checkpoint's own. Raises ConfigError when
    Megatron does not make a model of it.
    """
    instead = "use --skip-parity, or a checkpoint that it saved"
    with as_megatron_loads(folder, router, instead=instead) as view:
        return trace(view, tokens, seed)


@contextmanager
def _one_rank(seed: int) -> Iterator[None]:
    """Provide CPU mode, our block and Megatron's groups on one rank; then take them down."""
    try:
        cpu_mode.enable()
        install()
        torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        try:
            parallel_state.initialize_model_parallel()
            tensor_parallel.model_parallel_cuda_manual_seed(seed)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()
    finally:
        uninstall()
        cpu_mode.disable()


@torch.no_grad()
def _trace(folder: Path, tokens: Tensor) -> Trace:
    """Build and load the model of one checkpoint and run it on `tokens` [B, S]."""
    common = dist_checkpointing.load_common_state_dict(str(folder))
    fused_norm_kept = common["args"].transformer_impl == "local"
    args = plain(common["args"])
    specs.MoELayer.settings = settings_from_args(args)
    with without_memory():
        model = build(args).eval()
    load = partial(
        load_weights, model, folder, common.get("content_metadata") or {}, fused_norm_kept
    )
    by_layer = _names_layers(model, common.get("content_metadata") or {})
    move(model, "cpu", but=model.decoder.layers if by_layer else None)
    load(layers=() if by_layer else None)
    trace = Trace(torch.empty(0))
    for number, layer in enumerate(model.decoder.layers):
        if by_layer:
            load_when_called(layer, partial(load, layers=(number,)))
        layer.register_forward_hook(lambda _, __, output: trace.layers.append(output[0]))
        if hasattr(layer.mlp, "router"):
            layer.mlp.router.register_forward_hook(_record_experts(trace, number))
    length = tokens.shape[1]
    masked = torch.ones(length, length, dtype=torch.bool).triu(1)  # True: not to be seen
    positions = torch.arange(length).expand_as(tokens)
    trace.logits = model(tokens, positions, masked[None, None])
    return trace


def _names_layers(model: Any, metadata: dict[str, Any]) -> bool:
    """Return whether each layer has tensors of its own in a checkpoint of this model."""
    with only_layers(model.decoder, (0,)):
        state = sharded_state(model, metadata)
    keys = [str(getattr(value, "key", "")) for value in state.values()]
    return any(key.startswith("decoder.layers.0.") for key in keys)


def _record_experts(trace: Trace, layer: int) -> Any:
    def hook(_: Any, __: Any, routing: Any) -> None:
        trace.experts_used[layer] = int((routing.tokens_per_expert > 0).sum())

    return hook
