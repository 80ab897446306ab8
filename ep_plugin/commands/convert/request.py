"""What a user asks of `ep-plugin convert`: flags that were typed, checked, and read once."""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ep_plugin import presets
from ep_plugin.checkpoint.adapt.upcycling import GateSums, Upcycling
from ep_plugin.checkpoint.open import Format, Kind, kind_of
from ep_plugin.checkpoint.prompts import Prompts, read_prompts
from ep_plugin.checkpoint.staging import check_free
from ep_plugin.commands.convert.flags import TOLERANCE
from ep_plugin.commands.convert.needs import (
    Typed,
    refuse_beside_check,
    refuse_idle_flags,
    refuse_unfinished,
)
from ep_plugin.errors import ConfigError

_GATES = ("score_function", "pre_softmax", "scaling_factor")
_SETTINGS = (
    *("num_experts", "layers", "seed", "mode", "granularity", "drop_ratio", "noise_std"),
    *("router_init", "shared_expert", "ep"),
)  # fields of Upcycling whose flag has their name


@dataclass(frozen=True)
class Request:
    """One conversion. With `check`, a look at what another one wrote; then nothing else counts."""

    target: Path
    check: bool = False
    source: Path = Path()
    kind: Kind = "torch_dist"
    settings: Upcycling | None = None  # of the experts that it gets
    format: Format = "megatron"
    family: str | None = None
    implementation: str | None = None
    keep_optimizer: bool = True
    compare: bool = True
    tolerance: float = TOLERANCE
    prompts: Prompts | None = None
    seed: int = Upcycling.seed
    processes: int = 1
    dry_run: bool = False
    json: bool = False

    @property
    def moments_go_along(self) -> bool:
        """Whether optimizer state can go along: where names and pieces stay as they are stored."""
        return self.kind == "torch_dist" and self.format == "megatron"

    @property
    def manifest(self) -> dict[str, Any]:
        """Return the settings that manifest.json keeps."""
        if self.settings is not None and self.moments_go_along:
            return asdict(self.settings)
        return {"format": self.format}

    @property
    def asked(self) -> dict[str, Any]:
        """Return the settings that the bytes of the result depend on."""
        return {
            "--format": self.format,
            "--family": self.family,
            "--transformer-impl": self.implementation,
            "--drop-optimizer": not self.keep_optimizer,
            **(asdict(self.settings) if self.settings else {}),
        }


def read_request(args: argparse.Namespace) -> Request:
    """Return what was asked. Opens no file but that of --prompts, after all other checks.

    Raises ConfigError for flags that contradict, have no effect or have no legal value.
    """
    typed: Typed = {name: value for name, value in vars(args).items() if name != "command"}
    target: Path = typed["target"]
    if "check" in typed:
        refuse_beside_check(typed)
        return Request(target, check=True)
    if "source" not in typed:
        raise ConfigError("--from must be given; use --from runs/dense")
    _check_values(typed)
    settings = settings_from(typed) if "num_experts" in typed else None
    kind = kind_of(typed["source"])
    refuse_idle_flags(typed, kind)
    refuse_unfinished(typed, kind)
    check_free(target)
    prompts = None
    if "prompts" in typed:
        prompts = read_prompts(typed["prompts"], typed["source"] if kind == "hf" else None)
    return Request(
        target=target,
        source=typed["source"],
        kind=kind,
        settings=settings,
        format=typed.get("format", "megatron"),
        family=typed.get("family"),
        implementation=typed.get("transformer_impl"),
        keep_optimizer=not typed.get("drop_optimizer", False),
        compare="skip_parity" not in typed,
        tolerance=typed.get("parity_tolerance", TOLERANCE),
        prompts=prompts,
        seed=typed.get("seed", Upcycling.seed),
        processes=typed.get("processes", 1),
        dry_run=typed.get("dry_run", False),
        json=typed.get("json", False),
    )


def _check_values(typed: Typed) -> None:
    if not typed.get("parity_tolerance", TOLERANCE) > 0:
        raise ConfigError(
            f"--parity-tolerance must be above 0; got {typed['parity_tolerance']}; use "
            f"--parity-tolerance {TOLERANCE}"
        )
    if typed.get("processes", 1) < 1:
        raise ConfigError(
            f"--processes must be at least 1; got {typed['processes']}; use --processes 1"
        )


def settings_from(typed: Typed) -> Upcycling:
    """Return what to make of a dense model; what is typed beside --preset wins over it."""
    gates: dict[str, Any] = {}
    topk = typed.get("topk")
    if "preset" in typed:
        preset = presets.load(typed["preset"])
        if preset.router != "topk":
            raise ConfigError(
                f"--preset {typed['preset']} lets experts choose their tokens, so no token's "
                "weights have a known sum; use --topk 2, with --ep-router expert_choice in the run"
            )
        gates = vars(GateSums.of(preset.routing))
        topk = preset.routing.topk if topk is None else topk
    if topk is None:
        raise ConfigError("--topk, or a --preset that has it, must be given; use --topk 2")
    gates = gates | {name: typed[name] for name in _GATES if name in typed}
    settings = {name: typed[name] for name in _SETTINGS if name in typed}
    if settings.get("mode") == "granular":
        settings.setdefault("router_init", "virtual-group")
    return Upcycling(topk=topk, gates=GateSums(**gates), **settings)
