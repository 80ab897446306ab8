"""`ep-plugin doctor`: what is installed here, and whether the plugin can work with it."""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

from ep_plugin import __version__
from ep_plugin.commands.law import Need
from ep_plugin.errors import BackendUnavailable, ConfigError
from ep_plugin.registry import available, resolve

KINDS = ("router", "dispatcher", "gemm", "overlap")
PACKAGES = (  # package, the module that has to import, what it is for
    (
        *("transformer-engine", "transformer_engine.pytorch"),
        "--transformer-impl transformer_engine, Megatron's default on GPUs: pip install "
        "--no-build-isolation 'transformer-engine[pytorch]'; without it --transformer-impl local",
    ),
    ("mamba-ssm", "mamba_ssm", "M, Mamba layers, of --hybrid-layer-pattern, on GPUs"),
    ("flash-linear-attention", "fla", "G, gated delta nets, of --hybrid-layer-pattern, on GPUs"),
    ("sentencepiece", "sentencepiece", "the recipes' tokenizer"),
    ("tensorboard", "tensorboard", "--tensorboard-dir and ep-plugin report"),
    ("matplotlib", "matplotlib", "ep-plugin report"),
)
EXAMPLES = """examples:
  ep-plugin doctor             one line for each thing the plugin uses
  ep-plugin doctor -v          and every place in other people's code that is changed, and why
  ep-plugin doctor --json      all of it as one JSON object

ok: works; absent: not installed, or not usable here, and not needed by the rest; broken: has to be
put right. Exit code 1 when something is broken, else 0.
"""


Status = Literal["ok", "absent", "broken"]


@dataclass(frozen=True)
class Finding:
    """What was found about one thing."""

    name: str
    status: Status
    text: str


