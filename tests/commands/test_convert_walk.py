"""How far a reader of `ep-plugin convert` has to walk, to the file: a longer way is seen here.

A walk is the list of our files in the order in which functions in them are called for the first
time, a file that follows itself counted once. Each entry of a file that was left is a return. What
a module does while it is imported, lambdas and generators are no functions here; `errors` and
`registry`, the ground that everything stands on, are left out.
"""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import ep_plugin
from ep_plugin.checkpoint.adapt.upcycle import add_experts
from ep_plugin.checkpoint.adapt.upcycling import Upcycling
from ep_plugin.checkpoint.formats import dist_writer
from ep_plugin.checkpoint.open import open_source
from ep_plugin.checkpoint.target import aim
from ep_plugin.checkpoint.writer import HashedFile
from tests.commands.test_convert_run import EXPERTS, _models_stand_in, convert, sources  # noqa: F401

ROOT = f"{Path(ep_plugin.__file__).parent}/"
GROUND = ("errors.py", "registry.py", "untrusted.py")
FUNCTION = 2  # CO_NEWLOCALS: neither a module nor the body of a class


def walk(run: Callable[[], Any]) -> list[str]:
    """Return the walk of `run`, which has been run before, so that nothing is imported any more."""
    run()
    seen, files = set(), list[str]()

    def called(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        name = code.co_filename.removeprefix(ROOT)
        if event != "call" or name == code.co_filename or code in seen or name in GROUND:
            return
        seen.add(code)
        if code.co_flags & FUNCTION and not code.co_name.startswith("<") and name not in files[-1:]:
            files.append(name)

    sys.setprofile(called)
    try:
        run()
    finally:
        sys.setprofile(None)
    return files


def counts(files: list[str]) -> tuple[int, int]:
    return len(set(files)), len(files) - len(set(files))


@pytest.mark.parametrize(
    ("flags", "num_files", "returns"),
    [(("--dry-run",), 42, 47), (("--skip-parity",), 49, 58)],
)
def test_a_run_enters_few_files(
    flags: tuple[str, ...],
    num_files: int,
    returns: int,
    sources: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    targets = (tmp_path / name for name in "ab")

    def run() -> None:
        code, said = convert(sources["torch_dist"], next(targets), *EXPERTS, *flags)
        assert code == 0, said

    files = walk(run)
    found = counts(files)
    assert found == (num_files, returns), files


def test_one_tensor_s_way(sources: dict[str, Path]) -> None:  # noqa: F811
    """From the writer that asks for it to the reader that finds it, experts made between them."""
    dense = open_source(sources["torch_dist"], "megatron")
    settings = Upcycling(num_experts=4, topk=2, mode="drop")
    target = aim(add_experts(dense, settings, True), "megatron", None)
    name = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"
    (unit,) = dist_writer.units([tensor for tensor in target.tensors if tensor.name == name])
    files = walk(lambda: unit.write(HashedFile(io.BytesIO()), lambda _: None))
    expected = ("writer", "formats/dist_writer", "adapt/modes/drop", "formats/_dcp_reader")
    assert {f"checkpoint/{file}.py" for file in expected} < set(files)
    assert len(set(files)) == 14, files
