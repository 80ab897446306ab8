"""Is every expert of every layer there once, and do those that were trained differ?"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from ep_plugin.checkpoint.audit.facts import MASTERS, Facts, Part, Place
from ep_plugin.checkpoint.audit.stored_names import Name, parse, with_layer
from ep_plugin.checkpoint.audit.verdict import AuditedLayer, Finding
from ep_plugin.checkpoint.moe_layers import hybrid_layers, hybrid_pattern, moe_layers
from ep_plugin.checkpoint.tensors import Stored, TensorInfo
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import shown

# A run with warm-up takes its first step with a learning rate of 0: nothing has moved by then.
FIRST_ITERATION_THAT_MOVES = 2
MAX_COUNT = 1 << 16  # of layers, and of experts in one


@dataclass
class _Map:
    """One weight or bias of a block's experts."""

    ids: set[int] = field(default_factory=set)
    broken: set[int] = field(default_factory=set)
    shapes: set[tuple[int, ...]] = field(default_factory=set)  # of one expert's
    dtypes: set[str] = field(default_factory=set)
    parts: dict[str | None, dict[int, set[Part]]] = field(  # state -> expert -> digests
        default_factory=lambda: defaultdict(dict)
    )
    nonzero: dict[str, set[int]] = field(default_factory=dict)  # state -> experts

    def add(self, name: Name, info: TensorInfo, facts: Facts, layer: int | None) -> None:
        """Take what a stored tensor says of this layer."""
        for (at, expert), parts in facts.parts.items():
            if at == layer and expert is not None:
                self.parts[name.state][expert] = parts
        if name.state is not None:
            here = {e for at, e in facts.nonzero if at == layer and e is not None}
            self.nonzero[name.state] = self.nonzero.get(name.state, set()) | here
            return
        self.dtypes.add(str(info.dtype).removeprefix("torch."))
        self.shapes.add(info.shape[name.lead :])
        axis = name.expert_axis
        count = info.shape[axis] if axis is not None and axis < len(info.shape) else 0
        self.ids |= {name.expert or 0} if axis is None else set(range(count))


Blocks = dict[str, dict[str, _Map]]


def check(
    stored: Stored, facts: dict[str, Facts], broken: set[tuple[str, Place]]
) -> tuple[list[AuditedLayer], list[Finding]]:
    """Return a row for each MoE block, and what is wrong with its experts."""
    blocks = _inventory(stored, facts, broken)
    expected = _expected(stored.common.get("args"))
    findings = [
        _error(block, f"all {expected[block]} experts are missing")
        for block in sorted(expected.keys() - blocks.keys(), key=_order)
    ]
    every_map = {name for maps in blocks.values() for name in maps} | (
        {"linear_fc2.weight"} if blocks else set()
    )
    for block, maps in sorted(blocks.items(), key=lambda item: _order(item[0])):
        ids = [i for one in maps.values() for i in one.ids]  # none where only moments are there
        count = expected.setdefault(block, 1 + max(ids, default=0))
        for name in sorted(every_map):
            findings += _missing(block, name, maps.get(name, _Map()).ids, count)
        for name, one in maps.items():
            findings += _alike(stored, block, name, one)
    findings += [*_unequal(blocks), *_routers(stored, expected)]
    rows = [_row(block, blocks[block], expected[block]) for block in sorted(blocks, key=_order)]
    return rows, findings


def _inventory(stored: Stored, facts: dict[str, Facts], broken: set[tuple[str, Place]]) -> Blocks:
    blocks: Blocks = defaultdict(lambda: defaultdict(_Map))
    for key, info in stored.tensors.items():
        name = parse(key)
        if name.block is None or name.map is None:
            continue
        for layer in range(info.shape[0]) if name.stacked else (None,):
            one = blocks[with_layer(name.block, layer)][name.map]
            one.add(name, info, facts[key], layer)
            one.broken |= {e for k, (at, e) in broken if (k, at) == (key, layer) and e is not None}
    return blocks


def _expected(args: Any) -> dict[str, int]:
    """Return the MoE blocks of the decoder and their numbers of experts, by the run's arguments."""
    if not getattr(args, "num_experts", None):
        return {}
    layers = [layer for layer, moe in enumerate(_moe_layers(args)) if moe]
    counts = getattr(args, "ep_experts_per_layer", None) or (args.num_experts,) * len(layers)
    right = isinstance(counts, tuple | list) and len(counts) == len(layers)
    if not right or not all(type(n) is int and 0 < n <= MAX_COUNT for n in counts):
        raise _unusable("num_experts", counts)
    return {
        f"decoder.layers.{layer}.mlp": count for layer, count in zip(layers, counts, strict=True)
    }


def _moe_layers(args: Any) -> tuple[bool, ...]:
    pattern = hybrid_pattern(args)
    if pattern is not None:
        if not isinstance(pattern, str) or len(pattern) > MAX_COUNT:
            raise _unusable("hybrid_layer_pattern", pattern)
        return hybrid_layers(pattern)
    frequency: Any
    depth: Any
    frequency, depth = getattr(args, "moe_layer_freq", None), getattr(args, "num_layers", None)
    every = type(frequency) is int and frequency > 0
    if type(depth) is not int or depth > MAX_COUNT or not (every or type(frequency) is list):
        raise _unusable("num_layers and moe_layer_freq", (depth, frequency))
    return moe_layers(frequency, depth)


def _unusable(names: str, values: Any) -> ConfigError:
    return ConfigError(
        f"the run arguments have {names} = {shown(values)}, which no run has; give a checkpoint "
        "that Megatron saved"
    )


