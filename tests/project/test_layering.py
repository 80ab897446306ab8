"""Who may import whom: every file's imports, held against the storeys.

python tests/project/test_layering.py prints the parts of the house, top storey first, and below
each the parts that it imports; --dot prints the same for graphviz, --upward only arrows that run
up (none).
"""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2] / "ep_plugin"


class Storey(NamedTuple):
    """What a part of the house may import: of ours, by prefix, and of others."""

    ours: str = ""
    others: str = ""


SETTINGS = "moe.config moe.routing_config moe.rules moe.parallel"
GROUND = "errors extras registry sources typed typed_words untrusted written"
# The longest prefix of a module's name that stands here says what it may import. Everything may
# import the ground, and what lies in its part.
STOREYS = {
    # the ground
    "": Storey(SETTINGS + " moe.groups moe.layer"),
    "errors": Storey(),
    "untrusted": Storey(),
    "typed": Storey(),
    "typed_words": Storey(),
    "extras": Storey(),
    "sources": Storey(),
    "registry": Storey(),
    "written": Storey("untrusted", "matplotlib"),
    # storey 1: the layer; ground to top
    "moe": Storey(),
    "moe.routing_config": Storey(),
    "moe.rules": Storey("moe.routing_config"),
    "moe.config": Storey("moe.routing_config moe.rules"),
    "moe.parallel": Storey("moe.config"),
    "moe.auto": Storey("moe.config moe.parallel moe.rules"),
    "moe.groups": Storey(SETTINGS, "torch"),
    "moe.interfaces": Storey("moe.groups", "torch"),
    "moe.e4m3": Storey("", "torch"),
    "moe.watch.place": Storey(),
    "moe.watch.blame": Storey("moe.watch.place"),
    "moe.watch": Storey("moe.watch.place moe.watch.blame", "torch"),
    "moe.kernels": Storey(f"{SETTINGS} moe.e4m3", "torch triton"),
    "moe.rows": Storey("moe.kernels", "torch"),
    "moe.replicas": Storey("moe.interfaces moe.groups moe.rows", "torch"),
    "moe.router": Storey(f"{SETTINGS} moe.interfaces moe.groups moe.kernels", "torch"),
    "moe.dispatcher": Storey(
        f"{SETTINGS} moe.interfaces moe.groups moe.kernels moe.rows moe.watch.place",
        "torch deep_ep",
    ),
    "moe.experts": Storey(
        f"{SETTINGS} moe.interfaces moe.groups moe.e4m3 moe.kernels moe.rows",
        "torch transformer_engine deep_gemm",
    ),
    "moe.schedule": Storey(
        f"{SETTINGS} moe.interfaces moe.kernels moe.rows moe.experts moe.watch.place", "torch"
    ),
    "moe.layer": Storey(
        f"{SETTINGS} moe.auto moe.interfaces moe.groups moe.replicas moe.router moe.dispatcher "
        "moe.experts moe.schedule moe.watch.place",
        "torch",
    ),
    # public names of what lies in storey 1
    "config": Storey("moe"),
    "contracts": Storey("moe"),
    "groups": Storey("moe"),
    "router": Storey("moe"),
    "overlap": Storey("moe"),
    # beside it, as data
    "presets": Storey(SETTINGS),
    # storey 2: files of ours and of others
    "checkpoint": Storey(
        f"{SETTINGS} presets", "torch tqdm safetensors transformers sentencepiece tokenizers"
    ),
    # storey 3: the only part that imports Megatron
    "megatron": Storey("moe presets checkpoint", "torch megatron transformer_engine tiktoken"),
    # storey 4
    "commands": Storey(
        "moe presets checkpoint megatron",
        # the last ones are peers, and what draws
        "torch tqdm transformers safetensors tensorboard matplotlib "
        "megatron transformer_engine sonicmoe liger_kernel deep_gemm deep_ep torchtitan deepspeed "
        "veomni",
    ),
    # the doors
    "run": Storey("megatron"),
    "model_class": Storey("megatron"),
    "cli": Storey("commands run"),
}
OPTION_FOLDERS = (
    "moe.router",
    "moe.dispatcher",
    "moe.schedule",
    "moe.experts.gemm",
    "moe.experts.fp8",
    "presets",
    "checkpoint.families",
    "checkpoint.formats",
    "checkpoint.adapt.modes",
    "commands.bench.peers",
)


