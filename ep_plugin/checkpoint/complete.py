"""Are all tensors of a model there, in the shapes that belong together? `audit`, `convert` ask it.

What run arguments ask for must be there (`required.py`). What else a family or release has is not
known here. So a layer is held against the others: one that has all but a few of another's tensors
lacks these. Layers of different kinds (dense and experts, attention and Mamba) each have something
that the other kind has not.
"""

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set

from ep_plugin.checkpoint.required import absent
from ep_plugin.checkpoint.sizes_said import wrong_sizes
from ep_plugin.checkpoint.tensors import TensorInfo
from ep_plugin.untrusted import cut

MAX_KINDS = 64  # of layers in one model
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_WEIGHT = re.compile(r"(decoder|embedding|output_layer)\.(.+\.)?(\w+_)?(weight|bias)(_[wv])?")
_ONE_EXPERT = re.compile(r"\.experts\.experts\.\d+\.")
_BY_EXPERTS = re.compile(
    r"mlp\.(experts|router)\..+"
)  # their number can differ from layer to layer
_TOGETHER = (
    ("linear_fc1.weight", "linear_fc2.weight"),
    ("linear_fc1.weight_w", "linear_fc2.weight"),
)
_TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")
_LAST_NORMS = ("decoder.final_layernorm.weight", "decoder.final_norm.weight")
# Weights by how many axes they have, and which of these is the hidden one.
_HIDDEN = (
    (re.compile("|".join(map(re.escape, _TABLES))), 2, 1),
    (re.compile(r".+\.self_attention\.linear_qkv\.weight"), 2, 1),
    (re.compile(r".+\.self_attention\.linear_proj\.weight"), 2, 0),
    (re.compile(r".+\.mlp\.(shared_experts\.)?linear_fc1\.weight(_[wv])?"), 2, 1),
    (re.compile(r".+\.mlp\.(shared_experts\.)?linear_fc2\.weight"), 2, 0),
    (re.compile(r".+\.mlp\.router\.weight"), 2, 1),
    (re.compile(r".+\.(input|pre_mlp)_layernorm\.weight"), 1, 0),
    (re.compile(r".+\.linear_(qkv|fc1)\.layer_norm_weight"), 1, 0),
    (re.compile("|".join(map(re.escape, _LAST_NORMS))), 1, 0),
)


def incomplete(
    tensors: Mapping[str, TensorInfo], args: argparse.Namespace
) -> Iterator[tuple[str, str]]:
    """Yield a parameter's name and what is wrong: missing, of another shape, or not of numbers.

    `tensors`: parameters by per-layer names; others are not looked at. Of a model that is no GPT
    or HybridModel, or whose layers are configured one by one, nothing is said.
    """
    layers: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, info in tensors.items():
        if (match := _LAYER.fullmatch(name)) is not None:
            rest = _ONE_EXPERT.sub(".experts.experts.*.", match[2])
            layers[match[1]][rest] = info.shape
    if not layers:
        return
    yield from _no_weights(tensors)
    yield from _outside_layers(tensors, args)
    yield from _wrong_hidden(tensors, args)
    if getattr(args, "heterogeneous_layers_config_path", None):
        return
    yield from wrong_sizes(tensors, args)
    yield from _lacking(layers)
    yield from _other_shapes(layers)


