"""Every flag of `ep-plugin convert` acts, or is refused: where each of them acts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ep_plugin.checkpoint.open import Kind
from ep_plugin.errors import ConfigError

Typed = dict[str, Any]  # destination of a flag that was typed -> value

_FLAGS = {"source": "--from", "target": "--to"}  # the others are named after their destination


@dataclass(frozen=True)
class Need:
    """Flags that act only where `met`; typed elsewhere, they are refused with `sentence`."""

    flags: tuple[str, ...]
    met: Callable[[Typed, Kind], bool]
    sentence: str  # {flag}: the one that was typed; {mode}: of the experts


def _mode(typed: Typed) -> str:
    mode: str = typed.get("mode", "copy")
    return mode


def stays_torch_dist(typed: Typed, kind: Kind) -> bool:
    """Whether a torch_dist checkpoint is to become another one, so that names can stay."""
    return kind == "torch_dist" and typed.get("format", "megatron") == "megatron"


def _draws(typed: Typed, _: Kind) -> bool:
    """Whether anything is drawn: tokens, routers, or weights of experts."""
    if "skip_parity" not in typed and "prompts" not in typed:
        return True
    rows = typed.get("router_init") != "zero" or _mode(typed) in ("drop", "noise")
    return "num_experts" in typed and rows


NEEDS = (
    Need(
        (
            *("--topk", "--layers", "--mode", "--granularity", "--drop-ratio", "--noise-std"),
            *("--router-init", "--shared-expert", "--preset", "--score-function", "--pre-softmax"),
            "--scaling-factor",
        ),
        lambda typed, _: "num_experts" in typed,
        "{flag} is about new experts, and there are to be none; use --num-experts 8 too, or leave "
        "{flag} out",
    ),
    Need(
        ("--granularity",),
        lambda typed, _: _mode(typed) == "granular",
        "{flag} is for --mode granular, and --mode is {mode}; use --mode granular, or leave {flag} "
        "out",
    ),
    Need(
        ("--drop-ratio",),
        lambda typed, _: _mode(typed) == "drop",
        "{flag} is for --mode drop, and --mode is {mode}; use --mode drop, or leave {flag} out",
    ),
    Need(
        ("--noise-std",),
        lambda typed, _: _mode(typed) == "noise",
        "{flag} is for --mode noise, and --mode is {mode}; use --mode noise, or leave {flag} out",
    ),
    Need(
        ("--router-init",),
        lambda typed, _: typed["router_init"] != "virtual-group" or _mode(typed) == "granular",
        "{flag} virtual-group is for --mode granular, and --mode is {mode}; use {flag} normal",
    ),
    Need(
        ("--family",),
        lambda typed, _: typed.get("format") == "hf",
        "{flag} is for a Hugging Face output; use --format hf, or leave {flag} out",
    ),
    Need(
        ("--transformer-impl",),
        lambda typed, _: typed.get("format") != "hf",
        "{flag} is for a Megatron output; use --format megatron, or leave {flag} out",
    ),
    Need(
        ("--transformer-impl",),
        lambda typed, kind: kind != "torch_dist",
        "{flag} is not for a torch_dist source, whose names stay as they are; leave {flag} out",
    ),
    Need(
        ("--drop-optimizer", "--ep"),
        stays_torch_dist,
        "{flag} is about the optimizer's state, which goes along from torch_dist to torch_dist "
        "alone; leave {flag} out",
    ),
    Need(
        ("--ep",),
        lambda typed, _: "drop_optimizer" not in typed,
        "{flag} says how the optimizer is kept, and --drop-optimizer leaves it out; use one of the "
        "two",
    ),
    Need(
        ("--prompts", "--parity-tolerance", "--verify"),
        lambda typed, _: "skip_parity" not in typed,
        "{flag} is for the comparison, which --skip-parity leaves out; use one of the two",
    ),
    Need(("--seed",), _draws, "{flag} is for random draws, and this makes none; leave {flag} out"),
)


def refuse_idle_flags(typed: Typed, kind: Kind) -> None:
    """Raise ConfigError for a flag that was typed and would have no effect."""
    for need in NEEDS:
        for flag in need.flags:
            if destination(flag) in typed and not need.met(typed, kind):
                raise ConfigError(need.sentence.format(flag=flag, mode=_mode(typed)))


def refuse_unfinished(typed: Typed, kind: Kind) -> None:
    """Raise ConfigError where this kind of source needs a flag that was not typed."""
    if kind == "per-rank" and "skip_parity" not in typed:
        raise ConfigError(
            f"{typed['source']} is in per-rank files, which no program here can run to compare it "
            "with the result; use --skip-parity"
        )
    if "num_experts" not in typed and stays_torch_dist(typed, kind):
        raise ConfigError(
            f"{typed['source']} is a torch_dist checkpoint already; use --format hf, or "
            "--num-experts and --topk"
        )


def refuse_beside_check(typed: Typed) -> None:
    """Raise ConfigError for any flag beside --check and --to."""
    for name in typed:
        if name not in ("check", "target"):
            flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
            raise ConfigError(
                f"{flag} is for a conversion, and --check only looks at what one wrote; use "
                "--check --to FOLDER alone"
            )


def destination(flag: str) -> str:
    """Return the name that argparse keeps a flag under."""
    return flag.removeprefix("--").replace("-", "_")
