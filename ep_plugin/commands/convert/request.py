"""What a user asks of `ep-plugin convert`: flags that were typed, checked, and read once."""

import argparse
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ep_plugin import presets
from ep_plugin.checkpoint.adapt.upcycling import GateSums, Losses, Upcycling
from ep_plugin.checkpoint.open import Format, Kind, kind_of
from ep_plugin.checkpoint.prompts import Prompts, read_prompts
from ep_plugin.checkpoint.staging import check_free
from ep_plugin.commands.convert.flags import (
    TOLERANCE,
    Typed,
    refuse_idle_flags,
    refuse_unfinished,
    stays_torch_dist,
)
from ep_plugin.errors import ConfigError

_FLAGS = {"source": "--from", "target": "--to"}  # the others are named after their destination
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
    moments_go_along: bool = False  # optimizer state can: names and pieces stay as they are stored
    asked: dict[str, Any] = field(default_factory=dict)  # what the bytes of the result depend on
    manifest: dict[str, Any] = field(default_factory=dict)  # settings that manifest.json keeps


def read_request(args: argparse.Namespace) -> Request:
    """Return what was asked. Opens no file but that of --prompts, after all other checks.

    Raises ConfigError for flags that contradict, have no effect or have no legal value.
    """
    typed: Typed = {name: value for name, value in vars(args).items() if name != "command"}
    target: Path = typed["target"]
    if "check" in typed:
        _refuse_beside_check(typed)
        return Request(target, check=True)
    if "source" not in typed:
        raise ConfigError("--from must be given; use --from runs/dense")
    _check_values(typed)
    settings = settings_from(typed) if "num_experts" in typed else None
    kind = kind_of(typed["source"])
    refuse_idle_flags(typed, kind)
    refuse_unfinished(typed, kind)
    stays = stays_torch_dist(typed, kind)
    check_free(target)
    prompts = None
    if "prompts" in typed:
        prompts = read_prompts(typed["prompts"], typed["source"] if kind == "hf" else None)
    output: Format = typed.get("format", "megatron")
    asked = {
        "--format": output,
        "--family": typed.get("family"),
        "--transformer-impl": typed.get("transformer_impl"),
        "--drop-optimizer": "drop_optimizer" in typed,
        **(asdict(settings) if settings else {}),
    }
    return Request(
        target=target,
        source=typed["source"],
        kind=kind,
        settings=settings,
        format=output,
        family=typed.get("family"),
        implementation=typed.get("transformer_impl"),
        keep_optimizer=not asked["--drop-optimizer"],
        compare="skip_parity" not in typed,
        tolerance=typed.get("parity_tolerance", TOLERANCE),
        prompts=prompts,
        seed=typed.get("seed", Upcycling.seed),
        processes=typed.get("processes", 1),
        dry_run=typed.get("dry_run", False),
        json=typed.get("json", False),
        moments_go_along=stays,
        asked=asked,
        manifest=asdict(settings) if settings and stays else {"format": output},
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


def _refuse_beside_check(typed: Typed) -> None:
    """Raise ConfigError for any flag beside --check and --to."""
    for name in typed:
        if name not in ("check", "target"):
            flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
            raise ConfigError(
                f"{flag} is for a conversion, and --check only looks at what one wrote; use "
                "--check --to FOLDER alone"
            )


def settings_from(typed: Typed) -> Upcycling:
    """Return what to make of a dense model; what is typed beside --preset wins over it."""
    gates: dict[str, Any] = {}
    losses = Losses()
    topk = typed.get("topk")
    if "preset" in typed:
        preset = presets.load(typed["preset"])
        if preset.router != "topk":
            raise ConfigError(
                f"--preset {typed['preset']} lets experts choose their tokens, so no token's "
                "weights have a known sum; use --topk 2, with --ep-router expert_choice in the run"
            )
        gates = vars(GateSums.of(preset.routing))
        losses = Losses.of(preset.routing)
        topk = preset.routing.topk if topk is None else topk
    if topk is None:
        raise ConfigError("--topk, or a --preset that has it, must be given; use --topk 2")
    gates = gates | {name: typed[name] for name in _GATES if name in typed}
    settings = {name: typed[name] for name in _SETTINGS if name in typed}
    if settings.get("mode") == "granular":
        settings.setdefault("router_init", "virtual-group")
    return Upcycling(topk=topk, gates=GateSums(**gates), losses=losses, **settings)
