"""Every flag that is typed acts, alone and beside each other flag, or the command refuses it.

A command line with a flag must not give what the same line without it gives: on stdout, in files,
in the exit code, or in what a stub of the measuring code was asked to do. A refusal is one line
that names a flag that was typed and says what to use.
"""

import argparse
import json
import random
from collections.abc import Callable
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ep_plugin import cli
from ep_plugin.commands import bench, doctor, plan, report
from ep_plugin.commands.bench import over_ranks, rounds
from ep_plugin.commands.bench.contest import OURS, Contest
from ep_plugin.commands.bench.figures import Row, make_row
from ep_plugin.commands.bench.measure import Timing
from ep_plugin.commands.bench.shapes import Shape
from ep_plugin.commands.bench.which_flags import BACKENDS
from ep_plugin.commands.parity import runs as parity_runs
from ep_plugin.commands.parity.launch import Launcher
from ep_plugin.commands.parity.layouts import Layout
from ep_plugin.commands.plan.hybrid_flags import SIZES, SWITCHES
from ep_plugin.written import write_picture

CPU = torch.device("cpu")
PLAIN = 'from megatron.training import pretrain\n\nif __name__ == "__main__":\n    pretrain()\n'
SIZE_OF_ANOTHER = {  # of a HybridModel; the others are 16
    **{"--hidden-size": "2048", "--vocab-size": "90000", "--make-vocab-size-divisible-by": "7"},
    **{"--num-attention-heads": "8", "--num-query-groups": "2", "--num-experts": "4"},
    **{"--moe-router-topk": "1", "--linear-num-value-heads": "48", "--linear-num-key-heads": "8"},
    **{"--mamba-num-groups": "4", "--max-position-embeddings": "64"},
}
OF_A_HYBRID = {row.flag for row in (*SIZES, *SWITCHES)}
HYBRID = (
    "--hidden-size 4096 --vocab-size 256000 --seq-length 65536 --num-attention-heads 32 "
    "--num-experts 4 "
    "--disable-bias-linear"
)
SAMPLED = 60  # pairs of flags of a HybridModel, which has too many
# What is typed behind a flag; a flag that is not here takes no value.
VALUES = {
    "plan": {
        **{"--tokens": "4096", "--topk": "4", "--hidden": "2048", "--experts": "128"},
        **{"--chunks": "2", "--compute-ms": "5", "--imbalance": "1.5", "--ep": "2"},
        **{"--network": "nvlink72", "--plot": "plan.png", "--measured": "measured.json"},
        **{"--preset": "mixtral-8x22b", "--gpus": "16", "--tp": "2", "--pp": "2", "--cp": "2"},
        **{"--etp": "2", "--micro-batch": "2", "--seq-length": "512", "--gpu-gb": "5000"},
        **{"--dispatch-dedup": "off", "--ep-teacher": "mixtral-8x7b"},
        **{"--ffn": "2048", "--ep-teacher-layout": "tp=4", "--ep-distill-stop": "0.5"},
        **{"--hybrid-layer-pattern": "*E", "--normalization": "RMSNorm"},
        **{"--position-embedding-type": "none", "--ep-experts-per-layer": "2,4"},
        **{row.flag: SIZE_OF_ANOTHER.get(row.flag, "16") for row in SIZES},
    },
    "bench": {
        **{"--shapes": "tiny mixtral", "--backends": "ep_plugin", "--precision": "fp8"},
        **{"--routing": "half", "--recipes": "rowwise", "--dispatchers": "deepep"},
        **{"--repeats": "2", "--warm": "1", "--output": "rows.json", "--plot": "rows.png"},
        **{"--trace": "trace.json", "--trace-plot": "trace.png", "--gradients": "added"},
        **{"--skip": "torch"},
    },
    "parity": {
        **{"--iterations": "2", "--tolerance": "0.5", "--device": "cuda", "--output": "out.json"},
    },
    "report": {
        **{"--experts": "8", "--topk": "2", "--ep": "2", "--ranks": "4", "--device": "cpu"},
        **{"--resumed-at-iteration": "30", "--to": "page"},
    },
    "recipes": {"--copy": "folder"},
}
# Command lines without the flags that are put in; what a line has is not put in again.
LINES = [
    *("plan", "plan --preset mixtral-8x7b", "plan --preset glam-137b-dense"),
    "plan --preset mixtral-8x7b --tp 2 --ep-teacher mixtral-8x22b",
    f"plan --hybrid-layer-pattern *MGE-E {HYBRID} --position-embedding-type rope "
    "--moe-shared-expert-intermediate-size 4096",
    f"plan --hybrid-layer-pattern +EE {HYBRID} --max-position-embeddings 65536",
    f"plan --hybrid-layer-pattern *- {HYBRID.replace('--num-experts 4 ', '')} "
    "--max-position-embeddings 65536 --group-query-attention",
    *(f"bench {name}" for name in bench.BENCHES),
    *(f"bench {name} --backends megatron" for name in ("layer", "overlap")),
    *("apply plain.py applied.py", "doctor", "presets", "presets qwen3-nano"),
    *("recipes", "recipes qwen3-nano", "report --run run"),
    *(
        f"parity script.py --num-layers 2 --hidden-size 512 --num-experts 4 --lr 1 {more}"
        for more in ("--layouts ep=2", "--use-distributed-optimizer --layouts ep=2")
    ),
]


