"""Which model an MoE layer belongs to: several models in one process, and MTP layers."""

import gc
import weakref
from dataclasses import dataclass, field
from typing import Any

# The key of a model: its sizes, and its number among the models of these sizes. All ranks that hold
# layers of a model have the same key.
Key = tuple[tuple[int, ...], int]


@dataclass
class _Model:
    key: Key
    config: "weakref.ref[Any]"
    layers: "weakref.WeakValueDictionary[int, Any]" = field(
        default_factory=weakref.WeakValueDictionary
    )


class Models:
    """The models of this process, told apart by their layers.

    Megatron does not say which model a layer belongs to. A model may have several chunks, each with
    its own configuration object, but it never has two layers of the same number. So a layer joins a
    model of its sizes that has no layer of its number yet. A model with the layer's own
    configuration object comes first, then the newest one. If there is none, a new model begins.
    """

    def __init__(self) -> None:
        self._models: list[_Model] = []
        self._key_of: weakref.WeakKeyDictionary[Any, Key] = weakref.WeakKeyDictionary()

    def key_of(self, layer: Any) -> Key:
        """Return the key of the model of `layer`, an EPMoELayer whose layer number is set."""
        found = self._key_of.get(layer)
        if found is None:
            model = self._model_for(layer)
            model.layers[row_of(layer)] = layer
            found = self._key_of[layer] = model.key
        return found

    @property
    def several(self) -> bool:
        return len(self._models) > 1

    def _model_for(self, layer: Any) -> _Model:
        sizes, row = _sizes(layer.config), row_of(layer)
        alike = [model for model in self._models if model.key[0] == sizes]
        if alike and all(row in model.layers for model in alike):
            gc.collect()  # a model that was deleted may live on in reference cycles
        free = [model for model in alike if row not in model.layers]
        if free:
            return max(free, key=lambda model: (model.config() is layer.config, model.key[1]))
        self._models.append(_Model((sizes, len(alike)), weakref.ref(layer.config)))
        return self._models[-1]


def _sizes(config: Any) -> tuple[int, ...]:
    names = ("num_layers", "mtp_num_layers", "hidden_size", "ffn_hidden_size")
    more = ("moe_ffn_hidden_size", "num_moe_experts", "moe_router_topk")
    return tuple(getattr(config, name, None) or 0 for name in (*names, *more))


def row_of(layer: Any) -> int:
    """Return the number of a layer in the whole model, from 1; MTP layers follow the decoder's.

    Megatron 0.16 numbers MTP layers so. Later releases number them from 1 and mark them.
    """
    number: int = layer.layer_number
    return number + layer.config.num_layers if layer.is_mtp_layer else number


def uses(layer: Any) -> int:
    """Return how often a micro-batch passes a layer; --mtp-use-repeated-layer repeats one."""
    config = layer.config
    is_repeated = layer.is_mtp_layer and getattr(config, "mtp_use_repeated_layer", False)
    return (config.mtp_num_layers or 1) if is_repeated else 1