class Import(NamedTuple):
    """One import; `lazy` when it is inside a function."""

    target: str
    lazy: bool


def imports_of(source: str) -> set[Import]:
    """Return all imports of a file, `import_module("...")` of a constant name included."""
    found: set[Import] = set()

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return  # for types alone
        if isinstance(node, ast.Import):
            found.update(Import(alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            found.update(Import(f"{node.module}.{alias.name}", lazy) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            constant = [name.value for name in node.args if isinstance(name, ast.Constant)]
            found.update(Import(str(name), lazy) for name in constant)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy)

    visit(ast.parse(source), False)
    return found


def module_name(path: Path) -> str:
    """Return a file's dotted name below ep_plugin; "" for ep_plugin itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
IMPORTS = {name: imports_of(path.read_text()) for name, path in MODULES.items()}


def ours(name: str) -> set[Import]:
    """Return which modules of ours a module imports, by their names below ep_plugin."""
    found = set()
    for target, lazy in IMPORTS[name]:
        head, _, below = target.partition(".")
        while below and below not in MODULES:  # a name inside a module
            below = below.rpartition(".")[0]
        if head == "ep_plugin":
            found.add(Import(below, lazy))
    return found


def part_of(name: str) -> str:
    """Return the longest prefix of a module's name that has a storey."""
    while name not in STOREYS:
        name = name.rpartition(".")[0]
    return name


def within(name: str, prefixes: str) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes.split())


def arrows() -> set[tuple[str, str]]:
    """Return every import of one module of ours by another."""
    return {(name, target) for name in MODULES for target, _ in ours(name) if target != name}


def test_the_walk_sees_every_kind_of_import() -> None:
    source = (
        "import a.b as c\nfrom d.e import f, g\nif c:\n    import h\nclass K:\n    import i\n"
        "def j():\n    from k import l\n    importlib.import_module('m.n')\n    import_module(x)\n"
    )
    eager = {Import(name, False) for name in ("a.b", "d.e.f", "d.e.g", "h", "i")}
    assert imports_of(source) == eager | {Import("k.l", True), Import("m.n", True)}


def test_every_storey_has_a_module() -> None:
    assert set(STOREYS) <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_of_ours_keep_to_their_storey(name: str) -> None:
    part = part_of(name)
    allowed = f"{GROUND} {part} {STOREYS[part].ours}"
    refused = {t for t, _ in ours(name) if t and not within(t, allowed)}
    assert not refused


def test_no_part_reaches_itself_through_others() -> None:
    above = {part: set[str]() for part in STOREYS}
    for name, target in arrows():
        if target and part_of(name) != part_of(target):
            above[part_of(name)].add(part_of(target))
    order = list(graphlib.TopologicalSorter(above).static_order())  # CycleError names the circle
    assert set(order) == set(STOREYS)


def circle(edges: set[tuple[str, str]]) -> list[str]:
    """Return modules that import each other in a circle; empty when there is none."""
    below: dict[str, set[str]] = {}
    for name, target in edges:
        below.setdefault(name, set()).add(target)
    try:
        graphlib.TopologicalSorter(below).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_no_file_reaches_itself_through_others() -> None:
    """Imports inside functions count. The package itself has only names, loaded on first use."""
    assert circle({(name, target) for name, target in arrows() if name and target}) == []


@given(st.integers(2, 6), st.sets(st.tuples(st.integers(0, 9), st.integers(0, 9))))
def test_a_circle_is_seen(length: int, more: set[tuple[int, int]]) -> None:
    ring = {(str(place), str((place + 1) % length)) for place in range(length)}
    downward = {(str(a), str(b)) for a, b in more if a < b}
    assert circle(downward) == []
    assert circle(downward | ring)


@pytest.mark.parametrize("name", MODULES)
def test_imports_of_others_keep_to_their_storey(name: str) -> None:
    allowed = {"ep_plugin", *sys.stdlib_module_names, *STOREYS[part_of(name)].others.split()}
    assert {i.target.partition(".")[0] for i in IMPORTS[name]} <= allowed


@pytest.mark.parametrize("name", [name for name in MODULES if not within(name, "megatron")])
def test_megatron_is_reached_only_from_inside_functions(name: str) -> None:
    """But for what is light: see `LIGHT`."""
    reached = {i for i in ours(name) if within(i.target, "megatron")}
    assert all(i.lazy or f".{i.target}" in LIGHT for i in reached)


@pytest.mark.parametrize("name", MODULES)
def test_options_do_not_know_each_other_and_helpers_are_private(name: str) -> None:
    folder = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for target, _ in ours(name):
        home, _, last = target.rpartition(".")
        is_helper = last.startswith("_")
        assert home == folder or not is_helper, f"{target} is private to {home}"
        if home == folder and folder in OPTION_FOLDERS:
            assert is_helper or target == name, f"{name} imports the option {target}"


def test_no_two_files_have_one_name() -> None:
    """But options of a choice, whose names are the users', and public names of what lies deeper."""
    public = ("config", "contracts", "groups", "model_class", "overlap", "router")
    found: dict[str, list[str]] = {}
    for name, path in MODULES.items():
        folder = name.rpartition(".")[0]
        if (
            path.name != "__init__.py"
            and folder not in OPTION_FOLDERS
            and not within(name, " ".join(public))
        ):
            found.setdefault(path.name, []).append(name)
    assert [names for names in found.values() if len(names) > 1] == []


LIGHT = (
    "",
    ".cli",
    ".commands.apply",
    ".commands.doctor",
    ".commands.plan",
    ".commands.presets",
    ".commands.recipes",
    ".megatron",
    ".megatron.arguments.flags_file",
    ".megatron.arguments.spell",
    ".megatron.arguments.spell_model",
    ".megatron.arguments.table",
    ".megatron.arguments.in_flags",
    ".moe.config",
    ".presets",
    ".registry",
    ".run",
    ".typed_words",
    ".untrusted",
)


@pytest.mark.parametrize("module", [f"ep_plugin{name}" for name in LIGHT])
def test_light_modules_import_no_torch(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "sys.exit(', '.join({'torch', 'numpy', 'megatron'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def parts_below() -> dict[str, set[str]]:
    """Return each part that has a storey, and which others it imports; the top storey first."""
    below: dict[str, set[str]] = {part: set() for part in reversed(STOREYS) if part}
    for name, target in arrows():
        if name and target and part_of(name) != part_of(target):
            below[part_of(name)].add(part_of(target))
    return below


def picture(arguments: list[str]) -> str:
    """Return the import graph of the storeys as text."""
    below = parts_below()
    order = list(below)
    if "--upward" in arguments:
        pairs = [(a, b) for a in below for b in below[a] if order.index(b) < order.index(a)]
        return "\n".join(f"{a} -> {b}" for a, b in pairs)
    if "--dot" in arguments:
        lines = [f'  "{a}" -> "{b}";' for a in below for b in sorted(below[a], key=order.index)]
        return "\n".join(["digraph ep_plugin {", "  rankdir=TB; node [shape=box];", *lines, "}"])
    shown = (f"{a}\n    {', '.join(sorted(below[a], key=order.index)) or '-'}" for a in below)
    return "\n".join(shown)


def test_no_arrow_runs_up() -> None:
    assert picture(["--upward"]) == ""


if __name__ == "__main__":
    print(picture(sys.argv[1:]))
