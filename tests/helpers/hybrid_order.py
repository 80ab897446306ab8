"""Build a HybridModel whose spec was made before the plugin, or after; print a loss's bits.

Prints as well which layers of another pattern Megatron would capture in CUDA graphs.

python tests/helpers/hybrid_order.py before|after
"""

import importlib
import sys

import cpu_only  # noqa: F401  before Megatron
import torch
from core_model import LENGTH, VOCAB, Case, build, fill, transformer_config
from forked import one_rank

from ep_plugin.megatron.block.adapter import EPMoELayer
from ep_plugin.megatron.block.graphs import OUTSIDE
from ep_plugin.megatron.seams.install import install
from ep_plugin.megatron.settings import EdgeSettings

SPECS = "megatron.core.models.hybrid.hybrid_layer_specs"


def graphed(pattern: str) -> list[bool]:
    """Return of each layer whether Megatron would capture it, of attn, mlp and mamba."""
    from megatron.core.transformer.cuda_graphs import _layer_is_graphable
    from megatron.core.transformer.enums import CudaGraphModule

    config = transformer_config(Case("graphs", layers=2, pattern=pattern))
    layers = build(config, None).decoder.layers
    config.cuda_graph_modules = [CudaGraphModule[name] for name in OUTSIDE]
    return [_layer_is_graphable(layer, config) for layer in layers]


def main() -> None:
    if sys.argv[1] == "before":
        importlib.import_module(SPECS)
    assert (SPECS in sys.modules) == (sys.argv[1] == "before")
    install(EdgeSettings())
    calls = []
    forward = EPMoELayer.forward

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return forward(*args, **kwargs)  # type: ignore[arg-type]

    EPMoELayer.forward = counted  # type: ignore[method-assign]
    one_rank()
    model = build(transformer_config(Case("hybrid", layers=2, pattern="*E*E")), None)
    fill(model)
    tokens = torch.arange(LENGTH)[None] % VOCAB
    losses = model(tokens, torch.arange(LENGTH)[None], None, labels=tokens)
    losses.sum().backward()
    print("graphed", *graphed("*E-"))
    kinds = {type(layer.mlp).__mro__[1].__name__ for layer in model.decoder.layers[1::2]}
    print("found", losses.sum().item().hex(), len(calls), *sorted(kinds))


if __name__ == "__main__":
    main()
