"""Figures as rows: made, kept in a file, printed as a table."""

import json
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ep_plugin import __version__
from ep_plugin.commands.bench.floors import told
from ep_plugin.commands.bench.measure import Timing
from ep_plugin.errors import ConfigError
from ep_plugin.sources import of_plugin
from ep_plugin.untrusted import read_json, shown
from ep_plugin.written import write_whole

Row = dict[str, Any]
IDENTITY = (
    *("bench", "shape", "op", "backend", "precision", "routing", "ep", "graph", "device"),
    *("dispatcher", "schedule", "gradients"),
)
EMPTY: Row = {
    **dict.fromkeys(("bench", "shape", "op", "backend", "precision", "routing")),
    **{"ep": 1, "graph": False},
    **dict.fromkeys(("ms", "p10_ms", "p90_ms", "fwd_ms", "weight_quant_ms", "floor_ms")),
    **dict.fromkeys(("saved_mib", "tflops", "gbps", "error", "grad_error", "gpu")),
    **dict.fromkeys(("dispatcher", "schedule", "exchange_ms", "compute_ms", "wire_ms")),
    **dict.fromkeys(("hidden_share", "covered_share", "rates", "host_ms", "start")),
    "gradients": "anew",  # weight gradients; of rows that do not say so
}
OF_SOME = {
    "switches",
    "attention",
    "run",
    "largest_share",
    "dims",
    "tokens_per_second",
    "first_losses",
    "losses",
}  # benches
# What a row must have to be printed and drawn: the types of each name, and which are never None.
TEXTS = (
    "bench shape op backend precision routing device dispatcher schedule gradients switches run "
    "start"
)
NUMBERS = (
    "ms p10_ms p90_ms fwd_ms weight_quant_ms floor_ms saved_mib tflops gbps exchange_ms "
    "compute_ms hidden_share covered_share host_ms"
)
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(TEXTS.split(), (str,)),
    **dict.fromkeys(NUMBERS.split(), (int, float)),
    **{"ep": (int,), "graph": (bool,), "rates": (dict,)},
}
ALWAYS = {
    *("bench", "shape", "backend", "precision", "routing", "device", "ep", "graph"),
    *("ms", "p10_ms", "p90_ms", "gradients"),
}
RATES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("copy_tbps", "bf16_tflops", "fp8_tflops"), (int, float)),
    "source": (str,),
}
WITH_FLOOR = ("layer", "gemm", "kernels", "overlap")
PACKAGES = (
    *("torch", "triton", "megatron-core", "transformer-engine"),
    *("sonic-moe", "quack-kernels", "liger-kernel", "sgl-deep-gemm", "deep-gemm"),
    *("torchtitan", "deepspeed", "veomni"),
)


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def versions() -> dict[str, str]:
    """Return the version of each package that plays a part and is installed.

    The plugin's own has a hash of its sources behind it, as they change between releases.
    """
    return dict(_versions())


@cache  # a look at each package on disk, and a bench makes hundreds of rows
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "ep-plugin": f"{__version__}+{of_plugin()}"}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with the CUDA it is built for
    return found


@cache
def this_start(path: Path = Path("/proc/sys/kernel/random/boot_id")) -> str | None:
    """Return eight hex digits that tell this start of this machine from others; None off Linux.

    What the host launches depends on it: such rows compare within one start alone.
    """
    return sha256(path.read_bytes()).hexdigest()[:8] if path.exists() else None


def hosts_differ(row: Row, other: Row) -> bool:
    """Return whether two rows may be of two hosts, and one of them depends on its host."""
    launched = not (row["graph"] and other["graph"])
    known = row["start"] is not None and row["start"] == other["start"]
    return launched and not known


