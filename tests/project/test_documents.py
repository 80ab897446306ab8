"""README and documents name what there is: flags, files, links; and figures are those measured."""

import argparse
import functools
import itertools
import json
import re
from pathlib import Path

import pytest
from documents import BLOCKS, DOCUMENTS, FENCE, README, ROOT, megatron_parser

from ep_plugin.cli import COMMANDS, build_parser

PLACEHOLDER = r"NAME|X_Y|MODEL_TYPE"  # part of a file's name that a reader fills in
# flags of programs that are not ours nor Megatron's -> the program
FOREIGN = {
    "--strict": "mypy",
    "--standalone": "torchrun",
    "--nproc-per-node": "torchrun",
    "--no-python": "torchrun",
    "--nnodes": "torchrun",
    "--rdzv-backend": "torchrun",
    "--rdzv-endpoint": "torchrun",
    "--no-build-isolation": "pip",
    "--editable": "pip",
    "--no-deps": "pip",
    "--local-dir": "hf",
    "--nodes": "sbatch",
    "--table": "tests/helpers/support_matrix.py",
    "--quick": "tests/run.sh",
    "--cases": "tests/hostile/__main__.py",
    "--commands": "tests/hostile/__main__.py",
    "--record": "tests/hostile/__main__.py",
    "--number": "tests/hostile/__main__.py",
    "--verbose": "tests/hostile/__main__.py",
    "--releases": "tests/run.sh",
    **dict.fromkeys(
        [
            "--ranks",
            "--model",
            "--layouts",
            "--sides",
            "--force-balance",
            "--sequence",
            "--batch",
            "--iterations",
            "--seeds",
        ],
        "benchmarks/train_ep.py",
    ),
}


@functools.cache
def known_flags() -> frozenset[str]:
    parsers = [megatron_parser()]
    for command in set(COMMANDS) - {"run"}:  # whose flags are the script's
        actions = build_parser(command)._actions
        parsers += [
            a.choices[command] for a in actions if isinstance(a, argparse._SubParsersAction)
        ]
    ours = itertools.chain(*(parser._option_string_actions for parser in parsers))
    return frozenset([*ours, *FOREIGN, "--version"])


@pytest.mark.megatron
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_that_is_named_exists(path: Path) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9](?![\w-])", path.read_text()))
    assert not named - known_flags()


def test_flags_of_our_own_scripts_exist() -> None:
    for flag, program in FOREIGN.items():
        if "/" in program:
            assert flag in (ROOT / program).read_text(), (flag, program)


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        assert not target.startswith("http"), "documents stand for themselves"
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(path: Path) -> None:
    text = FENCE.sub("", path.read_text())
    top = "ep_plugin|recipes|benchmarks|tests|patches|docs"
    for name in re.findall(rf"`((?:{top})/[\w./-]+)`", text):
        if not re.search(PLACEHOLDER, name):
            assert (ROOT / name).exists(), name
    for name in re.findall(r"`(test_\w+\.py)`", text):
        assert list((ROOT / "tests").rglob(name)), name