def not_there(tensors: Iterable[str], args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield a parameter that is missing in all layers alike, though run arguments ask for it."""
    layers: dict[str, set[str]] = defaultdict(set)
    for name in tensors:
        if (match := _LAYER.fullmatch(name)) is not None:
            layers[match[1]].add(match[2])
    for name in absent(layers, set(tensors), args) if layers else ():
        yield name, "is missing, and by the run arguments it must be there"


def _no_weights(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str]]:
    for name, info in tensors.items():
        if _WEIGHT.fullmatch(name) and not info.dtype.is_floating_point:
            yield name, f"is {info.dtype}, which no weight is"


def _outside_layers(
    tensors: Mapping[str, TensorInfo], args: argparse.Namespace
) -> Iterator[tuple[str, str]]:
    table, output = _TABLES
    if table not in tensors:
        yield table, "is missing"
    if getattr(args, "untie_embeddings_and_output_weights", None) and output not in tensors:
        yield output, "is missing, and embedding and output are untied"
    if getattr(args, "untie_embeddings_and_output_weights", None) is False and output in tensors:
        yield output, "is there, and by the run arguments embedding and output are tied"
    if not any(name in tensors for name in _LAST_NORMS):
        yield _LAST_NORMS[0], "is missing"


def _wrong_hidden(
    tensors: Mapping[str, TensorInfo], args: argparse.Namespace
) -> Iterator[tuple[str, str]]:
    hidden = getattr(args, "hidden_size", None)
    for name, info in tensors.items() if hidden else ():
        for pattern, axes, axis in _HIDDEN:
            if pattern.fullmatch(name) and (len(info.shape) != axes or info.shape[axis] != hidden):
                yield name, f"has shape {list(info.shape)}, and the hidden size is {hidden}"


def _lacking(layers: Mapping[str, Mapping[str, object]]) -> Iterator[tuple[str, str]]:
    """Yield what a whole layer, or a module of one, lacks that others like it have."""
    modules: dict[str, dict[str, set[str]]] = defaultdict(dict)
    for layer, names in layers.items():
        for module, its in _by_module(names).items():
            modules[module][layer] = its
    found = {
        f"decoder.layers.{layer}.{rest.removesuffix(one)}{other}": None
        for layer, names in layers.items()
        for one, other in _TOGETHER
        for rest in names
        if rest.endswith("." + one) and rest.removesuffix(one) + other not in names
    }
    for one in ({layer: set(names) for layer, names in layers.items()}, *modules.values()):
        for layer, missing in _subsets(one):
            found.update({f"decoder.layers.{layer}.{rest}": None for rest in sorted(missing)})
    for name in found:
        yield name, "is missing, and what belongs to it is there"


def _by_module(names: Iterable[str]) -> dict[str, set[str]]:
    """Return the names of each module of a layer."""
    found: dict[str, set[str]] = defaultdict(set)
    for rest in names:
        found[rest.partition(".")[0]].add(rest)
    return found


def _subsets(layers: Mapping[str, Set[str]]) -> Iterator[tuple[str, Set[str]]]:
    """Yield the layers whose names are some of another's, and which they lack."""
    alike: dict[frozenset[str], list[str]] = defaultdict(list)
    for layer, names in layers.items():
        alike[frozenset(names)].append(layer)
    if len(alike) > MAX_KINDS:
        yield next(iter(layers)), frozenset(("*",))
        return
    for names, numbers in alike.items():
        larger = next((other for other in alike if names < other), names)
        for layer in numbers if larger != names else ():
            yield layer, larger - names


def _other_shapes(
    layers: Mapping[str, Mapping[str, tuple[int, ...]]],
) -> Iterator[tuple[str, str]]:
    """Yield what has another shape than the same of most other layers of its kind."""
    # By name and what else the module has: `*` and `+` both have a linear_proj.
    shapes: dict[tuple[str, frozenset[str]], dict[str, tuple[int, ...]]] = defaultdict(dict)
    for layer, names in layers.items():
        for its in map(frozenset, _by_module(names).values()):
            for rest in its:
                if not _BY_EXPERTS.fullmatch(rest):
                    shapes[rest, its][layer] = names[rest]
    for (rest, _), found in shapes.items():
        usual = Counter(found.values()).most_common(1)[0][0]
        for layer, shape in found.items():
            if shape != usual:
                yield (
                    cut(f"decoder.layers.{layer}.{rest}"),
                    f"has shape {list(shape)}, and the same of other layers {list(usual)}",
                )
