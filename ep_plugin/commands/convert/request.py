"""What a user asks of `ep-plugin convert`: flags that were typed, checked, and read once.

NEEDS says where each of them acts; elsewhere it is refused.
"""

import argparse
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ep_plugin import presets
from ep_plugin.checkpoint.adapt.keep_layers import parse_kept
from ep_plugin.checkpoint.adapt.upcycling import GateSums, Losses, Upcycling
from ep_plugin.checkpoint.open import Format, Kind, kind_of
from ep_plugin.checkpoint.opened import ModelClass
from ep_plugin.checkpoint.prompts import Prompts, read_prompts
from ep_plugin.checkpoint.staging import sibling
from ep_plugin.commands.convert.flags import TOLERANCE
from ep_plugin.commands.law import Need, refuse_idle
from ep_plugin.errors import ConfigError

Typed = dict[str, Any]  # destination of a flag that was typed -> value

_FLAGS = {"source": "--from", "target": "--to"}  # the others are named after their destination
_GATES = ("score_function", "pre_softmax", "scaling_factor")
_SETTINGS = (
    *("num_experts", "layers", "seed", "mode", "granularity", "drop_ratio", "noise_std"),
    *("router_init", "shared_expert", "ep"),
)  # fields of Upcycling whose flag has their name


def _draws(args: argparse.Namespace) -> bool:
    """Whether anything is drawn: tokens, routers, or weights of experts."""
    if args.renames:
        return False
    if "skip_parity" not in args and "prompts" not in args:
        return True
    zero_router = getattr(args, "router_init", None) == "zero"
    return "num_experts" in args and (not zero_router or args.mode in ("drop", "noise"))


