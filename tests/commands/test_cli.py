"""The command line: help, flags, exit codes, and one line for a user's mistake."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ep_plugin import __version__
from ep_plugin.cli import COMMANDS, build_parser, main

# Changing a command's flags changes what users' scripts rely on: change this list with it.
FLAGS = {
    "apply": "SCRIPT --check --diff --revert",
    "audit": "CKPT --json",
    "bench": (
        "BENCH --backends --cuda-graph --dispatchers --explain --gradients --json --output --plot "
        "--precision --recipes --repeats --resume --routing --shapes --skip --trace --trace-plot "
        "--warm"
    ),
    "convert": (
        "--check --drop-optimizer --drop-ratio --dry-run --ep --family --format --from "
        "--granularity --hybrid-layer-pattern --json --keep-layers --layers --leave-out --mode "
        "--model-class --noise-std --num-experts "
        "--parity-tolerance --pre-softmax --preset --processes --prompts --router --router-init "
        "--scaling-factor --score-function --seed --shared-expert --skip-parity --to --topk "
        "--transformer-impl --verify --vocab-size"
    ),
    "doctor": "--json --verbose",
    "generate": (
        "CKPT --dtype --ep --etp --greedy --json --num-tokens --pp --prompt --prompts --router "
        "--seed --stop --temperature --tokenizer --top-p --tp"
    ),
    "parity": (
        "SCRIPT ARGS --device --iterations --json --layouts --output --resume --tiny --tolerance"
    ),
    "plan": (
        "--add-qkv-bias --attention-output-gate --chunks --compute-ms --cp --disable-bias-linear "
        "--dispatch-dedup --ep --ep-distill-stop --ep-experts-per-layer --ep-teacher "
        "--ep-teacher-layout --etp --experts --ffn --ffn-hidden-size --fp8-dispatch --gpu-gb "
        "--gpus --group-query-attention --hidden --hidden-size --hybrid-layer-pattern --imbalance "
        "--json "
        "--kv-channels --kv-lora-rank --linear-conv-kernel-dim --linear-key-head-dim "
        "--linear-num-key-heads --linear-num-value-heads --linear-value-head-dim "
        "--make-vocab-size-divisible-by --mamba-head-dim --mamba-num-groups --mamba-num-heads "
        "--mamba-state-dim --max-position-embeddings --measured --micro-batch "
        "--moe-ffn-hidden-size --moe-router-topk --moe-shared-expert-gate "
        "--moe-shared-expert-intermediate-size "
        "--network --normalization --num-attention-heads --num-experts --num-query-groups --plot "
        "--position-embedding-type --pp --preset --q-lora-rank --qk-head-dim --qk-pos-emb-head-dim "
        "--recompute --seq-length --swiglu --tokens --topk --tp "
        "--untie-embeddings-and-output-weights --v-head-dim --vocab-size"
    ),
    "presets": "NAME --json",
    "recipes": "NAME --copy --json",
    "report": "--device --ep --experts --json --ranks --resumed-at-iteration --run --to --topk",
}


def command_parser(command: str) -> argparse.ArgumentParser:
    parser = build_parser(command)
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    found: argparse.ArgumentParser = commands.choices[command]
    return found


def test_every_command_has_its_flags_listed() -> None:
    assert {*FLAGS, "run"} == set(COMMANDS)  # all that stands behind `run SCRIPT` is the script's


@pytest.mark.parametrize("command", FLAGS)
def test_flags_are_the_ones_listed(command: str) -> None:
    actions = command_parser(command)._actions
    names = {
        action.option_strings[-1] if action.option_strings else action.metavar for action in actions
    }
    assert names - {"--help"} == set(FLAGS[command].split())


@pytest.mark.parametrize("command", FLAGS)
def test_help_shows_every_flag_and_examples(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        main([command, "--help"])
    assert exited.value.code == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in FLAGS[command].split())
    assert re.search(rf"^examples:\n  ep-plugin {command}\b", shown, re.MULTILINE)


@pytest.mark.parametrize("command", FLAGS)
def test_examples_use_flags_that_exist(command: str) -> None:
    epilog = command_parser(command).epilog
    assert epilog is not None
    examples = re.findall(rf"^  (ep-plugin {command} .*(?:\\\n.*)*)", epilog, re.MULTILINE)
    used = set(re.findall(r" (--[\w-]+)", " ".join(examples)))
    assert used <= set(FLAGS[command].split())


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["--help"])
    assert exited.value.code == 0
    shown = capsys.readouterr().out
    for command, summary in COMMANDS.items():
        assert command in shown
        assert summary.split()[0] in shown


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what argparse refuses a command line with: one line, behind the command."""
    with pytest.raises(SystemExit) as exited:
        main(words)
    assert exited.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    name = "ep-plugin" if not words or words[0] not in COMMANDS else f"ep-plugin {words[0]}"
    found = re.fullmatch(rf"{name}: error: (.*); see {name} --help\n", said.err)
    assert found is not None, said.err
    return found[1]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("fly", "COMMAND must be one of apply, .*, run; got 'fly'; use apply"),
        ("plane", "COMMAND must be one of apply, .*, run; got 'plane'; use plan"),
        ("apply", "the following arguments are required: SCRIPT"),
        ("doctor --fast", "'--fast' is no flag here; leave it out"),
        ("doctor --vebose", "'--vebose' is no flag here; use --verbose"),
        ("audit a b c", "'b c' is more than it takes; leave it out"),
        ("plan --tp two", "--tp must be a whole number; got 'two'; use --tp 1"),
        ("plan --tp 2.0", "--tp must be a whole number; got '2.0'; use --tp 2"),
        ("plan --tp <topk>", "--tp must be a whole number; got '<topk>'; use --tp 1"),
        (f"plan --tp {'9' * 5000}", "--tp must be a whole number up to 2147483647; .*"),
        ("plan --tp", "--tp needs a value; use --tp VALUE"),
        ("plan --ep", "--ep needs a value; use --ep VALUE"),
        ("plan --json=yes", "--json takes no value; use --json alone"),
        ("plan --q 2", "ambiguous option: --q could match .*; use one of them"),
        ("plan --network nvlink", "--network must be one of nvlink8, .*; use --network nvlink8"),
        ("parity a.py --tiny --iterations x", "--iterations must .*; use --iterations 3"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    line: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(line.split(), capsys)
    assert re.fullmatch(sentence, said), said


@pytest.mark.parametrize("command", FLAGS)
def test_a_wrong_word_behind_any_flag_is_answered_with_one_that_is_read(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    actions = [a for a in command_parser(command)._actions if a.option_strings]
    for action in actions:
        if action.type not in (int, float) and action.choices is None:
            continue
        flag = action.option_strings[-1]
        said = refused([command, flag, "two"], capsys)
        found = re.fullmatch(rf"{flag} must be .*; got 'two'; use {flag} (\S+)", said)
        assert found is not None, said
        parser = argparse.ArgumentParser()
        parser.add_argument(flag, type=action.type, choices=action.choices)
        parser.parse_args([flag, found[1]])


MISTAKES = {
    "apply": (["no_such_script.py"], "no_such_script.py cannot be read"),
    "audit": (["no_such_folder"], "checkpoint no_such_folder is not a folder; .* named"),
    "bench": (["layer", "--shapes", "huge"], "--shapes must be among dsv3, .*; got 'huge'"),
    "convert": (
        ["--from", "no_such_folder", "--to", "moe", "--num-experts", "8", "--topk", "9"],
        r"--topk \(9\) must be at most --num-experts \(8\); use --topk 8",
    ),
    "generate": (
        ["no_such_folder", "--prompt", "a"],
        "checkpoint no_such_folder is not a folder; .* named",
    ),
    "parity": (
        ["missing.py", "--num-experts", "4", "--layouts", "ep=2"],
        "SCRIPT must be a Python file; got 'missing.py', which is not here",
    ),
    "recipes": (
        ["--copy", "train", "qwen3-nan"],
        "NAME must be one that `ep-plugin recipes` lists; got 'qwen3-nan'; use qwen3-nano",
    ),
    "report": (
        ["--run", "no_such_folder"],
        "--run must be a folder or a log of a run; 'no_such_folder' .*",
    ),
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, sentence = MISTAKES[command]
    assert main([command, *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(rf"ep-plugin {command}: error: {sentence}.*\n", said.err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "use"),
    [
        (["presets", "qwen3"], "qwen3-30b-a3b, qwen3-235b-a22b, qwen3-nano"),
        (["plan", "--preset", "Mixtral-8x7"], "mixtral-8x7b"),
        (["bench", "layer", "--shapes", "mixtral-8x7b"], "--shapes mixtral"),
    ],
)
def test_an_unknown_name_is_answered_with_the_closest_real_ones_first(
    words: list[str], use: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.endswith(f"; use {use}\n")


def test_installed_command_and_module_are_the_same() -> None:
    scripts = Path(sys.executable).parent
    for command in ([str(scripts / "ep-plugin")], [sys.executable, "-m", "ep_plugin.cli"]):
        result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert result.stdout == f"{__version__}\n"


def call(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


EP_PLUGIN = str(Path(sys.executable).parent / "ep-plugin")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ([sys.executable, "-m", "ep_plugin.run"], "ep_plugin.run"),
        ([EP_PLUGIN, "run"], "ep-plugin run"),
    ],
)
def test_run_says_how_and_refuses_a_missing_script(
    command: list[str], name: str, tmp_path: Path
) -> None:
    shown = call(tmp_path, *command, "--help")
    assert shown.returncode == 0
    assert re.match(rf"usage: (python -m )?{name} SCRIPT ", shown.stdout)
    assert "torchrun ... -m ep_plugin.run SCRIPT" in shown.stdout
    assert "examples:" in shown.stdout
    assert call(tmp_path, *command).returncode == 2
    refused = call(tmp_path, *command, "missing.py")
    assert refused.returncode == 2
    assert re.fullmatch(rf"{name}: error: .*'missing\.py'.*; use .*\n", refused.stderr)


@pytest.mark.parametrize(
    "words", [["torchrun", "--nproc-per-node", "2", "a.py"], ["--nproc-per-node", "2"], ["python"]]
)
def test_what_starts_the_ranks_is_sent_to_the_front(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *words]) == 2
    assert "torchrun FLAGS --no-python ep-plugin run SCRIPT" in capsys.readouterr().err


def test_run_works_under_torchrun_without_python(tmp_path: Path) -> None:
    """Each of two ranks runs the script as __main__, with the plugin in, and its flags as typed."""
    (tmp_path / "beside.py").touch()
    (tmp_path / "script.py").write_text(
        "import os, sys\n"
        "import beside\n"
        "assert 'ep_plugin.megatron.seams.install' in sys.modules\n"
        "assert __name__ == '__main__'\n"
        "with open('rank' + os.environ['RANK'], 'w') as file:\n"
        "    print(*sys.argv, file=file)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    flags = ["--help", "--", "--version", "--", "run"]
    done = call(
        tmp_path,
        *(*torchrun, "--nproc-per-node", "2", "--no-python", EP_PLUGIN),
        *("run", "script.py", *flags),
    )
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert (tmp_path / f"rank{rank}").read_text() == f"script.py {' '.join(flags)}\n"


def test_a_reader_that_has_had_enough_is_no_error() -> None:
    """`ep-plugin presets | head -1` says nothing on stderr."""
    command = [sys.executable, "-m", "ep_plugin.cli", "presets", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
