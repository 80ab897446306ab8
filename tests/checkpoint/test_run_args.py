"""Run arguments that are missing or of another type: each ends in one sentence, or in a model."""

import ast
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ep_plugin
from ep_plugin.checkpoint.run_args import CHECKED, as_saved, check_counters, checked
from ep_plugin.cli import main
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.table import TABLE, Argument
from tests.commands.test_convert import convert, run_args, save_dense

ROOT = Path(ep_plugin.__file__).parent
NAMES = sorted(vars(run_args()))
READ = sorted({*NAMES, *CHECKED})
VALUES = (None, 0, -1, 2**60, 10**9, "4", "x", 4.0, True, [1], [], {}, "[1]*99999999", (1, 0))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(READ), value=st.sampled_from(VALUES), more=st.booleans(), hf=st.booleans()
)
def test_any_argument_may_be_anything(
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: Any,
    more: bool,
    hf: bool,
) -> None:
    root = tmp_path_factory.mktemp("args")
    changes = {name: value} | ({"num_experts": 8} if more and name != "num_experts" else {})
    save_dense(root / "dense", **changes)
    capsys.readouterr()
    if hf:
        flags = ["--format", "hf", "--skip-parity"]
        code = main(["convert", "--from", str(root / "dense"), "--to", str(root / "o"), *flags])
    else:
        code = convert(root / "dense", root / "o")
    said = capsys.readouterr().err
    assert code in (0, 2), said
    assert "Traceback" not in said
    assert main(["audit", str(root / "dense")]) in (0, 1, 2)
    assert "Traceback" not in capsys.readouterr().err
    shutil.rmtree(root)


@pytest.mark.parametrize("name", NAMES)
def test_an_argument_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    args = run_args()
    delattr(args, name)
    found = checked(args, tmp_path)
    assert getattr(found, name, "default") == "default"
    with pytest.raises(ConfigError, match=f"have no {name}"):
        getattr(found, name)


def test_what_is_saved_is_what_was_read(tmp_path: Path) -> None:
    args = run_args()
    saved = as_saved(checked(args, tmp_path))
    assert type(saved) is Namespace
    assert saved == args
    assert list(vars(saved)) == list(vars(args))


@pytest.mark.parametrize("row", [row for row in TABLE if row.kind and row.kind != "router"])
def test_a_module_of_ones_own_is_not_carried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Argument
) -> None:
    """Every option whose value a run imports; the router's has --router."""
    save_dense(tmp_path / "dense", **{row.dest: "their_package.module"})
    assert convert(tmp_path / "dense", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert f"{row.dest} = 'their_package.module', a module that would be imported" in said
    assert convert(tmp_path / "dense", tmp_path / "out", "--leave-out", row.dest) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("init_method_std", float("nan")),
        ("init_method_std", -0.1),
        ("rotary_base", float("inf")),
    ],
)
def test_numbers_are_finite(tmp_path: Path, name: str, value: float) -> None:
    args = run_args()
    setattr(args, name, value)
    with pytest.raises(ConfigError, match=f"have {name} = "):
        checked(args, tmp_path)


# Read elsewhere than by their name's kind -> where their values are checked.
ELSEWHERE = {
    "ep_router": "_with_router of open.py",
    "ep_vocab_size": "_without_padding of open.py",
}


def reads(source: str) -> set[str]:
    """Return what a file reads of run arguments: of a name `args`, or of anything's `args`."""
    found = set[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if is_args(node.value):
                found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            of, name = node.args[:2]
            if is_args(of) and isinstance(name, ast.Constant):
                found.add(str(name.value))
    return found


def is_args(node: ast.expr) -> bool:
    return ast.unparse(node).rpartition(".")[2] == "args"


def test_reads_are_found() -> None:
    source = "args.a = b.args.c\nx = getattr(args, 'd', None) or args.e[0].f\nother.g\nargs.h()"
    assert reads(source) == {"c", "d", "e", "h"}


READS = {
    path.relative_to(ROOT).as_posix(): reads(path.read_text())
    for folder in ("checkpoint", "commands/convert")
    for path in sorted((ROOT / folder).rglob("*.py"))
    # whose `args` is the command line
    if not path.match("commands/convert/request.py")
}


def test_every_argument_that_is_read_is_checked() -> None:
    """Of its type here; that it is there, RunArgs sees to."""
    unchecked = {
        path: names - CHECKED - ELSEWHERE.keys()
        for path, names in READS.items()
        if names - CHECKED - ELSEWHERE.keys()
    }
    assert not unchecked, "add them to a list of checkpoint/run_args.py"
    assert ELSEWHERE.keys() <= set().union(*READS.values())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(CHECKED)), st.sampled_from((object(), b"x", {}, [[]], 1j, (1, 2, 3))))
def test_no_checked_argument_is_of_another_type(name: str, value: Any) -> None:
    args = run_args()
    args.num_experts = 4
    setattr(args, name, value)
    with pytest.raises(ConfigError, match=f"have {name} = "):
        checked(args, Path("run"))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(("iteration", "checkpoint_version", "num_floating_point_operations_so_far")),
    st.sampled_from(({}, "3", b"x", [], True, -1, 2**4000, float("nan"), float("inf"), 1j)),
)
def test_a_counter_that_is_none_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^here has {name} = .*; give a checkpoint that"):
        check_counters({name: value}, Path("here"))


def test_audit_and_convert_refuse_the_same_counters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = save_dense(tmp_path / "dense", common_in_file=True) / "common.pt"
    stored = torch.load(common, weights_only=False)
    torch.save({**stored, "iteration": {}}, common)
    capsys.readouterr()
    assert (convert(tmp_path / "dense", tmp_path / "o"), main(["audit", f"{tmp_path}/dense"])) == (
        2,
        1,
    )
    said = capsys.readouterr()
    assert (said.out + said.err).count("iteration = {}, where a number of iterations belongs") == 2
