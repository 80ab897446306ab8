"""Who may import whom: a walk over every file's imports, compared with one table."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent / "ep_plugin"
OPTION_FOLDERS = (
    "router",
    "dispatcher",
    "overlap",
    "gemm",
    "presets",
    "fp8",
    "convert.families",
    "convert.formats",
    "convert.upcycling.modes",
    "bench.peers",
)


class Row(NamedTuple):
    """What a file or folder may import: of ours, and of others beside the standard library."""

    ours: str = ""
    others: str = ""


TABLE = {
    # the core: torch and nothing else
    "": Row("config parallel groups layer"),
    "contracts": Row("", "torch"),
    "errors": Row(),
    "routing_config": Row("errors"),
    "config": Row("errors routing_config"),
    "parallel": Row("config"),
    "registry": Row("config"),
    "groups": Row("config parallel", "torch"),
    "router": Row("contracts config groups kernels", "torch"),
    "dispatcher": Row("contracts config groups kernels permute", "torch deep_ep"),
    "gemm": Row("contracts config", "torch transformer_engine deep_gemm"),
    "autotune": Row("contracts config registry", "torch"),
    "e4m3": Row("", "torch"),
    "records": Row("", "torch"),
    "permute": Row("kernels", "torch"),  # on CUDA, from inside a function
    "replicas": Row("contracts groups permute", "torch"),
    "kernels": Row("config e4m3 permute", "torch triton"),
    "fp8": Row("contracts config e4m3 kernels records", "torch"),
    "fused_experts": Row("contracts config kernels records", "torch"),
    "experts": Row(
        "contracts config registry autotune groups permute kernels fp8 fused_experts", "torch"
    ),
    "overlap": Row("contracts config fused_experts kernels permute records", "torch"),
    "layer": Row("contracts config parallel registry groups experts replicas", "torch"),
    # beside the core
    "convert": Row("config presets registry", "torch tqdm safetensors transformers"),
    "audit": Row("config convert", "torch tqdm"),
    "parity": Row("config parallel presets convert", "torch tqdm"),
    "report": Row("config", "matplotlib tensorboard"),
    "presets": Row("config registry"),
    "plan": Row("config parallel presets", "matplotlib"),
    "bench": Row(
        "autotune config contracts e4m3 registry groups parallel kernels fp8 router overlap layer",
        # its peers, beside what it draws with
        "torch tqdm matplotlib megatron transformer_engine sonicmoe liger_kernel deep_gemm",
    ),
    # commands
    "pretrain_script": Row("config"),
    "codemod": Row("config pretrain_script"),
    "doctor": Row("config registry"),
    "cli": Row("config"),
    "run": Row("config"),
    # the edge: the only folder that imports Megatron
    "megatron": Row(
        "config parallel contracts groups registry router experts fused_experts records layer "
        "presets audit convert",
        "torch megatron",
    ),
}
# These reach the edge, from inside a function, when they are asked to.
REACH_THE_EDGE = {"run", "doctor", "convert.command", "convert.translation", "convert.verify"}


class Import(NamedTuple):
    """One import; `lazy` when it is inside a function."""

    target: str
    lazy: bool


def imports_of(source: str) -> set[Import]:
    """Return all imports of a file, `import_module("...")` of a constant name included."""
    found: set[Import] = set()

    def visit(node: ast.AST, lazy: bool) -> None:
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


def row_name(name: str) -> str:
    return name.partition(".")[0]


def test_the_walk_sees_every_kind_of_import() -> None:
    source = (
        "import a.b as c\nfrom d.e import f, g\nif c:\n    import h\nclass K:\n    import i\n"
        "def j():\n    from k import l\n    importlib.import_module('m.n')\n    import_module(x)\n"
    )
    eager = {Import(name, False) for name in ("a.b", "d.e.f", "d.e.g", "h", "i")}
    assert imports_of(source) == eager | {Import("k.l", True), Import("m.n", True)}


def test_every_module_has_a_row_and_every_row_a_module() -> None:
    assert {row_name(name) for name in MODULES} == set(TABLE)


@pytest.mark.parametrize("name", MODULES)
def test_imports_of_ours_follow_the_table(name: str) -> None:
    row = row_name(name)
    allowed = {"", "errors", "routing_config", row, *TABLE[row].ours.split()}
    assert {row_name(i.target) for i in ours(name)} - allowed <= (
        {"megatron"} if name in REACH_THE_EDGE else set()
    )


@pytest.mark.parametrize("name", MODULES)
def test_imports_of_others_follow_the_table(name: str) -> None:
    allowed = {"ep_plugin", *sys.stdlib_module_names, *TABLE[row_name(name)].others.split()}
    if name == "doctor":
        allowed.add("torch")  # asked whether it imports
    assert {row_name(i.target) for i in IMPORTS[name]} <= allowed


@pytest.mark.parametrize("name", [name for name in MODULES if row_name(name) != "megatron"])
def test_the_edge_is_reached_only_from_inside_functions(name: str) -> None:
    reached = {i for i in ours(name) if row_name(i.target) == "megatron"}
    assert all(i.lazy for i in reached)
    assert bool(reached) == (name in REACH_THE_EDGE)


@pytest.mark.parametrize("name", MODULES)
def test_options_do_not_know_each_other_and_helpers_are_private(name: str) -> None:
    folder = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for target, _ in ours(name):
        home, _, last = target.rpartition(".")
        is_helper = last.startswith("_")
        assert home == folder or not is_helper, f"{target} is private to {home}"
        if home == folder and folder in OPTION_FOLDERS:
            assert is_helper or target == name, f"{name} imports the option {target}"


LIGHT = (
    "",
    ".cli",
    ".codemod",
    ".config",
    ".doctor",
    ".megatron",
    ".presets",
    ".registry",
    ".run",
)


@pytest.mark.parametrize("module", [f"ep_plugin{name}" for name in LIGHT])
def test_light_modules_import_no_torch(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "sys.exit(', '.join({'torch', 'numpy', 'megatron'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