# Of the flags that were typed, with `mode` also where it was not; `kind` is what the source is, and
# `stays` whether it is a torch_dist checkpoint that becomes another one, whose names can stay.
NEEDS = (
    Need(
        "--num-experts",
        lambda args: "keep_layers" not in args,
        "{flag} gives a dense model experts, and --keep-layers takes layers of a model as they "
        "are; use one of the two, then convert the result with the other",
    ),
    Need(
        "--keep-layers",
        lambda args: not args.to_class,
        "{flag} and a change of the model's class ({args.to_class}) are two conversions; use one, "
        "then convert the result with the other",
    ),
    Need(
        "--model-class --hybrid-layer-pattern",
        lambda args: getattr(args, "format", None) != "hf",
        "{flag} is of a Megatron checkpoint, and a Hugging Face model has no such class; leave "
        "{flag} out",
    ),
    Need(
        "--model-class",
        lambda args: args.stays or args.model_class != "gpt",
        "{flag} gpt is for a HybridModel in torch_dist, and this source is a GPT; leave {flag} out",
    ),
    Need(
        "--hybrid-layer-pattern",
        lambda args: getattr(args, "model_class", None) != "gpt",
        "{flag} is of a HybridModel, and --model-class is gpt; use one of the two",
    ),
    Need(
        "--keep-layers",
        lambda args: args.kind != "hf" and getattr(args, "format", None) != "hf",
        "{flag} makes a Megatron checkpoint of layers of another one; convert a Hugging Face "
        "source first, and the result to --format hf afterwards",
    ),
    Need(
        "--drop-optimizer --ep",
        lambda args: "keep_layers" not in args,
        "{flag} is about the optimizer's state, which --keep-layers leaves out: it belongs to the "
        "teacher's run; leave {flag} out",
    ),
    Need(
        "--ep",
        lambda args: not args.to_class or "num_experts" in args,
        "{flag} is about an optimizer that gets experts, and a change of the model's class keeps "
        "it as it is; leave {flag} out",
    ),
    Need(
        "--prompts --parity-tolerance",
        lambda args: not args.renames,
        "{flag} is for models that are run, and with --keep-layers, --model-class or "
        "--hybrid-layer-pattern the bits of the kept layers are compared; leave {flag} out",
    ),
    Need(
        "--topk --layers --mode --granularity --drop-ratio --noise-std --router-init "
        "--shared-expert --preset --score-function --pre-softmax --scaling-factor",
        lambda args: "num_experts" in args,
        "{flag} is about new experts, and there are to be none; use --num-experts 8 too, or leave "
        "{flag} out",
    ),
    Need(
        "--granularity",
        lambda args: args.mode == "granular",
        "{flag} is for --mode granular, and --mode is {args.mode}; use --mode granular, or leave "
        "{flag} out",
    ),
    Need(
        "--drop-ratio",
        lambda args: args.mode == "drop",
        "{flag} is for --mode drop, and --mode is {args.mode}; use --mode drop, or leave {flag} "
        "out",
    ),
    Need(
        "--noise-std",
        lambda args: args.mode == "noise",
        "{flag} is for --mode noise, and --mode is {args.mode}; use --mode noise, or leave {flag} "
        "out",
    ),
    Need(
        "--router-init",
        lambda args: args.router_init != "virtual-group" or args.mode == "granular",
        "{flag} virtual-group is for --mode granular, and --mode is {args.mode}; use {flag} normal",
    ),
    Need(
        "--family",
        lambda args: getattr(args, "format", None) == "hf",
        "{flag} is for a Hugging Face output; use --format hf, or leave {flag} out",
    ),
    Need(
        "--transformer-impl",
        lambda args: getattr(args, "format", None) != "hf",
        "{flag} is for a Megatron output; use --format megatron, or leave {flag} out",
    ),
    Need(
        "--transformer-impl",
        lambda args: args.kind != "torch_dist",
        "{flag} is not for a torch_dist source, whose names stay as they are; leave {flag} out",
    ),
    Need(
        "--router",
        lambda args: args.kind != "hf" and getattr(args, "format", None) != "hf",
        "{flag} is about the run arguments that go from a Megatron checkpoint into another; leave "
        "{flag} out",
    ),
    Need(
        "--leave-out",
        lambda args: args.kind != "hf" and getattr(args, "format", None) != "hf",
        "{flag} is about run arguments that go from a Megatron checkpoint into another; leave "
        "{flag} out",
    ),
    Need(
        "--drop-optimizer --ep",
        lambda args: args.stays,
        "{flag} is about the optimizer's state, which goes along from torch_dist to torch_dist "
        "alone; leave {flag} out",
    ),
    Need(
        "--ep",
        lambda args: "drop_optimizer" not in args,
        "{flag} says how the optimizer is kept, and --drop-optimizer leaves it out; use one of the "
        "two",
    ),
    Need(
        "--prompts --parity-tolerance --verify",
        lambda args: "skip_parity" not in args,
        "{flag} is for the comparison, which --skip-parity leaves out; use one of the two",
    ),
    Need("--seed", _draws, "{flag} is for random draws, and this makes none; leave {flag} out"),
    Need(
        "source",  # --from
        lambda args: args.kind != "per-rank" or "skip_parity" in args or args.renames,
        "{args.source} is in per-rank files, which no program here can run to compare it with the "
        "result; use --skip-parity",
    ),
    Need(
        "source",
        lambda args: "num_experts" in args or args.renames or not args.stays,
        "{args.source} is a torch_dist checkpoint already; use --format hf, --num-experts and "
        "--topk, --keep-layers, or --model-class",
    ),
)


