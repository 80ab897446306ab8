"""Rows for bench_page.py: which are shown, what made them, and how to repeat them."""

import json
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from train_sides import LAYERS, OUR_WAYS

from ep_plugin.commands.bench.contest import DROPPING, OURS
from ep_plugin.commands.bench.figures import Row, read
from ep_plugin.commands.bench.floors import H100, PRECISIONS, Work, floor_ms
from ep_plugin.commands.bench.shapes import SHAPES

RESULTS = Path(__file__).parent / "results"
# Files of rows that are measured again elsewhere: other cards, other starts, losses alone.
AGAIN = ("other_cards", "starts", "repeats", "losses")
BENCHES = ("layer", "overlap", "train")
THEIRS = ("megatron", "torch")  # peers with columns of their own
PACKAGES = {"liger": "liger-kernel", "sonicmoe": "sonic-moe"}  # of peers by other names


class Found(NamedTuple):
    """A row and its file."""

    row: Row
    file: str

    @property
    def ms(self) -> float:
        return float(self.row["ms"])

    def floor(self) -> float | None:
        """Return the floor; None where it is not known.

        Rows that keep no rates have it counted anew, as of one H100, if they are of one.
        """
        row = self.row
        if row["rates"]:
            return float(row["floor_ms"])
        if "H100" not in row["device"]:
            return None
        shape = SHAPES[row["shape"]]
        return floor_ms(Work(shape, row["precision"], row["gradients"], row["ep"]), H100)

    def switches(self) -> str:
        """Return what the row says; rows of before it was kept say nothing."""
        return str(self.row.get("switches") or "-")


def load(folder: Path = RESULTS) -> list[Found]:
    """Return the rows of GPUs with times, of all files."""
    return [
        Found(row, path.name)
        for path in sorted(folder.glob("*.json"))
        if not any(word in path.stem for word in AGAIN) and _has_rows(path)
        for row in read(path)
        if row["bench"] in BENCHES and row["ms"] is not None and row["device"] != "cpu"
    ]


def newest(found: list[Found]) -> list[Found]:
    """Return the rows of one file for each bench, card, number of ranks, gradients, graph or not.

    Rows of a file ran on cards of one kind, if not always in one process: of several files the
    newest counts, then the one with more rows. The loop depends on its host, so each host's count.
    """
    groups: dict[tuple[object, ...], dict[str, list[Found]]] = {}
    for each in found:
        row = each.row
        model = (row["shape"], host_of(each)) if row["bench"] == "train" else ""
        key = row["bench"], row["device"], row["ep"], row["gradients"], row["graph"], model
        groups.setdefault(key, {}).setdefault(each.file, []).append(each)
    return [each for files in groups.values() for each in max(files.values(), key=_freshness)]


def _freshness(members: list[Found]) -> tuple[str, int]:
    return max(str(each.row["date"]) for each in members), len(members)


def _has_rows(path: Path) -> bool:
    rows = json.loads(path.read_text())
    return isinstance(rows, list) and any(row.get("bench") in BENCHES for row in rows)


def is_like(row: Row, **wanted: object) -> bool:
    """Whether a row has these values."""
    return all(row[name] == value for name, value in wanted.items())


def parts_of(row: Row) -> list[str]:
    """Return the name of a row's backend and its ways."""
    return str(row["backend"]).replace(" (te)", "").split("+")


def one_layer(each: Found) -> bool:
    """Whether a row is of one layer on one GPU with balanced routing."""
    return is_like(each.row, bench="layer", ep=1, routing="balanced")


def host_of(each: Found) -> str:
    """Return what stands for the host of a row: the start of its machine, or else its date."""
    start, date = each.row["start"], each.row["date"]
    return f"{date}" if start is None else f"{date}, start {start}"


def case_of(each: Found) -> str:
    """Return what a row of the loop is a case of: model, layout, routing, cards."""
    row = each.row
    forced = ", forced balance" if row["routing"] == "forced balance" else ""
    return f"{row['shape']}, {row['op']}{forced}, {row['ep']} x {row['device']}"


def cases(found: Iterable[Found]) -> dict[str, list[Found]]:
    """Return the rows of the loop by case; a case over several hosts is one of each."""
    groups: dict[str, dict[str, list[Found]]] = {}
    for each in found:
        groups.setdefault(case_of(each), {}).setdefault(host_of(each), []).append(each)
    return {
        case if len(hosts) == 1 else f"{case}, {host}": own
        for case, hosts in groups.items()
        for host, own in hosts.items()
    }


def tokens_per_second(each: Found) -> float:
    """Return the speed of a row of the loop."""
    return float(each.row["tokens_per_second"])


def floor(found: Iterable[Found], precision: str) -> float | None:
    """Return the floor of a shape, where any of its rows has one."""
    floors = (f.floor() for f in found if f.row["precision"] == precision)
    return next((each for each in floors if each is not None), None)


def gains(found: list[Found]) -> dict[str, float | None]:
    """Return a shape's times in bf16 over those in FP8, of each side's best, and of the floors."""
    sides: dict[str, Callable[[str], Wanted]] = {
        "ours, in a graph": lambda precision: ours(precision, True),
        "ours, launched by the host": lambda precision: ours(precision, False),
        "Megatron": megatron,
    }
    pairs = {name: [best(found, side(p)) for p in PRECISIONS] for name, side in sides.items()}
    times = {name: [each.ms if each else None for each in pair] for name, pair in pairs.items()}
    times["by the floors"] = [floor(found, precision) for precision in PRECISIONS]
    return {name: a / b if a and b else None for name, (a, b) in times.items()}


