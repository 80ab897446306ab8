"""Make the tables and pictures of docs/benchmarks.md from the rows of benchmarks/results.

python benchmarks/bench_page.py            writes them, and docs/benchmark-rows.md
python benchmarks/bench_page.py --check    says whether they are the rows'; pictures are not read

Tables stand between `<!-- rows: NAME -->` and `<!-- end of rows -->`; what is around them is
written by hand. New files of results are taken in: of a card, a shape and a way the fastest row
counts, of the newest file. docs/benchmark-rows.md names each row that a table shows, and the
command that repeats it.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import forecast_errors
import room
import several_nodes
from bench_rows import (
    RESULTS,
    Found,
    best,
    cases,
    dropping,
    floor,
    gains,
    is_like,
    load,
    megatron,
    newest,
    one_layer,
    others,
    our_loop,
    ours,
    peers,
    repeat,
    tokens_per_second,
    versions,
)

from ep_plugin.commands.bench.figures import identity
from ep_plugin.commands.bench.floors import H100, PRECISIONS, Gradients, Work, floor_ms
from ep_plugin.commands.bench.shapes import SHAPES
from ep_plugin.written import write_whole

ROOT = Path(__file__).parents[1]
PAGE, ROWS, NETWORK, NODES = (
    ROOT / "docs" / f"{name}.md"
    for name in ("benchmarks", "benchmark-rows", "communication", "several-nodes")
)
BLOCK = re.compile(r"(<!-- rows: (\w+) -->\n).*?(<!-- end of rows -->)", re.DOTALL)
Column = tuple[str, Callable[[list[Found]], Found | None]]
GRADIENTS: dict[Gradients, str] = {
    "anew": "weight gradients made anew",
    "added": "weight gradients added to fp32 totals",
}


class Page:
    """Tables as they are made, and the rows that stand behind them."""

    def __init__(self, found: list[Found]) -> None:
        self.all, self.found = found, newest(found)
        self.used: dict[str, Found] = {}

    def cell(self, each: Found | None, digits: int = 1) -> str:
        """Return a row's milliseconds, and remember the row."""
        if each is None:
            return "-"
        self.remember(each)
        return f"{each.ms:.{digits if each.ms >= 10 else 2}f}"

    def remember(self, each: Found) -> None:
        self.used[json.dumps([*identity(each.row), each.file])] = each

    def layer(self) -> str:
        """One layer on one GPU: a table for each card, kind of gradients, and in a graph or not."""
        columns: list[Column] = [
            ("ours bf16", lambda f: best(f, ours("bf16"))),
            ("ours FP8", lambda f: best(f, ours("fp8"))),
            ("torch bf16", lambda f: best(f, peers("bf16", ("torch",)))),
            ("Megatron bf16, as it comes", lambda f: best(f, megatron("bf16", True))),
            ("Megatron bf16, fastest of those run", lambda f: best(f, megatron("bf16"))),
            ("Megatron FP8, fastest of those run", lambda f: best(f, megatron("fp8"))),
            ("Megatron bf16, drop-and-pad", lambda f: best(f, dropping)),
            ("best other, bf16", lambda f: best(f, others)),
        ]
        rows = [f for f in self.found if one_layer(f)]
        tables = [
            self._tables([f for f in rows if f.row["graph"] is graph], columns, _floors, launched)
            for graph, launched in ((False, ", launched by the host"), (True, ", in a CUDA graph"))
        ]
        return "\n\n".join(tables)

    def two_gpus(self) -> str:
        """The layer over ranks: a table for each card, number of ranks and kind of gradients."""
        graph = {"dispatcher": "symm_mem"}
        columns: list[Column] = [
            ("ours bf16, graph", lambda f: best(f, ours("bf16", True, **graph))),
            ("ours FP8, graph", lambda f: best(f, ours("fp8", True, **graph))),
            ("ours bf16, the host launches", lambda f: best(f, ours("bf16", False))),
            ("ours FP8, the host launches", lambda f: best(f, ours("fp8", False))),
            ("Megatron bf16, as it comes", lambda f: best(f, megatron("bf16", True))),
            ("Megatron bf16, fastest of those run", lambda f: best(f, megatron("bf16"))),
            ("Megatron FP8, fastest of those run", lambda f: best(f, megatron("fp8"))),
            ("best other, bf16", lambda f: best(f, others)),
        ]
        rows = [f for f in self.found if is_like(f.row, bench="overlap", routing="balanced")]
        return self._tables(rows, columns, partial(_left, self.all))

    def _tables(
        self,
        rows: list[Found],
        columns: list[Column],
        last: Callable[[list[Found]], tuple[str, str]],
        launched: str = "",
    ) -> str:
        """Return a table for each group of rows; columns without a figure are left out."""
        groups: dict[tuple[str, int, str, str], list[Found]] = {}
        for each in rows:
            key = each.row["device"], each.row["ep"], each.row["gradients"], each.file
            groups.setdefault(key, []).append(each)
        out = []
        for (device, ep, gradients, file), members in sorted(groups.items()):
            shapes = [name for name in SHAPES if any(m.row["shape"] == name for m in members)]
            table, titles = [], [title for title, _ in columns]
            for shape in shapes:
                own = [m for m in members if m.row["shape"] == shape]
                picked = [pick(own) for _, pick in columns]
                if sum(each is not None for each in picked) > 1:
                    title, value = last(own)
                    table.append([shape, *map(self.cell, picked), value])
            if not table:
                continue
            kept = [i for i, _ in enumerate(titles) if any(r[i + 1] != "-" for r in table)]
            head = ["shape", *(titles[i] for i in kept), title]
            body = [[r[0], *(r[i + 1] for i in kept), r[-1]] for r in table]
            ranks = f", EP {ep}" if ep > 1 else ""
            link = f"[{file}](../benchmarks/results/{file})"
            title = f"{device}{ranks}{launched}, {GRADIENTS[gradients]}, ms ({link}):"
            out.append(f"{title}\n\n{_markdown(head, body)}")
        return "\n\n".join(out)

    def loop(self) -> str:
        """Megatron's loop: tokens per second of all GPUs, a line for each host."""
        rows = [f for f in self.found if f.row["bench"] == "train"]
        ways = ("launched", "a graph of each layer", "one graph")
        kinds = [("bf16", way) for way in ways] + [("fp8", way) for way in ways]
        names = {"bf16": "ours", "fp8": "ours FP8"}
        head = ["model, layout, card", *(f"{names[kind]}, {way}" for kind, way in kinds)]
        head += [
            "Megatron bf16, as it comes",
            "Megatron bf16, fastest that drops nothing",
            "Megatron FP8, fastest of those run",
            "Megatron bf16, drop-and-pad",
        ]
        head += ["ours over that, bf16"]
        body = []
        for key, own in cases(rows).items():
            picked = [
                best(own, our_loop(precision, layers=way == ways[1], graph=way == ways[2]))
                for precision, way in kinds
            ]
            theirs = [best(own, megatron("bf16", True)), best(own, megatron("bf16"))]
            picked += [*theirs, best(own, megatron("fp8")), best(own, dropping)]
            for each in filter(None, picked):
                self.remember(each)
            speeds = [f"{tokens_per_second(each):,.0f}" if each else "-" for each in picked]
            mine = best(own, our_loop("bf16"))
            ratio = (
                f"{tokens_per_second(mine) / tokens_per_second(theirs[1]):.2f}"
                if mine and theirs[1]
                else "-"
            )
            body.append([key, *speeds, ratio])
        return _markdown(head, body)

    def fp8(self) -> str:
        """What FP8 brings: times in bf16 over those in FP8, of each side's best."""
        rows = [f for f in self.found if one_layer(f) and f.row["gradients"] == "anew"]
        head, body = list[str](), []
        for device in sorted({f.row["device"] for f in rows}):
            for shape in SHAPES:
                own = [f for f in rows if is_like(f.row, shape=shape, device=device)]
                found = gains(own)
                head = ["shape, card", *found]
                if any(gain for name, gain in found.items() if name != "by the floors"):
                    shown = [f"{gain:.2f}" if gain else "-" for gain in found.values()]
                    body.append([f"{shape}, {device}", *shown])
        return _markdown(head, body)

    def floors(self) -> str:
        """The floor of each shape at the rates assumed of one H100."""
        head = ["shape", *(f"{GRADIENTS[kind]}, bf16 / FP8" for kind in ("anew", "added"))]
        body = [
            [name]
            + [
                " / ".join(f"{floor_ms(Work(shape, p, kind), H100):.2f}" for p in PRECISIONS)
                for kind in GRADIENTS
            ]
            for name, shape in SHAPES.items()
            if name != "tiny"
        ]
        return _markdown(head, body)

    def over(self) -> str:
        """Our layer over its floor, where the run that measured it measured the rates too."""
        ways = list(product(("added", "anew"), (False, True)))
        head = [
            "shape, card",
            *(f"{kind}, {'in a graph' if g else 'launched'}" for kind, g in ways),
        ]
        rows = [f for f in self.found if one_layer(f) and f.row["rates"]]
        body = []
        for device, shape in product(sorted({f.row["device"] for f in rows}), SHAPES):
            cells = []
            for gradients, graph in ways:
                same = {"device": device, "shape": shape, "gradients": gradients}
                own = [f for f in rows if is_like(f.row, **same)]
                mine = [best(own, ours(precision, graph)) for precision in PRECISIONS]
                ratios = [f"{f.ms / at:.2f}" if f and (at := f.floor()) else "-" for f in mine]
                cells.append(" / ".join(ratios))
            if any(cell != "- / -" for cell in cells):
                body.append([f"{shape}, {device}", *cells])
        return _markdown(head, body)

    def absent(self) -> str:
        """Peers without a row, their own figures, and why."""
        rows = json.loads((RESULTS / "published.json").read_text())
        names = ("peer", "figure", "shape", "source", "why")
        head = ["peer", "its own figure", "of", "source", "why it has no row here"]
        return _markdown(head, [[row[name] for name in names] for row in rows])

    def rows(self) -> str:
        """Return docs/benchmark-rows.md."""
        head = ["row", "figure", "card", "file", "date", "versions", "switches", "again by"]
        body = []
        for each in sorted(self.used.values(), key=lambda e: (e.row["bench"], repeat(e.row))):
            row = each.row
            way = [row["backend"], row["dispatcher"], row["schedule"], "graph" * row["graph"]]
            way += [row["routing"]] if row["routing"] not in ("balanced", "natural") else []
            name = " ".join(filter(None, (row["bench"], row["shape"], row["op"], *way)))
            figure = f"{each.ms:.2f} ms"
            if row["bench"] == "train":
                speed, attention = tokens_per_second(each), row.get("attention") or "-"
                figure = f"{speed:,.0f} tokens/s, attention {attention}"
            told = [versions(row), each.switches(), f"`{repeat(row)}`"]
            body.append([name, figure, row["device"], each.file, row["date"], *told])
        title = "# Rows behind the tables\n\nBy `python benchmarks/bench_page.py`; see "
        return f"{title}[benchmarks.md](benchmarks.md).\n\n{_markdown(head, body)}\n"