def _missing(block: str, name: str, ids: set[int], count: int) -> list[Finding]:
    findings = []
    if lost := sorted(set(range(count)) - ids):
        text = f"{name} of expert {_listed(lost)} is missing; there must be {count}"
        findings.append(_error(block, text))
    if strange := sorted(ids - set(range(count))):
        text = f"has {name} of expert {_listed(strange)}, and there must be {count} experts"
        findings.append(_error(block, text))
    return findings


def _alike(stored: Stored, block: str, name: str, one: _Map) -> list[Finding]:
    """Return the sets of equal experts: an error once training has moved any of them.

    The optimizer's master copies are compared where there are any: small steps can be lost in
    rounding to bf16.
    """
    state = next((s for s in MASTERS if s is not None and s in one.parts), None)
    findings = []
    for ids in _equal(one.parts[state]):
        trained = _trained(stored, one, ids)
        text = f"{name} of experts {_listed(ids)} is the same"
        if trained:
            findings.append(_error(block, f"{text}, and training has moved them"))
        else:
            text += "; that is how an upcycled model starts"
            findings.append(Finding("warning", "experts", block, text))
    return findings


def _equal(parts: dict[int, set[Part]]) -> list[list[int]]:
    """Return the sets of two and more experts with the same values."""
    alike: dict[frozenset[Part], list[int]] = defaultdict(list)
    for expert, content in parts.items():
        alike[frozenset(content)].append(expert)
    return [sorted(ids) for ids in alike.values() if len(ids) > 1]


def _trained(stored: Stored, one: _Map, ids: list[int]) -> bool:
    """Return whether any of these experts has taken a step of this optimizer.

    An expert that no token has reached has moments of 0; state kept by buckets does not tell.
    """
    if (stored.common.get("iteration") or 0) < FIRST_ITERATION_THAT_MOVES:
        return False
    if one.nonzero:
        moments = [experts for state, experts in one.nonzero.items() if "param" not in state]
        moved = any(not experts.isdisjoint(ids) for experts in moments)
        return moved and not _as_converted(one, ids, _granularity(stored.common.get("args")))
    return any(parse(key).bucket is not None for key in stored.tensors)


def _as_converted(one: _Map, ids: list[int], granularity: int) -> bool:
    """Whether moments are still those of the dense run, of which `convert` gives all experts the
    same: expert i has shard i mod `granularity`. One step of training sets all of them apart.
    """
    moments = [parts for state, parts in one.parts.items() if state not in MASTERS]
    alike = len({expert % granularity for expert in ids}) == 1
    return alike and all(
        parts[expert] == parts.get(expert % granularity) for parts in moments for expert in parts
    )


def _granularity(args: Any) -> int:
    """Return of how many experts a dense FFN of the run's size is made."""
    dense, own = (getattr(args, f"{kind}ffn_hidden_size", None) for kind in ("", "moe_"))
    return dense // own if dense and own and dense % own == 0 else 1


def _unequal(blocks: Blocks) -> list[Finding]:
    """Return where a block's experts have another shape than most others'."""
    findings = []
    for name in sorted({name for maps in blocks.values() for name in maps}):
        found = {block: maps[name].shapes for block, maps in blocks.items() if name in maps}
        shapes = [shape for seen in found.values() for shape in sorted(seen)]
        usual = max(dict.fromkeys(shapes), key=shapes.count, default=())
        for block, seen in found.items():
            for shape in sorted(seen - {usual}):
                text = f"{name} has shape {list(shape)}, where other experts' is {list(usual)}"
                findings.append(Finding("error", "shape", block, text))
    return findings


def _routers(stored: Stored, expected: dict[str, int]) -> list[Finding]:
    """Return which blocks lack a router, or have one for another number of experts."""
    rows: dict[str, int] = {}
    for key, info in stored.tensors.items():
        name = parse(key)
        if name.state is None and name.parameter.endswith(".mlp.router.weight"):
            block = name.parameter.removesuffix(".router.weight")
            for layer in range(info.shape[0]) if name.stacked else (None,):
                whole = len(info.shape) > name.lead
                rows[with_layer(block, layer)] = info.shape[name.lead] if whole else 0
    findings = []
    for block, count in expected.items():
        if block not in rows:
            findings.append(_error(block, "router.weight is missing"))
        elif rows[block] != count:
            text = f"router.weight is for {rows[block]} experts, and there must be {count}"
            findings.append(_error(block, text))
    return findings


def _row(block: str, maps: dict[str, _Map], count: int) -> AuditedLayer:
    whole = set.intersection(*(one.ids - one.broken for one in maps.values()))
    alike = {i for one in maps.values() for ids in _equal(one.parts[None]) for i in ids[1:]}
    states = set.intersection(*(set(one.nonzero) for one in maps.values()))
    moments = sorted(state for state in states if "param" not in state)
    shapes = [sorted(one.shapes) for name, one in sorted(maps.items()) if ".weight" in name]
    return AuditedLayer(
        block=block,
        experts=len(whole & set(range(count))),
        expected=count,
        distinct=len(whole - alike),
        dtype=", ".join(sorted({dtype for one in maps.values() for dtype in one.dtypes})),
        shapes=", ".join("x".join(map(str, shape)) for seen in shapes for shape in seen),
        moments=" ".join(moments) or "-",
    )


def _error(block: str, text: str) -> Finding:
    return Finding("error", "experts", block, text)


def _listed(ids: list[int]) -> str:
    shown = ", ".join(map(str, ids[:8]))
    return shown if len(ids) <= 8 else f"{shown} and {len(ids) - 8} more"


def _order(block: str) -> tuple[Any, ...]:
    return tuple(int(part) if part.isdecimal() else part for part in block.split("."))
