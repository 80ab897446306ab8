"""Every command of the README is real: the example runs, command lines parse, paths exist."""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ep_plugin.cli import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]


def test_the_example_runs_on_one_and_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(blocks("python")[0])
    assert len(script.read_text().splitlines()) <= 15
    for ranks, held in ((1, 8), (2, 4)):
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        done = subprocess.run(
            [sys.executable, *command, str(script)], capture_output=True, text=True, check=True
        )
        assert done.stdout.count(f"holds {held} of 8 experts") == ranks


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str) -> None:
    """Scripts exist (.ci/run runs them); our commands parse; launched files and flags are real."""
    words = shlex.split(command)
    if words[0].startswith("MODEL="):
        here = command.replace("sbatch --nodes 4 ", "NNODES=4 bash ")
        printed = subprocess.run(
            ["bash", "-c", f"export DRY_RUN=1; {here}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert f"-m ep_plugin.run {words[-1]} " in printed.stdout
        assert (ROOT / words[-1]).is_file()
    elif words[0].startswith("./"):
        assert words[0].removeprefix("./") in (ROOT / ".ci" / "run").read_text()
    elif words[0] == "ep-plugin":
        args = build_parser(words[1]).parse_args(words[1:])
        assert isinstance(args, argparse.Namespace)
    elif words[0] == "torchrun":
        position = words.index("ep_plugin.run")
        assert (ROOT / words[position + 1]).is_file()
        check_megatron_flags(words[position + 2 :])
    else:
        assert words[:3] == ["pip", "install", "-e"]


def check_megatron_flags(flags: list[str]) -> None:
    from megatron.training.arguments import add_megatron_arguments  # noqa: TID251

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    assert not parser.parse_known_args(flags)[1]


def test_every_file_in_the_tree_exists() -> None:
    tree = next(block for block in blocks("text") if "READ FIRST" in block)
    folder = ROOT
    for line in tree.splitlines():
        name = line.split()[0]
        folder = ROOT if not line.startswith(" ") else folder
        assert (folder / name).exists(), line
        if not line.startswith(" "):
            folder = ROOT / name


def test_every_file_of_the_package_is_in_the_tree() -> None:
    tree = next(block for block in blocks("text") if "READ FIRST" in block)
    listed = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    for path in (ROOT / "ep_plugin").iterdir():
        if path.name not in ("__init__.py", "__pycache__", "py.typed"):
            assert path.name in listed, path.name