def _floors(own: list[Found]) -> tuple[str, str]:
    """Return the floors of a shape in bf16 and FP8."""
    floors = [floor(own, precision) for precision in ("bf16", "fp8")]
    return "floor bf16 / FP8", " / ".join(f"{ms:.1f}" if ms else "-" for ms in floors)


def _left(found: list[Found], own: list[Found]) -> tuple[str, str]:
    """Return what is left of one rank's speed, of ours in a graph in bf16 and FP8."""
    shown, like = [], own[0].row
    same = {name: like[name] for name in ("shape", "device", "gradients", "routing")}
    found = [each for each in found if each.file == own[0].file]  # another card is no measure
    for precision in ("bf16", "fp8"):
        alone = [f for f in found if is_like(f.row, **same, ep=1, bench="layer")]
        one = best(alone, ours(precision, True))
        many = best(own, ours(precision, True))
        shown.append(f"{one.ms / many.ms:.2f}" if one and many else "-")
    return "of one rank's speed, bf16 / FP8", " / ".join(shown)


def _markdown(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def made(text: str, tables: dict[str, str]) -> str:
    """Return a document with its tables made anew."""
    return BLOCK.sub(lambda m: f"{m[1]}\n{tables[m[2]]}\n\n{m[3]}", text)


def main() -> int:
    """Write all, or compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    page = Page(load())
    names = ("floors", "over", "layer", "two_gpus", "loop", "fp8", "absent")
    tables = {name: getattr(page, name)() for name in names}
    tables["forecast"] = forecast_errors.table()
    tables["nodes"] = several_nodes.table()
    tables["room"] = room.table()
    texts = {path: made(path.read_text(), tables) for path in (PAGE, NETWORK, NODES)}
    texts[ROWS] = page.rows()
    stale = [p.name for p, text in texts.items() if not p.exists() or p.read_text() != text]
    if args.check:
        print(f"not those of the rows: {', '.join(stale)}" if stale else "as the rows are")
        return 1 if stale else 0
    import bench_pictures  # matplotlib is needed to draw alone

    for path, text in texts.items():
        write_whole(path, text)
    bench_pictures.write(page.found, ROOT / "docs" / "pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
