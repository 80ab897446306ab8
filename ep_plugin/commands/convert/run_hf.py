"""What a Hugging Face model computes, asked of transformers, with one layer in memory at a time.

Layer l of a model is the only layer of a smaller one that transformers builds and loads by itself,
and its input is what layer l - 1 made. Embedding and output belong to the first and the last.
"""

import copy
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ep_plugin.checkpoint.open import safetensors
from ep_plugin.checkpoint.tensors import Source

_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_LAYER = "model.layers.{}."
# Keys of config.json by which transformers runs a folder's code, imports a package or fetches
# kernels from a hub: none of them changes what a model computes.
_ASIDE = re.compile(r".*(implementation|kernel|quantization|fusion|auto_map|pipeline|adapter).*")


@torch.no_grad()
def trace(folder: Path, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return logits [B, S, V] and the output [B, S, H] of each layer for `tokens` [B, S], fp32."""
    transformers = import_module("transformers")
    source: Source = safetensors().open_folder(folder)
    config = _config(transformers, source.common["config"])
    last = config.num_hidden_layers - 1
    outputs: list[Tensor] = []
    logits = torch.empty(0)
    for layer in range(last + 1):
        at_an_end = layer in (0, last)
        weights = dict(_weights(source, layer, at_an_end))
        small = _config_of_one(config, layer, _is_moe(weights), at_an_end)
        model = _load(transformers, small, weights)
        del weights
        ids = tokens if at_an_end else torch.zeros_like(tokens)
        logits, output = _run(model, ids, outputs[-1] if outputs else None)
        outputs.append(output)
        del model
    return logits, outputs


def _config(transformers: Any, values: dict[str, Any]) -> Any:
    """Return the settings of a model, of a class of transformers itself."""
    kind = transformers.CONFIG_MAPPING[values["model_type"]]
    config = kind.from_dict(_without_aside(values))
    for name in ("_attn_implementation", "_experts_implementation"):
        if hasattr(config, name):
            setattr(config, name, "eager")
    return config


def _without_aside(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kept = {key: _without_aside(inner) for key, inner in value.items()}
    return {key: inner for key, inner in kept.items() if not _ASIDE.fullmatch(key)}


def _weights(source: Source, layer: int, at_an_end: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model with that layer alone; away from the ends it has one word."""
    own = _LAYER.format(layer)
    for name in source.tensors:
        if name.startswith(own):
            yield name.replace(own, _LAYER.format(0), 1), source.read_tensor(name)
        elif name == _NORM or (at_an_end and name in (_EMBEDDING, _HEAD)):
            yield name, source.read_tensor(name)
        elif name in (_EMBEDDING, _HEAD):
            info = source.tensors[name]
            yield name, torch.zeros(1, *info.shape[1:], dtype=info.dtype)


def _is_moe(weights: dict[str, Tensor]) -> bool:
    return any(name.endswith(".gate.weight") for name in weights)


def _config_of_one(config: Any, layer: int, is_moe: bool, at_an_end: bool) -> Any:
    """Return the settings of a model whose only layer is that one."""
    small = copy.deepcopy(config)
    values = {
        "num_hidden_layers": 1,
        "mlp_only_layers": [] if is_moe else [0],
        "decoder_sparse_step": 1,
        "first_k_dense_replace": 0 if is_moe else 1,
    }
    if getattr(config, "layer_types", None):
        values["layer_types"] = [config.layer_types[layer]]
    for name, value in values.items():
        if getattr(config, name, None) is not None:
            setattr(small, name, value)
    if not at_an_end:
        small.vocab_size, small.pad_token_id = 1, None
    return small


def _load(transformers: Any, config: Any, weights: dict[str, Tensor]) -> Any:
    """Return the model in fp32. Raises RuntimeError where transformers misses a weight."""
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise RuntimeError(f"transformers did not find {info['missing_keys']} among {[*weights]}")
    return model.eval()


def _run(model: Any, ids: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the logits and the output of the only layer; its input is `given`, where it is."""
    (layer,) = model.model.layers
    made: list[Any] = []
    if given is not None:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: ((given, *args[1:]), kwargs), with_kwargs=True
        )
    layer.register_forward_hook(lambda _, __, output: made.append(output))
    logits = model(ids, use_cache=False).logits
    (output,) = made
    return logits, output[0] if isinstance(output, tuple) else output