def test_the_tree_of_the_architecture_exists() -> None:
    """Files and folders of the tree, one level of indentation a folder."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    tree = next(b.text for b in BLOCKS if b.text.startswith("ep_plugin/"))
    folder = ROOT / "ep_plugin"
    for line in filter(None, tree.splitlines()[1:]):
        indent = len(line) - len(line.lstrip())
        base = folder if indent == 4 else ROOT / "ep_plugin"
        for word in line.split():
            if not word.endswith((".py", "/")):
                break
            assert (base / word).exists(), line
            if indent == 2 and word.endswith("/"):
                folder = ROOT / "ep_plugin" / word
    for path in (ROOT / "ep_plugin").iterdir():
        if path.is_dir() and path.name != "__pycache__":
            assert f"\n  {path.name}/ " in tree, path.name
    for path in (ROOT / "ep_plugin" / "megatron").iterdir():
        if path.is_dir() and path.name != "__pycache__":
            assert f"\n    {path.name}/ " in tree, path.name
    steps = re.findall(r"<!-- walk: token -->\n```text\n(.*?)```", text, re.DOTALL)[0]
    for line in steps.splitlines():
        assert (ROOT / "ep_plugin" / line.split()[0]).is_file(), line


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_are_ascii(path: Path) -> None:
    assert path.read_text().isascii()


def rows(name: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(
        (ROOT / "benchmarks" / "results" / f"{name}.json").read_text()
    )
    return found


def test_figures_of_the_readme_are_those_measured() -> None:
    text = README.read_text()
    text = " ".join(text.split())

    def layer(shape: str, side: str, graph: bool, dropping: bool = False) -> list[float]:
        """Return a side's fastest way in bf16 and in FP8."""
        found: dict[object, list[float]] = {}
        for row in rows("peers_h200"):
            ways = set(str(row["backend"]).split("+"))
            wanted = {"shape": shape, "gradients": "added", "graph": graph, "routing": "balanced"}
            of_side = side in ways and "save_fp8" not in ways
            if of_side and ("drop_and_pad" in ways) is dropping and wanted.items() <= row.items():
                found.setdefault(row["precision"], []).append(float(str(row["ms"])))
        return [min(times) for _, times in sorted(found.items())]

    large, small = (
        [
            *(*layer(shape, "ep_plugin", False), *layer(shape, "ep_plugin", True)),
            *(*layer(shape, "megatron", False), *layer(shape, "megatron", True, dropping=True)),
        ]
        for shape in ("dsv3", "q3-30b")
    )
    assert (
        "**{:.1f} ms in bf16 and {:.1f} in FP8**, in a CUDA graph {:.1f} and {:.2f}; Megatron's "
        "fastest way that drops nothing {:.1f} and {:.1f}, with drop-and-pad in a graph {:.1f}. "
    ).format(*large) in text
    assert (
        "Qwen3-30B-A3B's {:.2f} and {:.2f}, in a graph {:.2f} and {:.2f}; Megatron's {:.1f} and "
        "{:.1f}, which wait for the host, with drop-and-pad in a graph {:.2f} "
    ).format(*small) in text

    nearest = [layer(shape, "torchtitan", True)[0] for shape in ("dsv3", "q3-30b")]
    assert "torchtitan's compiled layer, {:.1f} and {:.2f} in a graph.".format(*nearest) in text

    def speed(many: int, side: str, file: str, day: str = "", graph: bool = False) -> float:
        """Return the most tokens per second, of Megatron's ways those that drop nothing."""
        return max(
            float(str(row["tokens_per_second"]))
            for row in rows(file)
            if row["shape"] == f"qwen3-30b-a3b, 4 layers, micro-batch {many}"
            and (row["precision"], row["routing"], row["graph"]) == ("bf16", "natural", graph)
            and re.fullmatch(side, str(row["backend"]))
            and str(row["date"]).startswith(day)
        )

    graphs, older, own = "loop_graphs_h200", "loop_h200", "ep_plugin"
    layers, megatron = rf"{own}\+layers", r"megatron(?!.*drop_and_pad).*"
    two, dropping = speed(2, layers, graphs), speed(2, r".*drop_and_pad.*", graphs, graph=True)
    assert (
        f"**{two / speed(2, megatron, graphs):.1f} times the speed of Megatron's partial graphs on "
        f"the same host**, {two / speed(2, megatron, older):.1f} times their best on any host, "
        f"{two / dropping:.1f} times its whole iteration with drop-and-pad, at two sequences."
    ) in text
    launched = [
        speed(many, own, file, day) / speed(many, megatron, file, day)
        for many, file, day in ((1, older, ""), (2, older, "2026-11-29"), (4, older, ""))
    ]
    launched.append(speed(2, own, graphs) / speed(2, megatron, graphs))
    least, most = (f"{edge(launched):.1f}" for edge in (min, max))
    assert f"Launched by the host it is {least} to {most} times as fast as Megatron's" in text
