"""Every file that `ep-plugin convert` writes, by SHA-256 or as JSON, and what it prints."""

import hashlib
import re
import signal
from functools import partial
from pathlib import Path

from checkout import CLI, Checkout, DidNotRun, each

SKIP = ("--skip-parity",)
EXPERTS = ("--num-experts", "4", "--topk", "2")
CASES: dict[str, tuple[str, tuple[str, ...]]] = {  # target -> source, flags
    "copy": ("dense", EXPERTS),
    "granular": (
        "dense",
        (*("--num-experts", "8", "--topk", "4", "--mode", "granular", "--granularity", "2"),
         *("--shared-expert", "learned", "--layers", "[0,1,1]")),
    ),
    "drop": ("dense", (*EXPERTS, "--mode", "drop", *SKIP, "--drop-optimizer")),
    "noise": (
        "dense",
        (*EXPERTS, "--mode", "noise", "--layers", "every:2", *SKIP, "--shared-expert", "copy"),
    ),
    "copy-no-optimizer": (
        "dense",
        (*EXPERTS, "--drop-optimizer", *SKIP, "--pre-softmax", "--router-init", "zero"),
    ),
    "ep1": ("dense", (*EXPERTS, "--ep", "1", *SKIP, "--seed", "5")),
    "preset": ("dense", ("--num-experts", "4", "--preset", "mixtral-8x7b", *SKIP)),
    "two-processes": ("dense", (*EXPERTS, "--processes", "2", *SKIP)),
    "te-names": ("llama", ("--transformer-impl", "transformer_engine")),
    "te-names-experts": ("te-names", (*EXPERTS, "--skip-parity")),
    "per-rank": ("per_rank", SKIP),
    "per-rank-hf": ("per_rank", ("--format", "hf", *SKIP)),
    "llama-experts": ("llama", (*EXPERTS, "--verify")),
    "gemma-experts-hf": ("gemma", (*EXPERTS, "--format", "hf", "--verify")),
    "mixtral": ("mixtral", ("--transformer-impl", "local")),
    "mixtral-back": ("mixtral", ("--format", "hf", "--family", "mixtral")),
    "deepseek": ("deepseek_v3", ("--verify",)),
    "deepseek-back": ("deepseek", ("--format", "hf")),
    "resumed": ("dense", (*EXPERTS, *SKIP)),
}  # fmt: skip
KILLED_AT = 2  # syncs of `resumed` before it is killed: the tensors, and that they are whole
# Written into an output, and not a function of the input: none is known.
LEFT_OUT: tuple[str, ...] = ()


def collect(checkout: Checkout, inputs: Path) -> dict[str, str]:
    """Convert everything; return CASE/FILE -> SHA-256, and CASE/printed -> text."""
    (checkout.folder / "converted").mkdir()
    return each(CASES, partial(convert, checkout, inputs))


def convert(checkout: Checkout, inputs: Path, name: str) -> dict[str, str]:
    """Make one conversion, from a tiny checkpoint or from what another one wrote."""
    root, (source, flags) = checkout.folder / "converted", CASES[name]
    from_ = f"../../{inputs.name}/{source}" if (inputs / source).is_dir() else source
    command = (*CLI, "convert", "--from", from_, "--to", name, *flags, "--json")
    if name == "resumed":
        code = checkout.run(*command, cwd=root, kill_at=KILLED_AT).code
        if code != -signal.SIGKILL:
            raise DidNotRun(f"it was to be killed after {KILLED_AT} syncs, and ended with {code}")
    found = {"printed": untimed(checkout.run(*command, cwd=root).check().out)}
    for path in sorted((root / name).rglob("*")):
        if path.is_file() and path.name not in LEFT_OUT:
            file = str(path.relative_to(root / name))
            if path.suffix == ".json":  # as it is, so that the table shows where it differs
                found[file] = path.read_text()
            else:
                found[file] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def untimed(text: str) -> str:
    """Return `text` with seconds as N: they are not the checkout's."""
    return re.sub(r'("(?:\w*seconds\w*|time\w*)": )[\d.e+-]+', r"\1N", text)