def flags_of(command: str) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False)
    cli._module(command).add_arguments(parser)
    return [a.option_strings[-1] for a in parser._actions if a.option_strings]


class Here:
    """A folder with what the command lines read; `asked` is what stubs were asked to do."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys, self.asked = folder, capsys, []  # type: list[object]
        self.known: dict[tuple[str, ...], tuple[object, ...] | str] = {}

    def outcome(self, words: list[str]) -> tuple[object, ...] | str:
        """Return all that a command line does, or its refusal."""
        key = tuple(words)
        if key not in self.known:
            self.known[key] = self._run(words)
        return self.known[key]

    def _run(self, words: list[str]) -> tuple[object, ...] | str:
        self.fill()
        self.asked.clear()
        code = cli.main(words)
        said = self.capsys.readouterr()
        if code == 2:
            assert not self.asked, "refused after work"
            return said.err
        files = {
            str(path.relative_to(self.folder)): path.read_text()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }
        return code, said.out, files, list(self.asked)

    def fill(self) -> None:
        for path in sorted(self.folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        applied = PLAIN.replace(
            ":\n", ":\n    import ep_plugin.megatron\n    ep_plugin.megatron.install()\n\n"
        )
        dims = {"tokens": 8192, "topk": 8, "hidden": 7168}
        measured = {"bench": "overlap", "precision": "bf16", "ep": 2, "dims": dims, "graph": False}
        measured |= {"dispatcher": "alltoall", "exchange_ms": 2.0, "hidden_share": 0.5}
        for name, text in (
            *(("plain.py", PLAIN), ("applied.py", applied), ("script.py", "")),
            ("measured.json", json.dumps([{**measured, "schedule": "serial"}])),
            ("rows.json", json.dumps([fake_row(name, "kept") for name in bench.BENCHES])),
        ):
            (self.folder / name).write_text(text)
        for name in report.RUNS:
            (self.folder / "run" / "tensorboard" / name).mkdir(parents=True)


def fake_row(name: str, backend: str) -> Row:
    row = make_row(CPU, Timing(1.0, 1.0, 1.0), bench=name, shape="tiny", backend=backend)
    row |= {"precision": "bf16", "routing": "balanced", "floor_ms": 1.0, "date": ""}
    if name == "overlap":
        row |= {"dispatcher": "alltoall", "schedule": "serial"}
    return row


class Drawn:
    """A picture that is the text of what it was drawn from."""

    def __init__(self, *content: object) -> None:
        self.content = content

    def savefig(self, file: BytesIO, **_: object) -> None:
        file.write(repr(self.content).encode())


@pytest.fixture
def here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Here:
    monkeypatch.chdir(tmp_path)
    found = Here(tmp_path, capsys)
    stub_bench(monkeypatch, found)
    stub_parity(monkeypatch, found)
    monkeypatch.setattr(doctor, "examine", list)
    monkeypatch.setattr(
        plan,
        "draw",
        lambda rows, measured, args: write_picture(args.plot, Drawn(rows, measured), 1),
    )
    summary = argparse.Namespace(measured=lambda folder: {})
    page = argparse.Namespace(make_page=lambda *content: repr(content))
    monkeypatch.setattr(report, "_load", lambda: (lambda folder: None, None, page, summary))
    monkeypatch.setattr(report, "_drawn", lambda *_: [])
    monkeypatch.setattr(report, "_readable", dict)
    return found


def stub_bench(monkeypatch: pytest.MonkeyPatch, here: Here) -> None:
    """Put in the place of each bench what notes everything that it would read."""

    def stub(name: str) -> Callable[[Contest, Shape, str], list[Row]]:
        def measure(contest: Contest, shape: Shape, routing: str) -> list[Row]:
            alone = name == "overlap" and contest.cuda_graph
            entries = contest.entries((OURS,) if alone else BACKENDS[name])
            ways: list[Any] = []
            for backend, precision in entries if name == "overlap" else ():
                if backend == OURS:
                    ways += over_ranks.our_ways(contest, precision)
            protocol = contest.protocol.warm, contest.protocol.repeats
            here.asked.append((shape, routing, entries, ways, protocol, contest.kept))
            here.asked.append(contest.gradients)
            captured = set(rounds.CAPTURABLE)
            graph = contest.cuda_graph and not captured.isdisjoint(b for b, _ in entries)
            here.asked.append(graph)
            return [fake_row(name, backend) for backend, _ in entries]

        return measure

    for name in bench.BENCHES:
        monkeypatch.setitem(bench.BENCHES, name, stub(name))
    drawing = argparse.Namespace(draw=Drawn)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(bench, "_load", lambda *_: drawing)
    monkeypatch.setattr(bench, "require_cuda", lambda *_: None)
    monkeypatch.setattr(bench, "default_device", lambda: CPU)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    for name in ("join_ranks", "leave_ranks"):
        monkeypatch.setattr(over_ranks, name, lambda *_: None)
    monkeypatch.setattr(over_ranks, "trace", lambda *settings: repr(settings))


def stub_parity(monkeypatch: pytest.MonkeyPatch, here: Here) -> None:
    def run(launcher: Launcher, layout: Layout, name: str, *flags: str) -> Path:
        words = [word for word in flags if "ep-parity-" not in word]
        here.asked.append((launcher.arguments, launcher.device, layout, words))
        (launcher.folder / name).mkdir()
        loss = 2.0 if layout.parallel.ep == 1 else 2.5
        (launcher.folder / name / "scalars.json").write_text(json.dumps({"1": {"lm loss": loss}}))
        return launcher.folder / name

    monkeypatch.setattr(Launcher, "run", run)
    monkeypatch.setattr(parity_runs, "compare_gradients", lambda one, other: [])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def check_refusal(message: str, command: str, typed: list[str]) -> None:
    assert message.startswith(f"ep-plugin {command}: error: "), message
    assert message.count("\n") == 1, message
    assert "use " in message, message
    assert any(f"{flag} " in message for flag in typed), message


@pytest.mark.parametrize("line", LINES)
def test_every_flag_acts_or_is_refused(line: str, here: Here) -> None:
    command, *given = line.split()
    values = VALUES.get(command, {})
    flags = [flag for flag in flags_of(command) if flag not in given]
    acting: set[str] = set()
    pairs = [*combinations(flags, 2)]
    if "--hybrid-layer-pattern" in line:
        pairs = random.Random(5).sample(pairs, SAMPLED)
    elif command == "plan":
        pairs = [pair for pair in pairs if OF_A_HYBRID.isdisjoint(pair)]
    for chosen in [*combinations(flags, 1), *pairs]:

        def typed(*names: str) -> list[str]:
            return [w for name in names for w in (name, *values.get(name, "").split())]

        found = here.outcome([command, *given, *typed(*chosen)])
        if isinstance(found, str):
            check_refusal(found, command, [*chosen, *given])
            continue
        for flag in chosen:
            others = [other for other in chosen if other != flag]
            without = here.outcome([command, *given, *typed(*others)])
            assert found != without, f"{line} {' '.join(typed(*chosen))}: {flag} does nothing"
        acting |= set(chosen)
    assert acting, "nothing acts"


def test_no_flag_is_refused_everywhere(here: Here) -> None:
    """A table that refuses a flag in each of a command's lines would pass the test above."""
    for command in {line.split()[0] for line in LINES}:
        left = set(flags_of(command))
        for line in LINES:
            words = line.split()
            if words[0] == command:
                left -= set(words)
                for flag in list(left):
                    beside = ["--output", "rows.json"] if flag == "--resume" else []
                    beside = beside if command == "bench" else []
                    value = VALUES.get(command, {}).get(flag, "").split()
                    if not isinstance(here.outcome([*words, flag, *value, *beside]), str):
                        left.discard(flag)
        assert not left, (command, left)


@pytest.mark.parametrize(
    "words",
    [
        "report --run a --run b",
        "plan --tokens 8 --tokens=9",
        "presets --json --json",
        "parity script.py --tiny --layouts ep=2 --lr 1 --layouts ep=4",
    ],
)
def test_a_flag_that_is_typed_twice_is_refused(words: str, here: Here) -> None:
    said = here.outcome(words.split())
    assert isinstance(said, str)
    assert " is typed 2 times; use it once\n" in said


def test_a_script_s_own_flags_may_come_twice(here: Here) -> None:
    words = [
        "parity",
        "script.py",
        "--num-experts",
        "4",
        "--lr",
        "1",
        "--lr",
        "2",
        "--layouts",
        "ep=2",
    ]
    assert not isinstance(here.outcome(words), str)
