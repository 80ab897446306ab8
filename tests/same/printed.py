"""What commands print: `presets`, and the JSON of every command that has it."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from checkout import CLI, Checkout, Done
from conversions import untimed
from training import MODEL

UPCYCLING = ("--num-experts", "4", "--topk", "2", "--dry-run", "--json")
# name -> command; INPUTS stands for the folder of tiny checkpoints
COMMANDS: dict[str, tuple[str, ...]] = {
    "doctor": ("doctor", "--json"),
    "plan": (
        *("plan", "--topk", "8", "--hidden", "2048", "--experts", "128", "--ep", "2", "8"),
        "--json",
    ),
    "plan-fp8": (
        *("plan", "--experts", "512", "--ep", "8", "64", "--chunks", "8", "--fp8-dispatch"),
        "--json",
    ),
    "plan-fit": ("plan", "--preset", "qwen3-30b-a3b", "--gpus", "16", "--pp", "2", "--json"),
    "plan-refused": ("plan", "--topk", "9", "--experts", "8", "--json"),
    "audit": ("audit", "INPUTS/dense", "--json"),
    "audit-nothing": ("audit", "INPUTS/nothing", "--json"),
    "convert": ("convert", "--from", "INPUTS/dense", "--to", "dry", *UPCYCLING),
    "convert-hf": ("convert", "--from", "INPUTS/mixtral", "--to", "dry", "--dry-run", "--json"),
    "convert-hf-experts": (
        *("convert", "--from", "INPUTS/llama", "--to", "dry", "--format", "hf"),
        *UPCYCLING,
    ),
    "convert-refused": ("convert", "--from", "INPUTS/dense", "--to", "dry", "--topk", "2"),
    "report-unfinished": ("report", "--run", "run", "--experts", "4", "--json"),
    "report-refused": ("report", "--run", "INPUTS", "--json"),
}
PARITY = (*MODEL, "--tiny", "--iterations", "1", "--layouts", "ep=2", "--device", "cpu", "--json")


def collect_presets(checkout: Checkout) -> dict[str, str]:
    """Return the list of presets and the arguments of each."""
    listed = checkout.run(*CLI, "presets", "--json").check().out
    found = {"list as JSON": listed, "list": checkout.run(*CLI, "presets").check().out}
    for record in json.loads(listed):
        name = record["name"]
        found[name] = checkout.run(*CLI, "presets", name).check().out
        found[f"{name} as JSON"] = checkout.run(*CLI, "presets", name, "--json").check().out
    return found


def collect_json(checkout: Checkout, inputs: Path) -> dict[str, str]:
    """Return what each command prints, its errors and its exit code; and a script after `apply`."""
    found: dict[str, str] = {}
    shutil.copytree(inputs / "run", checkout.folder / "run")
    for name, command in COMMANDS.items():
        words = (word.replace("INPUTS", f"../{inputs.name}") for word in command)
        found |= said(name, checkout.run(*CLI, *words))
    script = checkout.folder / "pretrain_gpt.py"
    shutil.copy(checkout.root / "recipes" / "pretrain_gpt.py", script)
    found |= said("parity", checkout.run_cold(*CLI, "parity", script.name, *PARITY).check())
    found |= said("apply", checkout.run(*CLI, "apply", script.name).check())
    found["apply/script"] = hashlib.sha256(script.read_bytes()).hexdigest()
    return found


def said(name: str, done: Done) -> dict[str, str]:
    """Return COMMAND/PLACE -> value for each value of a JSON answer, or the text."""
    found = {f"{name}/exit code": str(done.code)}
    if done.code == 2:
        found[f"{name}/error"] = done.err.strip().splitlines()[-1]
    try:
        answer = json.loads(done.out)
    except ValueError:
        return {**found, f"{name}/text": untimed(done.out)}
    return {**found, **{f"{name}/{place}": value for place, value in leaves(answer)}}


def leaves(answer: object, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield the place and the text of every value in nested lists and dicts."""
    if isinstance(answer, dict | list):
        yield f"{place}/", f"{type(answer).__name__} of {len(answer)}"
        pairs = answer.items() if isinstance(answer, dict) else enumerate(answer)
        for key, value in pairs:
            yield from leaves(value, f"{place}/{key}" if place else str(key))
    else:
        yield place, repr(answer)
