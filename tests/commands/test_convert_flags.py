"""Every flag of `ep-plugin convert` acts, or is refused: each alone and each pair, on each kind of
source. A flag that is taken and changes nothing fails here."""

import argparse
import hashlib
import itertools
from functools import cache
from pathlib import Path

import pytest

from ep_plugin.cli import build_parser
from tests.commands.test_convert_run import EXPERTS, _models_stand_in, convert, sources  # noqa: F401

PROMPTS = "PROMPTS"  # stands for a file
VALUES = (
    *("--num-experts 8", "--topk 3", "--layers every:2", "--mode drop", "--mode noise"),
    *("--mode granular", "--granularity 2", "--drop-ratio 0.25", "--noise-std 0.5"),
    *("--router-init zero", "--router-init virtual-group", "--shared-expert copy"),
    *("--preset v3-nano", "--score-function sigmoid", "--pre-softmax", "--scaling-factor 2.5"),
    *("--seed 5", "--format hf", "--family mixtral", "--transformer-impl local"),
    *(
        "--vocab-size 9",
        "--leave-out note",
        "--router my_package.my_router",
        "--keep-layers 1",
        "--model-class hybrid",
        "--hybrid-layer-pattern *-*-",
        "--drop-optimizer",
        "--ep 1",
        "--parity-tolerance 0.5",
        "--skip-parity",
        "--verify",
    ),
    *(f"--prompts {PROMPTS}", "--processes 2", "--check", "--dry-run", "--json"),
)
BASES = {  # -> source, flags
    "torch_dist": ("torch_dist", EXPERTS),
    "Hugging Face": ("hf", ()),
    "Hugging Face to experts": ("hf", EXPERTS),
    "per-rank": ("per-rank", ("--skip-parity",)),
}
THE_DEFAULT = "--verify"  # in a word: it changes nothing, and contradicts --skip-parity
PLANNED = ("--processes 2",)  # change no byte, but the time that the plan foresees
SAID_TWICE = {  # a pair in which one says what the other does, too, or what is chosen anyway
    frozenset({"--preset v3-nano", "--score-function sigmoid"}),
    frozenset({"--preset v3-nano", "--scaling-factor 2.5"}),
    frozenset({"--format hf", "--family mixtral"}),
}


def flag(value: str) -> str:
    return value.partition(" ")[0]


def test_every_flag_has_a_value() -> None:
    (commands,) = (
        action
        for action in build_parser("convert")._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    known = set(commands.choices["convert"]._option_string_actions)
    assert {flag(value) for value in VALUES} == known - {"--from", "--to", "--help", "-h"}


@pytest.mark.parametrize("base", BASES)
def test_no_flag_is_silent(
    base: str,
    sources: dict[str, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside the base, and beside every other flag: each pair on two of the four bases."""
    source, always = BASES[base]
    (tmp_path / "prompts.json").write_text("[[1, 2, 3]]")
    monkeypatch.setattr("os.fsync", lambda _: None)
    numbers = itertools.count()

    @cache
    def seen(plan: bool, *values: str) -> tuple[str, ...] | None:
        """Return what a run prints and writes, without what only repeats its settings; None for a
        refusal."""
        words = " ".join(values).replace(PROMPTS, str(tmp_path / "prompts.json")).split()
        target = tmp_path / str(next(numbers))
        extra = ("--dry-run", "--json") if plan else ()
        code, said = convert(sources[source], target, *always, *words, *extra)
        if code == 2:
            assert "error: " in said
            return None
        assert code == 0, said
        files = [path for path in sorted(target.rglob("*")) if path.is_file()]
        hashes = [
            f"{path.relative_to(target)} {hashlib.sha256(path.read_bytes()).hexdigest()}"
            for path in files
            if path.name != "manifest.json"
        ]
        return (said.replace(str(target), "TARGET"), *hashes)

    taken, silent = 0, []
    turn = source == "hf"
    for number, (value, other) in enumerate(itertools.combinations_with_replacement(VALUES, 2)):
        pair = tuple(dict.fromkeys((value, other)))
        if value != other and bool(number % 2) != turn:
            continue
        if (value != other and flag(value) == flag(other)) or {*pair} & {*always}:
            continue
        with_both = seen(False, *pair)
        for one, rest in [(value, pair[1:]), (other, pair[:1])][: len(pair)]:
            if with_both is None or seen(False, *rest) is None or one == THE_DEFAULT:
                continue
            taken += 1
            acts = with_both != seen(False, *rest)
            if one in PLANNED:
                acts = seen(True, *pair) != seen(True, *rest)
            if not acts and frozenset(pair) not in SAID_TWICE:
                silent.append(f"{one} beside {rest}")
    assert silent == []
    assert taken > 15


@pytest.mark.parametrize("value", [v for v in VALUES if v not in ("--check", THE_DEFAULT)])
def test_check_is_alone(value: str, sources: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    code, said = convert(sources["hf"], tmp_path, "--check", *value.split())
    assert code == 2
    assert "is for a conversion, and --check only looks at what one wrote" in said
