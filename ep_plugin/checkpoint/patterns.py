"""Name tables: which name becomes which, and by what operation.

A pattern such as `decoder.layers.{layer}.mlp.linear_fc{fc}.{kind}` matches a whole name or not at
all; each field matches only what it stands for, so the order of the rules does not matter.

The table here is that of Megatron's GPT with dense layers, and with MoE layers:

    dense                                      Mixture-of-Experts
    mlp.linear_fc1.weight       [2F, H]        mlp.experts.experts.linear_fc1.weight    [E, 2F, H]
    mlp.linear_fc2.weight       [H, F]         mlp.experts.experts.linear_fc2.weight    [E, H, F]
    (none)                                     mlp.router.weight                        [E, H]
    mlp.linear_fc{1,2}, a second time          mlp.shared_experts.linear_fc{1,2}        the same
    (none)                                     mlp.coefficient.{weight,bias}            [2, H], [2]

SequentialMLP and TEGroupedMLP share these names. The norm before the MLP differs: Transformer
Engine fuses it into the dense `linear_fc1` but not into the experts; the local implementation saves
it under the fused name in both.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from ep_plugin.errors import ConfigError

FIELDS = {
    "layer": r"\d+",
    "expert": r"\d+",
    "fc": r"[12]",
    "kind": r"weight|bias",
    "half": r"_w|_v|",  # SwiGLU's gate and value, where they are saved apart
    "rest": r".+",
}

Operation = Literal["copy", "experts", "drop"]
LayerKind = Literal["any", "dense", "moe"]


@dataclass(frozen=True)
class Rule:
    """`source` becomes `target` by `operation`; it applies in layers of that kind alone.

    copy: as it is; experts: num_experts copies, along a new leading axis or, where the target has
    an {expert} field, under a name each; drop: left out.
    """

    source: str
    target: str = ""
    operation: Operation = "copy"
    layers: LayerKind = "any"


@dataclass(frozen=True)
class Match:
    """A name, the rule that it matched, and what it becomes. `layer` is None outside the layers.

    `target` has {expert} in it where each expert has a name of its own.
    """

    name: str
    rule: Rule
    fields: dict[str, str]
    target: str

    @property
    def layer(self) -> int | None:
        return int(self.fields["layer"]) if "layer" in self.fields else None


ROUTER = "decoder.layers.{layer}.mlp.router.{kind}"
COEFFICIENT = "decoder.layers.{layer}.mlp.coefficient.{kind}"  # of a shared expert that is weighed
# What every MoE layer must come out with.
REQUIRED = (
    "decoder.layers.{layer}.mlp.linear_fc1.weight{half}",
    "decoder.layers.{layer}.mlp.linear_fc2.weight",
)

_LAYER = "decoder.layers.{layer}."
_FC = _LAYER + "mlp.linear_fc{fc}."
_NORM = _LAYER + "mlp.linear_fc1.layer_norm_{kind}"

_KEPT = tuple(
    Rule(name, name)
    for name in (
        "embedding.{rest}",
        "output_layer.{rest}",
        "decoder.final_layernorm.{rest}",
        _LAYER + "input_layernorm.{rest}",
        _LAYER + "self_attention.{rest}",
        _LAYER + "pre_mlp_layernorm.{rest}",
    )
)
_DENSE_LAYERS = (Rule(_LAYER + "mlp.{rest}", _LAYER + "mlp.{rest}", layers="dense"),)
# Random-number state and the rerun machine belong to the run that ends here. What is kept of the
# optimizer goes the way of its parameter (`adapt/optimizer_state.py`).
_DROPPED = tuple(
    Rule(name, operation="drop")
    for name in (
        "optimizer.{rest}",
        "chained_{expert}.optimizer.{rest}",
        "rng_state/{rest}",
        "rerun_state_machine_state/{rest}",
    )
)


def rules(transformer_engine: bool, key_per_expert: bool) -> tuple[Rule, ...]:
    """Return the table of one checkpoint style.

    key_per_expert: each expert under a name of its own, as Megatron saves with
    `singleton_local_shards`, instead of along a leading axis.
    """
    experts = _LAYER + "mlp.experts.experts." + ("{expert}." if key_per_expert else "")
    moe_layers = (
        Rule(
            _NORM,
            _LAYER + "pre_mlp_layernorm.{kind}" if transformer_engine else _NORM,
            layers="moe",
        ),
        Rule(_FC + "{kind}{half}", experts + "linear_fc{fc}.{kind}{half}", "experts", "moe"),
        Rule(_FC + "_extra_state/{rest}", experts + "linear_fc{fc}._extra_state", "experts", "moe"),
    )
    return _KEPT + _DENSE_LAYERS + moe_layers + _DROPPED


def match_names(
    names: Iterable[str], rules: tuple[Rule, ...], moe_layers: tuple[bool, ...]
) -> list[Match]:
    """Return the one match of every name, in the order of `names`.

    Raises ConfigError that lists every name no rule matches.
    """
    matches, unmatched = [], []
    for name in names:
        found = [match for rule in rules if (match := _match(name, rule, moe_layers))]
        assert len(found) <= 1, f"{name} matches several rules: {[m.rule.source for m in found]}"
        matches.extend(found)
        if not found:
            unmatched.append(name)
    if unmatched:
        raise ConfigError(
            f"{len(unmatched)} names of the checkpoint are in no rule of this family: "
            f"{', '.join(unmatched)}; give a decoder-only GPT with a dense MLP in every layer"
        )
    return matches


def _match(name: str, rule: Rule, moe_layers: tuple[bool, ...]) -> Match | None:
    found = compile_pattern(rule.source).fullmatch(name)
    if found is None:
        return None
    fields = found.groupdict()
    match = Match(name, rule, fields, rule.target.format(**{"expert": "{expert}"} | fields))
    if match.layer is not None:
        if match.layer >= len(moe_layers):
            return None
        kind = "moe" if moe_layers[match.layer] else "dense"
        if rule.layers not in ("any", kind):
            return None
    return match


@cache
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of `pattern`; every {field} becomes a named group."""
    literals = re.split(r"\{(\w+)\}", pattern)
    parts = [
        f"(?P<{part}>{FIELDS[part]})" if odd % 2 else re.escape(part)
        for odd, part in enumerate(literals)
    ]
    return re.compile("".join(parts))


def check_complete(matches: list[Match], moe_layers: tuple[bool, ...]) -> None:
    """Raise ConfigError unless every layer that is to be an MoE layer has a dense MLP."""
    names = [match.name for match in matches]
    missing = []
    for pattern in REQUIRED:
        found = (compile_pattern(pattern).fullmatch(name) for name in names)
        present = {int(match["layer"]) for match in found if match}
        missing += [
            pattern.format(layer=layer, half="")
            for layer, is_moe in enumerate(moe_layers)
            if is_moe and layer not in present
        ]
    if missing:
        raise ConfigError(
            f"the checkpoint lacks {', '.join(missing)}; choose --layers that have a dense MLP"
        )