@dataclass(frozen=True)
class Request:
    """One conversion. With `check`, a look at what another one wrote; then nothing else counts."""

    target: Path
    check: bool = False
    source: Path = Path()
    kind: Kind = "torch_dist"
    settings: Upcycling | None = None  # of the experts that it gets
    keep_layers: tuple[int, ...] | None = None  # None: all
    model_class: ModelClass | None = None  # None: the source's
    hybrid_layer_pattern: str | None = None  # None: the one without cuts
    renames: bool = False  # whether tensors get other names and keep their bits
    format: Format = "megatron"
    family: str | None = None
    vocab_size: int | None = None  # without rows that pad it; None: what the checkpoint says
    implementation: str | None = None
    leave_out: tuple[str, ...] = ()  # run arguments
    router: str | None = None  # a module of the user's
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

    @property
    def reads_hybrids(self) -> bool:
        """Whether the source may be a HybridModel."""
        if self.format == "hf":
            return self.kind == "torch_dist" and self.keep_layers is None
        changes = self.model_class is not None or self.settings is not None
        return changes and self.moments_go_along


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
    kept = parse_kept(typed["keep_layers"]) if "keep_layers" in typed else None
    kind, output = kind_of(typed["source"]), typed.get("format", "megatron")
    stays = kind == "torch_dist" and output == "megatron"
    to_class = typed.get("model_class", "hybrid" if "hybrid_layer_pattern" in typed else None)
    known = {"mode": Upcycling.mode, **typed, "kind": kind, "stays": stays}
    renames = bool(kept or (to_class and not settings and stays))
    known |= {"to_class": to_class, "renames": renames}
    refuse_idle(NEEDS, typed, argparse.Namespace(**known))
    prompts = None
    if "prompts" in typed:
        prompts = read_prompts(typed["prompts"], typed["source"] if kind == "hf" else None)
    asked = {
        "--format": output,
        "--family": typed.get("family"),
        "--vocab-size": typed.get("vocab_size"),
        "--transformer-impl": typed.get("transformer_impl"),
        "--drop-optimizer": "drop_optimizer" in typed,
        "--router": typed.get("router"),
        "--leave-out": sorted(typed.get("leave_out", ())),
        **({"--keep-layers": list(kept)} if kept else {}),
        **({"--model-class": to_class} if to_class else {}),
        **({"--hybrid-layer-pattern": typed.get("hybrid_layer_pattern")} if to_class else {}),
        **(asdict(settings) if settings else {}),
    }
    return Request(
        target=target,
        source=typed["source"],
        kind=kind,
        settings=settings,
        keep_layers=kept,
        model_class=to_class,
        hybrid_layer_pattern=typed.get("hybrid_layer_pattern"),
        renames=renames,
        format=output,
        family=typed.get("family"),
        vocab_size=typed.get("vocab_size"),
        implementation=typed.get("transformer_impl"),
        router=typed.get("router"),
        leave_out=tuple(typed.get("leave_out", ())),
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
        manifest=_manifest(settings, kept, to_class, output, stays),
    )


def _manifest(
    settings: Upcycling | None,
    kept: tuple[int, ...] | None,
    to_class: ModelClass | None,
    output: Format,
    stays: bool,
) -> dict[str, Any]:
    if settings and stays:
        return asdict(settings) | ({"model_class": to_class} if to_class else {})
    said: dict[str, Any] = {"format": output}
    said |= {"keep_layers": list(kept)} if kept else {}
    return said | ({"model_class": to_class} if to_class else {})


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
    if typed.get("vocab_size", 1) < 1:
        raise ConfigError(
            f"--vocab-size must be at least 1; got {typed['vocab_size']}; use the number of the "
            "tokenizer's words"
        )
    _check_target(typed["target"], typed["source"])


def _check_target(target: Path, source: Path) -> None:
    """Raise ConfigError unless `target` can become a folder of its own, outside of `source`."""
    try:
        if target.is_symlink():
            raise ConfigError(
                f"output {target} is a symbolic link to {target.readlink()}; use the folder itself"
            )
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(f"output {target} exists and is not empty; use {sibling(target)}")
        above = next(folder for folder in target.absolute().parents if folder.exists())
        if not above.is_dir():
            raise ConfigError(
                f"output {target} would lie below {above}, which is a file; "
                "use a --to below a folder"
            )
        if source.resolve() in target.resolve().parents:
            raise ConfigError(f"output {target} lies inside --from {source}; use {sibling(source)}")
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"output {target} cannot be used ({error}); use another --to") from error


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
