"""Name tables: which name becomes which, and by what operation.

A pattern such as `decoder.layers.{layer}.mlp.linear_fc{fc}.{kind}` matches a whole name or not at
all; each field matches only what it stands for, so the order of the rules does not matter.
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
    """A name and the rule that it matched. `layer` is None outside the layers."""

    name: str
    rule: Rule
    fields: dict[str, str]

    @property
    def layer(self) -> int | None:
        return int(self.fields["layer"]) if "layer" in self.fields else None

    def target(self, expert: int | str = "") -> str:
        """Return the target name, of one expert where it names one."""
        return self.rule.target.format(**self.fields, expert=expert)


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
            f"{', '.join(unmatched)}; use a decoder-only GPT with a dense MLP in every layer"
        )
    return matches


def _match(name: str, rule: Rule, moe_layers: tuple[bool, ...]) -> Match | None:
    found = compile_pattern(rule.source).fullmatch(name)
    if found is None:
        return None
    match = Match(name, rule, found.groupdict())
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
