"""Blocks of README and documents are real: they run, or they are read.

A bash block runs on the CPU, in one folder for all. An HTML comment above a block says otherwise:
`file NAME` writes the block there first, `not run: REASON` has its commands read and not run.
"""

import argparse
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documents import BLOCKS, README, ROOT, Block, megatron_parser

from ep_plugin.cli import build_parser
from ep_plugin.megatron.arguments.flags_file import write_flags
from ep_plugin.megatron.arguments.spell import megatron_arguments
from ep_plugin.presets import load

FILES = [block for block in BLOCKS if block.mark.startswith("file ")]
BASH = [block for block in BLOCKS if block.language == "bash"]
RUN = [block for block in BASH if not block.mark]
READ = [block for block in BASH if block.mark.startswith("not run: ")]

FIRST = next(block for block in RUN if "--save runs/dense" in block.text)  # others read its output
PARSED = ("patches/README.md",)  # needs a checkout of Megatron-LM; test_codemod.py applies patches


def named(block: Block) -> str:
    return block.place


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 220


@pytest.mark.parametrize("block", BLOCKS, ids=named)
def test_every_block_is_run_or_says_why_not(block: Block) -> None:
    kind = block.mark.partition(" ")[0]
    if block.language == "bash":
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
        assert block in RUN or block in READ, block.mark
        assert not block.mark or len(block.mark.split()) > 3, "a reason in two words at least"
    elif block.language == "python":
        assert kind == "file", "a python block is a file that another block runs or imports"
        compile(block.text, block.place, "exec")
        stem = Path(block.mark.removeprefix("file ")).stem
        assert any(stem in other.text for other in BLOCKS if other != block), stem
    else:
        assert block.language in ("text", "mermaid", "diff")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder as a user has it: the recipes, a pretrain script, the documents' files."""
    here = tmp_path_factory.mktemp("documents")
    (here / "recipes").symlink_to(ROOT / "recipes")
    shutil.copy(ROOT / "recipes" / "pretrain_gpt.py", here)
    for block in FILES:
        path = here / block.mark.removeprefix("file ")
        path.parent.mkdir(exist_ok=True)
        path.write_text(block.text)
    return here


@functools.cache
def run(text: str, here: Path) -> str:
    """Run a block as a user would who has installed the project; return what it prints."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    mine = {"PATH": path, "PYTHONPATH": str(ROOT), "EP_PLUGIN_DEVICE": "cpu"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text.replace("PYTHONPATH=.", f"PYTHONPATH=.:{ROOT}")],
        cwd=here,
        env={**os.environ, **mine, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.megatron
@pytest.mark.parametrize("block", [b for b in RUN if not b.place.startswith(PARSED)], ids=named)
def test_the_block_does_not_fail(block: Block, folder: Path) -> None:
    run(FIRST.text, folder)
    run(block.text, folder)


def test_the_layer_alone_is_spread_over_the_ranks(folder: Path) -> None:
    block = next(block for block in RUN if "2 example.py" in block.text)
    assert run(block.text, folder).count("holds 4 of 8 experts") == 2
    alone = run(block.text.replace("2 example.py", "1 example.py"), folder)
    assert alone.count("holds 8 of 8 experts") == 1


def test_options_of_ones_own_give_what_ours_give(folder: Path) -> None:
    block = next(block for block in RUN if "use_my_options.py" in block.text)
    assert run(block.text, folder).count(": equal") == 2


def commands_of(block: Block) -> list[str]:
    """Return a block's commands, each on one line and without its comment."""
    lines = block.text.replace("\\\n", " ").splitlines()
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]
    return [line for line in lines if line and not line.startswith("source ")]


COMMAND_LINES = [
    pytest.param(command, id=f"{block.place}-{number}")
    for block in READ
    for number, command in enumerate(commands_of(block), start=1)
]


@pytest.mark.parametrize("command", COMMAND_LINES)
def test_command_that_is_not_run(command: str, tmp_path: Path) -> None:
    """Our commands and Megatron's flags parse; files are there; recipes print commands."""
    words = [word for word in shlex.split(command) if not word.startswith("${")]
    if words[0].startswith("PYTHONPATH="):
        del words[0]
    if words[0].startswith("MODEL="):
        check_recipe(command, tmp_path)
    elif words[0] == "ep-plugin":
        assert isinstance(build_parser(words[1]).parse_args(words[1:]), argparse.Namespace)
    elif words[:2] == ["torchrun", "--nproc-per-node"] and "ep_plugin.cli" in words:
        ours = words[words.index("ep_plugin.cli") + 1 :]
        build_parser(ours[0]).parse_args(ours)
    elif words[0] == "torchrun":
        script = words[words.index("ep_plugin.run") + 1]
        assert (ROOT / script).is_file() or script in (
            "pretrain_gpt.py",
            "pretrain_hybrid.py",
        )  # Megatron's
        check_megatron_flags(words[words.index(script) + 1 :])
    elif words[0].startswith("./"):
        assert words[0] in (ROOT / ".ci" / "run").read_text()
    elif words[0] in ("python", "pytest"):
        files = [word for word in words if word.endswith(".py")]
        marked = words[-1] in (ROOT / "pyproject.toml").read_text()
        assert files or marked, command
        assert all((ROOT / file).is_file() for file in files)
    elif words[:2] == ["hf", "download"]:
        assert shutil.which("hf", path=str(Path(sys.executable).parent))
    else:
        check_installation(words)


def write_model(folder: Path) -> None:
    """Write what convert leaves of Qwen3-30B-A3B, as far as a launcher looks at it."""
    folder.mkdir(parents=True)
    words = megatron_arguments(load("qwen3-30b-a3b"))
    args = megatron_parser().parse_args([*words, "--padded-vocab-size", "151936"])
    write_flags(folder, args, from_hf=False)
    (folder / "latest_checkpointed_iteration.txt").write_text("release")


def check_recipe(command: str, folder: Path) -> None:
    """The recipe prints the command it would run, with the script and flags that are given."""
    here = re.sub(r"sbatch --nodes (\d+)", r"NNODES=\1 bash", command)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    for model in re.findall(r"MODEL=(\w+/\S+)", command):
        write_model(folder / model)
    printed = subprocess.run(
        ["bash", "-c", f"export DRY_RUN=1; {here}"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    words = shlex.split(printed.replace("\\\n", " "), comments=True)
    script = next(word for word in shlex.split(command) if word.endswith(".py"))
    assert words[words.index("ep_plugin.run") + 1] == script
    assert (ROOT / script).is_file()
    check_megatron_flags(words[words.index(script, words.index("ep_plugin.run")) + 1 :])


def check_installation(words: list[str]) -> None:
    assert words[:2] == ["pip", "install"], words
    if "-e" in words:
        extras = re.findall(r"\w+", words[-1].partition("[")[2])
        project = (ROOT / "pyproject.toml").read_text()
        assert all(f"\n{extra} = [" in project for extra in extras)


def check_megatron_flags(flags: list[str]) -> None:
    assert not megatron_parser().parse_known_args(flags)[1]
