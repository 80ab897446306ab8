"""The ways to run Megatron's MoE layer that are measured, and the switches of each.

A switch is written as the flag of Megatron's arguments that sets it.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from ep_plugin.commands.bench.contest import DROPPING
from ep_plugin.commands.bench.floors import Precision

FUSED = {"moe_permute_fusion": True, "moe_router_fusion": True}
PADDED = {"moe_router_padding_for_quantization": True}
# Each expert gets as many rows as it would in balance: rows above that are dropped, and the row
# counts are known without a host sync, so that the layer can be captured.
DROPPED = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
RECIPES = {  # fp8_recipe -> format: hybrid is e4m3 forward and e5m2 for gradients
    **{"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3"},
}


@dataclass(frozen=True)
class Way:
    """Settings of Megatron's TransformerConfig beside the shape, and what they are called."""

    name: str  # behind "megatron+"; "" for both fusions alone
    precision: Precision
    settings: dict[str, Any] = field(default_factory=dict)
    dispatcher: str = "alltoall"
    experimental: bool = False  # Megatron's switch for what it calls so

    @property
    def drops(self) -> bool:
        """Whether rows are dropped: another layer than the others, and its row says so."""
        return DROPPING in self.name

    @property
    def switches(self) -> str:
        """Return the settings as flags; "" where there is none."""
        flags = []
        for name, value in self.settings.items():
            flag = f"--{_FLAGS.get(name, name).replace('_', '-')}"
            flags.append(flag if value is True else f"{flag} {value}")
        flags += ["--enable-experimental"] if self.experimental else []
        flags += ["(drops rows)"] if self.drops else []
        return " ".join(flags)


_FLAGS = {"fp8": "fp8_format"}


def ways(precision: Precision, ranks: int) -> list[Way]:
    """Return the ways of `precision` with experts on so many ranks.

    Those that need a package which is missing fail when they are made, with the reason.
    """
    if precision == "fp8":
        return [_fp8("delayed", {}, "defaults"), *_recipes()]
    found = [
        Way("defaults", precision),
        Way("", precision, FUSED),
        Way(DROPPING, precision, FUSED | DROPPED),
    ]
    if ranks > 1:
        found += [_flex("deepep", sms) for sms in (20, 24, 32)] + [_flex("hybridep", None)]
    return found


def _recipes() -> list[Way]:
    # Without the switch, padding changes in place what the fused router keeps for its backward.
    padded = [replace(_fp8(name, FUSED | PADDED, "padding"), experimental=True) for name in RECIPES]
    return [*(_fp8(name, FUSED, "") for name in RECIPES), *padded]


def _fp8(recipe: str, settings: dict[str, Any], suffix: str) -> Way:
    name = "+".join(filter(None, (recipe, suffix)))
    return Way(name, "fp8", {"fp8": RECIPES[recipe], "fp8_recipe": recipe, **settings})


def _flex(backend: str, sms: int | None) -> Way:
    settings: dict[str, Any] = {
        "moe_token_dispatcher_type": "flex",
        "moe_flex_dispatcher_backend": backend,
        **FUSED,
    }
    if sms is not None:
        settings["moe_deepep_num_sms"] = sms
    name = backend if sms is None else f"{backend}{sms}"
    return Way(name, "bf16", settings, dispatcher=f"flex {name}")