Wanted = Callable[[Row], bool]


def best(found: Iterable[Found], wanted: Wanted) -> Found | None:
    """Return the fastest row that is wanted."""
    return min((each for each in found if wanted(each.row)), key=lambda e: e.ms, default=None)


def ours(precision: str, graph: bool | None = None, **more: object) -> Wanted:
    """Return what finds our rows: bf16, or FP8 by rows; in a graph, not in one, or both."""
    backend = OURS if precision == "bf16" else f"{OURS}+rowwise"
    whole = {"backend": backend, "precision": precision, **more}
    whole |= {} if graph is None else {"graph": graph}
    return lambda row: is_like(row, **whole)


def our_loop(precision: str, layers: bool | None = None, **more: object) -> Wanted:
    """Return what finds our rows of Megatron's loop: with a graph of each layer, without, or both.

    `more` are fields and values of the rows.
    """

    def wanted(row: Row) -> bool:
        name, *ways = row["backend"].split("+")
        asked = layers is None or (OUR_WAYS[LAYERS] in ways) is layers
        return name == OURS and asked and is_like(row, precision=precision, **more)

    return wanted


def megatron(precision: str, as_it_is: bool = False) -> Wanted:
    """Return what finds Megatron's rows that drop nothing."""

    def wanted(row: Row) -> bool:
        name, *ways = parts_of(row)
        plain = "defaults" in ways and "cutlass" not in ways
        return (
            name == "megatron"
            and row["precision"] == precision
            and DROPPING not in ways
            and (plain or not as_it_is)
        )

    return wanted


def dropping(row: Row) -> bool:
    """Whether a row is of Megatron with a capacity, which drops rows where loads are uneven."""
    name, *ways = parts_of(row)
    return name == "megatron" and DROPPING in ways and row["precision"] == "bf16"


def peers(precision: str, names: tuple[str, ...]) -> Wanted:
    """Return what finds rows of these peers."""

    def wanted(row: Row) -> bool:
        name = row["backend"].split("+")[0]
        return name in names and row["precision"] == precision

    return wanted


def others(row: Row) -> bool:
    """Whether a row is of a peer without a column of its own, in bf16."""
    name = row["backend"].split("+")[0]
    return name not in (*THEIRS, OURS) and row["precision"] == "bf16"


def repeat(row: Row) -> str:
    """Return the command that measures a row again."""
    name, *ways = parts_of(row)
    cutlass = "NVTE_USE_CUTLASS_GROUPED_GEMM=1 " if "cutlass" in ways else ""
    graph = ["--cuda-graph"] if row["graph"] else []
    if row["bench"] == "train":
        return _train(row, name, ways)
    words = ["--shapes", row["shape"], "--precision", row["precision"]]
    words += ["--routing", row["routing"], "--gradients", row["gradients"]]
    words += ["--warm", "5", "--repeats", "20"]
    if row["bench"] == "layer":
        words = ["ep-plugin", "bench", "layer", *words, "--backends", name, *graph]
        return cutlass + shlex.join(words)
    start = ["torchrun", "--nproc-per-node", str(row["ep"]), "-m", "ep_plugin.cli", "bench"]
    words = [*start, "overlap", *words]
    if name == OURS:
        recipe = [*ways, "off"][0]
        return shlex.join([*words, "--recipes", recipe, "--dispatchers", row["dispatcher"], *graph])
    return cutlass + shlex.join([*words, "--backends", name])


def _train(row: Row, name: str, ways: list[str]) -> str:
    """Return the command of benchmarks/train_ep.py; Megatron's sides are named as its ways are."""
    recipes = [way for way in ways if way in ("delayed", "blockwise")]
    side = "-".join([name, *(way for way in ways if way not in recipes)])
    if name == OURS:
        plain = "graph" if row["graph"] else name
        side = next((side for side, way in OUR_WAYS.items() if way in ways), plain)
    model, *rest = str(row["shape"]).split(", ")
    words = ["--ranks", str(row["ep"]), "--model", model, "--layouts", str(row["op"])]
    for part in rest:
        number = next(word for word in part.split() if word.isdigit())
        words += ["--num-layers" if "layers" in part else "--micro-batch", number]
    words += ["--precision", row["precision"], "--sides", side]
    words += ["--fp8-recipe", recipes[0]] if recipes else []
    words += ["--force-balance"] if row["routing"] == "forced balance" else []
    words += shlex.split(row.get("run") or "")  # rows of before it was kept do not say
    return shlex.join(["python", "benchmarks/train_ep.py", *words])


def versions(row: Row) -> str:
    """Return the versions that matter to a row."""
    kept = row["versions"]
    peer = parts_of(row)[0]
    names = ["torch", "triton", *(["ep-plugin"] if peer == OURS else [])]
    if peer == "megatron" or row["bench"] == "train":
        names += ["megatron-core", "transformer-engine"]
    elif peer not in ("torch", OURS):
        names.append(PACKAGES.get(peer, peer))
    return ", ".join(f"{name} {kept[name]}" for name in names if name in kept)