def make_row(device: torch.device, time: Timing, **fields: Any) -> Row:
    """Return a row with every key; what has no meaning for its bench is None."""
    unknown = set(fields) - set(EMPTY) - OF_SOME
    assert not unknown, unknown
    figures = {"ms": time.median, "p10_ms": time.p10, "p90_ms": time.p90} | fields
    return {
        **EMPTY,
        **{k: round(v, 6) if isinstance(v, float) else v for k, v in figures.items()},
        "device": device_name(device),
        "versions": versions(),
        "start": this_start(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def other_sources(rows: Iterable[Row]) -> list[str]:
    """Return for each row that another state of the plugin's sources measured which one did."""
    found = [row["versions"] if isinstance(row["versions"], dict) else {} for row in rows]
    states = [held.get("ep-plugin", "of no version") for held in found]
    return [shown(state) for state in states if state != versions()["ep-plugin"]]


def identity(row: Row) -> tuple[Any, ...]:
    """Return what tells a row from every other."""
    return tuple(row.get(name) for name in IDENTITY)


def read(path: Path) -> list[Row]:
    """Return the rows of a file, none if there is no file; raises ConfigError for other content."""
    if not path.exists():
        return []
    rows: list[Row] = read_json(path, "use another --output", list)
    for number, row in enumerate(rows, start=1):
        if wrong := "there are no names" if type(row) is not dict else _wrong(_whole(row)):
            raise ConfigError(
                f"{path} is no file of bench: in row {number} {wrong}; use another --output"
            )
    return [_whole(row) for row in rows]


def _whole(row: Row) -> Row:
    """Return a row with every key; older rows of training do not say what all of them did."""
    whole = {**EMPTY, **row}
    if row.get("bench") == "train":
        whole |= {"gradients": row.get("gradients", "added")}
        whole |= {"routing": row.get("routing") or "natural"}
    return whole


def _wrong(row: Row) -> str:
    """Return what in a row of a file can be neither printed nor drawn; "" for one that can."""
    for name, kind in KINDS.items():
        value = row.get(name)
        if type(value) not in kind and not (value is None and name not in ALWAYS):
            return f"{name} is {shown(value)}"
    if row["exchange_ms"] is not None and None in (row["compute_ms"], row["hidden_share"]):
        return "exchange_ms stands alone"
    if row["floor_ms"] is None and row["bench"] in WITH_FLOOR:
        return "floor_ms is None"
    rates = row["rates"]
    if rates is not None and not all(type(rates.get(n)) in kind for n, kind in RATES.items()):
        return f"rates is {shown(rates)}"
    positive = all(row[name] is None or row[name] > 0 for name in ("ep", "ms", "floor_ms"))
    return "" if positive else "ep, ms or floor_ms is not positive"


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Return old rows and new ones; a new one takes the place of the old one it repeats."""
    return list(
        ({identity(row): row for row in old} | {identity(row): row for row in new}).values()
    )


def write(path: Path, rows: list[Row]) -> None:
    """Write rows, one a line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    write_whole(path, f"[\n{lines}\n]\n" if rows else "[]\n")


def table(rows: list[Row]) -> str:
    """Return rows as text, a floor beside every figure; on the CPU as ratios to torch's bf16."""
    lines, heading = [], None
    base = {_group(row): row["ms"] for row in rows if _is_base(row)}
    serial = {_pair(row): row["ms"] for row in rows if row["schedule"] == "serial"}
    for row in sorted(rows, key=lambda row: str(_group(row))):
        floor = _rates_of(row)
        title = f"{row['bench']} {case_of(row)}, {row['device']}; floor: {floor}"
        if title != heading:
            lines += ["", title]
            heading = title
        if row["bench"] == "overlap":
            lines.append(_overlap_line(row, serial.get(_pair(row))))
        else:
            lines.append(_line(row, base.get(_group(row))))
    return "\n".join(lines[1:])


def _rates_of(row: Row) -> str:
    """Return the rates that a row's floor stands on; for rows that keep none, the older count."""
    if row["bench"] == "kernels":
        return "copy here"
    return told(row["rates"]) if row["rates"] else "one H100, gradients added in fp32, no routing"


def case_of(row: Row) -> str:
    """Return shape, ranks where there are several, and routing, for a reader."""
    ranks = f", ep={row['ep']}" if row["ep"] > 1 else ""
    added = ", gradients added" if row["gradients"] == "added" else ""
    return f"{row['shape']}{ranks}, {row['routing']}{added}"


def _group(row: Row) -> tuple[Any, ...]:
    return (
        row["bench"],
        row["shape"],
        row["ep"],
        row["routing"],
        row["device"],
        row["gradients"],
        row["op"],
    )


def _pair(row: Row) -> tuple[Any, ...]:
    how = row["dispatcher"], row["graph"]
    return (*_group(row), row["backend"], row["precision"], *how)


def _overlap_line(row: Row, serial: float | None) -> str:
    parts = row["backend"], row["precision"], row["dispatcher"], row["schedule"]
    name = " ".join((*parts, "graph") if row["graph"] else parts)
    shown = [f"  {name:56}"]
    if serial is not None:
        shown.append(f"{row['ms'] / serial:6.2f} x serial")
    if row["device"] != "cpu":
        shown.append(f"{row['ms']:9.3f} ms, floor {row['floor_ms']:8.3f}")
    if row["exchange_ms"] is not None:
        if row["device"] != "cpu":
            shown.append(f"exchange {row['exchange_ms']:7.3f}, compute {row['compute_ms']:8.3f}")
        shown.append(f"{row['hidden_share']:6.0%} of the exchange hidden")
    if row.get("covered_share") is not None:
        shown.append(f"{row['covered_share']:5.0%} of the wire beside work")
    if row["gbps"] is not None:
        shown.append(f"{row['gbps']:6.0f} GB/s leaving")
    return " ".join(shown)


def _is_base(row: Row) -> bool:
    return bool(row["backend"] == "torch" and row["precision"] == "bf16")


def _line(row: Row, base: float | None) -> str:
    name = " ".join(filter(None, (row["op"], row["backend"], row["precision"])))
    ratio = f"{row['ms'] / base:8.2f} x torch" if base else " " * 16
    if row["bench"] == "kernels":
        ratio = f"{row['ms'] / row['floor_ms']:8.2f} x copy "
    if row["device"] == "cpu":
        return f"  {name:46}{ratio}   floor {row['floor_ms']:.3g} ms"
    parts = [f"  {name:46}{row['ms']:9.3f} ms   floor {row['floor_ms']:8.3f}"]
    parts.append(f"({row['p10_ms']:.3f} .. {row['p90_ms']:.3f}){ratio}")
    fields = (
        ("fwd_ms", "ms forward"),
        ("host_ms", "ms host"),
        ("tflops", "TFLOPS"),
        ("gbps", "GB/s"),
    )
    for field, unit in fields:
        if row[field] is not None:
            parts.append(f"{row[field]:8.2f} {unit}")
    if row["saved_mib"] is not None:
        parts.append(f"{row['saved_mib']:7.0f} MiB kept")
    return " ".join(parts) + ("  graph" if row["graph"] else "")