NEEDS = (
    Need(
        "--verbose",
        lambda args: not args.json,
        "{flag} lists what --json has anyway; use one of them",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="list what is changed, and why"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Print the findings; return 0 when the plugin is usable here, else 1."""
    findings = examine()
    usable = all(finding.status != "broken" for finding in findings)
    if args.json:
        seams = [{"place": place, "why": why} for place, why in _seams(findings)]
        report = {"usable": usable, "findings": [asdict(f) for f in findings], "seams": seams}
        print(json.dumps(report, indent=2))
        return int(not usable)
    print(f"ep_plugin {__version__}")
    for finding in findings:
        print(f"  {finding.status:<7} {finding.name:<22} {finding.text}")
    if args.verbose:
        _print_seams(_seams(findings))
    print("usable" if usable else "not usable: see what is broken")
    return int(not usable)


def examine() -> list[Finding]:
    """Return every finding. Torch, the options and Megatron are imported, quietly."""
    findings = [Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")]
    with _quietly():
        torch = _torch()
        findings.append(torch)
        if torch.status == "ok":
            findings += [_device(), *_megatron(), _apex(), *_options()]
    packages = [_package(row) for row in PACKAGES]
    return [
        *findings,
        *packages,
        *_hybrid(findings, packages),
        *_attention(findings, packages[0]),
    ]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _seams(findings: list[Finding]) -> list[tuple[str, str]]:
    """Return (place, why there) of all that `install` would change; none without a Megatron."""
    status = {finding.name: finding.status for finding in findings}
    if status.get("megatron-core") != "ok" or status["device"] != "ok":
        return []
    from ep_plugin.megatron.seams import install

    with _quietly():
        return install.seams()


def _print_seams(seams: list[tuple[str, str]]) -> None:
    """Print each reason with the places that it is for."""
    print("changed by ep_plugin.megatron.install():")
    for why in dict.fromkeys(why for _, why in seams):
        print(f"  {why}")
        for place in (place for place, reason in seams if reason == why):
            print(f"    {place}")


def _torch() -> Finding:
    try:
        return Finding("torch", "ok", str(import_module("torch").__version__))
    except (ImportError, OSError) as error:  # OSError: one of its shared libraries does not load
        return Finding("torch", "broken", f"cannot be imported ({error}); pip install torch")


def _device() -> Finding:
    from ep_plugin.megatron.cpu import gpu_packages
    from ep_plugin.megatron.cpu import mode as cpu_mode

    cuda = import_module("torch").cuda
    try:
        wanted = cpu_mode.wanted()
    except ConfigError as error:
        return Finding("device", "broken", str(error))
    if wanted:
        asked = " as EP_PLUGIN_DEVICE asks" if "EP_PLUGIN_DEVICE" in os.environ else ", no GPU here"
        hidden = ", ".join(gpu_packages.installed())
        kept = f"; Megatron does not see {hidden}, for GPUs" if hidden else ""
        return Finding("device", "ok", f"CPU mode with gloo{asked}{kept}")
    names = [cuda.get_device_name(device) for device in range(cuda.device_count())]
    return Finding("device", "ok", f"{len(names)} x {', '.join(sorted(set(names)))} with NCCL")


def _megatron() -> list[Finding]:
    from ep_plugin.megatron.seams import found, touchpoints

    try:
        table = touchpoints.verify()
    except ConfigError as error:
        missing = find_spec("megatron") is None
        alone = "; ep_plugin.MoELayer needs torch alone" if missing else ""
        status: Status = "absent" if missing else "broken"
        return [Finding("megatron-core", status, f"{error}{alone}")]
    release = touchpoints.installed_version()
    # Megatron adds the commit of the repository that it lies in; a wheel's would be a stranger's.
    spec = found.spec_of_core()
    own = spec is not None and found.is_checkout(found.folder_of(spec))
    shown = release if own else release.partition("+")[0]
    text = f"{shown}, all {len(table)} touch points match"
    if (about := touchpoints.experimental(release)) is not None:
        text += f"; {about}"
    if not touchpoints.has_training():
        text += "; without megatron.training, for loops of your own: install(settings)"
    return [Finding("megatron-core", "ok", text), _helper()]


def _helper() -> Finding:
    """Return whether Megatron's data sets have what they need in C++."""
    from ep_plugin.megatron.seams import wheel

    try:
        wheel.check_helpers()
    except ConfigError as error:
        return Finding("megatron's helper", "broken", str(error))
    text = "compiled" if wheel.is_compiled() else "is compiled when a run starts"
    return Finding("megatron's helper", "ok", text)


def _options() -> list[Finding]:
    findings = []
    for kind in KINDS:
        works = False
        for name in available(kind):
            try:
                resolve(kind, name)
            except BackendUnavailable as error:
                findings.append(Finding(f"{kind} {name}", "absent", str(error)))
            else:
                works = True
                findings.append(Finding(f"{kind} {name}", "ok", "imports"))
        if not works:
            findings.append(Finding(kind, "broken", "none of its options imports"))
    return findings


def _apex() -> Finding:
    from ep_plugin.megatron.seams.apex import foreign_apex

    if problem := foreign_apex():
        return Finding("apex", "broken", problem)
    if find_spec("apex") is None:
        return Finding("apex", "absent", "not installed; Megatron uses NVIDIA's where it is")
    return Finding("apex", "ok", "NVIDIA's")


def _hybrid(findings: list[Finding], packages: list[Finding]) -> list[Finding]:
    """Say which symbols of --hybrid-layer-pattern have layers here; nothing without a Megatron."""
    status = {finding.name: finding.status for finding in (*findings, *packages)}
    if status.get("megatron-core") != "ok" or status["device"] != "ok":
        return []
    from ep_plugin.megatron.arguments.layer_pattern import OF_GPUS
    from ep_plugin.megatron.cpu import mode as cpu_mode
    from ep_plugin.megatron.seams import touchpoints

    name, version = "HybridModel", touchpoints.installed_version()
    if not touchpoints.release_for(version).HYBRID:
        return [Finding(name, "absent", f"megatron-core {version} has none; it is there from 0.18")]
    if cpu_mode.wanted():
        missing = "; ".join(f"{symbol}: {needs}" for symbol, needs in OF_GPUS.items())
        return [Finding(name, "ok", f"layers *, +, - and E on the CPU; {missing}, for GPUs")]
    if status["transformer-engine"] != "ok":
        text = "Megatron's layers of one are Transformer Engine's, which is not usable here"
        return [Finding(name, "absent", text)]
    further = {"M": "mamba-ssm", "G": "flash-linear-attention"}
    there = [symbol for symbol, package in further.items() if status[package] == "ok"]
    lacks = [f"{symbol} needs {further[symbol]}" for symbol in further if symbol not in there]
    text = f"layers {', '.join(['*', '+', 'D', '-', 'E', *there])}"
    return [Finding(name, "ok", "; ".join([text, *lacks]))]


def _attention(findings: list[Finding], engine: Finding) -> list[Finding]:
    """Say which attention Transformer Engine takes for a usual model; nothing without a GPU."""
    device = next((f for f in findings if f.name == "device"), None)
    if engine.status != "ok" or device is None or "NCCL" not in device.text:
        return []
    code = "from ep_plugin.megatron.seams.attention import describe; print(describe())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()
    said = lines[-1] if lines else f"exit code {result.returncode}"
    status: Status = "ok" if said.startswith(("flash ", "fused ")) else "absent"
    return [Finding("attention", status, f"{said} (bf16, causal, 32 heads of 128)")]


def _package(row: tuple[str, str, str]) -> Finding:
    """Import the package in a process of its own: a broken extension can end the process."""
    name, module, purpose = row
    try:
        installed = version(name)
    except PackageNotFoundError:
        return Finding(name, "absent", f"not installed; it is for {purpose}")
    command = [sys.executable, "-c", f"import {module}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return Finding(name, "ok", installed)
    reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
    return Finding(
        name, "absent", f"{installed} cannot be imported ({reason}); it is for {purpose}"
    )
