"""The user's flags, edited so that runs at different layouts can be compared number by number."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from ep_plugin.commands.parity.layouts import LAYOUT_FLAGS
from ep_plugin.megatron.arguments.spell import megatron_arguments
from ep_plugin.megatron.arguments.table import TABLE
from ep_plugin.presets import load

# What would make equal runs differ, or write outside the comparison's folder.
NOT_COMPARABLE = (
    *("--bf16", "--fp16", "--fp8-format", "--fp8-recipe", "--fp8-param-gather", "--fp4-format"),
    *("--use-precision-aware-optimizer", "--main-grads-dtype", "--main-params-dtype"),
    *("--exp-avg-dtype", "--exp-avg-sq-dtype", "--grad-reduce-in-bf16"),
    *("--attention-dropout", "--hidden-dropout", "--moe-input-jitter-eps", "--rampup-batch-size"),
    *("--train-iters", "--train-samples", "--lr-decay-iters", "--lr-decay-samples"),
    *("--lr-warmup-iters", "--lr-warmup-samples", "--lr-warmup-fraction", "--lr-warmup-init"),
    *("--lr-decay-style", "--lr-wsd-decay-iters", "--lr-wsd-decay-style", "--lr-wsd-decay-samples"),
    *("--eval-iters", "--eval-interval", "--log-interval", "--exit-interval"),
    *("--exit-duration-in-mins", "--exit-signal-handler", "--num-workers"),
    *("--save", "--save-interval", "--load", "--ckpt-step", "--finetune", "--no-load-optim"),
    *("--no-load-rng", "--no-save-optim", "--no-save-rng", "--async-save", "--ckpt-format"),
    *(
        "--use-checkpoint-args",
        "--use-mp-args-from-checkpoint-args",
        "--exit-on-missing-checkpoint",
    ),
    *("--save-retain-interval", "--save-params-interval", "--save-activations-interval"),
    *("--save-wgrads-interval", "--save-dgrads-interval", "--log-progress"),
    *("--load-main-params-from-ckpt", "--ckpt-convert-format", "--ckpt-convert-save"),
    *("--phase-transition-iterations", "--full-validation", "--multiple-validation-sets"),
    *("--skip-train", "--test-mode", "--lr-wsd-decay-fraction", "--fp8-output-proj"),
    *("--fp4-param-gather", "--fp16-lm-cross-entropy", "--fp32-residual-connection"),
    *(
        "--reuse-grad-buf-for-mxfp8-param-ag",
        "--pretrained-checkpoint",
        "--non-persistent-save-interval",
        "--non-persistent-ckpt-type",
    ),
    *("--tensorboard-dir", "--wandb-project", "--wandb-exp-name", "--wandb-save-dir"),
    *("--dist-ckpt-optim-fully-reshardable",),
    *(name for row in TABLE if not row.comparable for name in (row.flag, row.twin_flag) if name),
)


@dataclass(frozen=True)
class Arguments:
    """A script's flags, what was taken out of them, and what was put in."""

    kept: list[str]
    removed: list[str]
    added: list[str]

    @property
    def all(self) -> list[str]:
        return self.kept + self.added


def expand_preset(arguments: list[str]) -> list[str]:
    """Return `arguments` with those of `--ep-preset NAME` written out before them."""
    name = value(arguments, "--ep-preset")
    if name is None:
        return arguments
    rest, _ = without(arguments, ("--ep-preset",))
    return [*megatron_arguments(load(name)), *rest]


def comparable(arguments: list[str], iterations: int) -> Arguments:
    """Return the flags in fp32, deterministic, without dropout, for a few equal iterations."""
    kept, removed = without(arguments, (*NOT_COMPARABLE, *LAYOUT_FLAGS))
    settings = {
        "--train-iters": str(iterations),
        "--lr-decay-style": "constant",
        "--attention-dropout": "0",
        "--hidden-dropout": "0",
        "--eval-iters": "0",
        "--eval-interval": str(10**6),
        "--log-interval": "1",
        "--num-workers": "0",
        "--ckpt-format": "torch_dist",
        "--ep-deterministic": "on",
    }
    added = [word for pair in settings.items() for word in pair]
    if "--use-distributed-optimizer" in kept:
        added.append("--dist-ckpt-optim-fully-reshardable")
    return Arguments(kept, removed, added)


def without(arguments: list[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments without the flags of these names and their values, and those taken."""
    kept: list[str] = []
    taken: list[str] = []
    target = kept
    for word in arguments:
        if word.startswith("--"):
            target = taken if word.partition("=")[0] in names else kept
        target.append(word)
    return kept, taken


def is_number(text: str | None) -> bool:
    """Whether a word is a whole number that can be a size, from 0 on."""
    return text is not None and text.isascii() and text.isdecimal() and len(text) < 10


def value(arguments: list[str], name: str) -> str | None:
    """Return the first word after the last `name`; None without it."""
    found = None
    for word, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        if word == name:
            found = following
        elif word.startswith(f"{name}="):
            found = word.partition("=")[2]
    return found


def values(arguments: list[str], name: str) -> list[str]:
    """Return all words after the last `name`."""
    found: list[str] = []
    inside = False
    for word in arguments:
        if word.startswith("--"):
            inside = word.partition("=")[0] == name
            if inside:
                found = [word.partition("=")[2]] if "=" in word else []
        elif inside:
            found.append(word)
    return found
