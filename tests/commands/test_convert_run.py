"""`ep-plugin convert` as one run: what it leaves and says is the same whichever way it goes."""

import contextlib
import io
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch

from ep_plugin.checkpoint.manifest import manifest_problems
from ep_plugin.checkpoint.open import is_hf
from ep_plugin.cli import main
from ep_plugin.commands.convert.run_model import Outputs
from ep_plugin.megatron.arguments import flags_file
from tests.checkpoint import test_convert_legacy, test_convert_optimizer
from tests.commands import test_convert

# The module: in its package, the step of the same name is what `compare` says.
compare: Any = import_module("ep_plugin.commands.convert.compare")
EXPERTS = ("--num-experts", "4", "--topk", "2")
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {  # -> source, flags
    "torch_dist to experts": ("torch_dist", EXPERTS),
    "Hugging Face to Megatron": ("hf", ()),
    "Hugging Face to experts": ("hf", (*EXPERTS, "--format", "hf")),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint of each kind: torch_dist with its optimizer, Llama, per-rank files."""
    root = tmp_path_factory.mktemp("sources")
    more: dict[str, Any] = {"padded_vocab_size": test_convert.V, "swiglu": True}
    more |= {"seq_length": 8, "max_position_embeddings": 8, "note": "own"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_convert, "L", 2)
        states = test_convert_optimizer.states("param")
        moments = {name: values for name, values in states.items() if "exp_avg." in name}
        tensors = test_convert_optimizer.parameters() | moments
        test_convert_optimizer.save(root / "dense", tensors, **more)
    hf_models.save("llama", root / "hf")
    test_convert_legacy.save(root / "per-rank", "stacked", add_bias_linear=False, note="own")
    return {"torch_dist": root / "dense", "hf": root / "hf", "per-rank": root / "per-rank"}


@pytest.fixture(autouse=True)
def _models_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is run: each computes its tokens."""

    def run_model(folder: Path, tokens: torch.Tensor, seed: int, *_: object) -> Outputs:
        assert is_hf(folder) or (folder / "metadata.json").is_file()
        values = tokens[..., None].float() + seed
        return Outputs(values, [values] * 2)

    monkeypatch.setattr(compare, "run_model", run_model)
    monkeypatch.setattr(compare, "run_source", run_model)
    monkeypatch.setattr(compare, "import_module", lambda _: None)
    monkeypatch.setattr(compare, "worker", lambda: None)


def convert(source: Path, target: Path, *flags: str) -> tuple[int, str]:
    """Return the exit code, and what was printed, errors included."""
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        code = main(["convert", "--from", str(source), "--to", str(target), *flags])
    return code, said.getvalue() if code == 0 else errors.getvalue()


@pytest.mark.parametrize("way", WAYS)
def test_the_manifest_lists_all_other_files(
    way: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    """The report of the comparison is among them."""
    source, flags = WAYS[way]
    assert convert(sources[source], tmp_path / "out", *flags)[0] == 0
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    listed = json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]
    assert {"parity.json", "manifest.json"} < files
    assert files - {"manifest.json"} <= set(listed)
    assert manifest_problems(tmp_path / "out") == []
    assert ("flags.txt" in listed) is ("hf" not in flags)


@pytest.mark.parametrize("source", ["torch_dist", "hf"])
def test_flags_txt_belongs_to_the_result(
    source: str, sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another word in it is found by --check; a model that it cannot say is written without it."""
    folder = tmp_path / "out"
    code, said = convert(sources[source], folder, *EXPERTS)
    assert (code, f"MODEL={folder} LAYOUT=ep2 ./recipes/run.sh" in said) == (0, True)
    words = flags_file.read(folder / "flags.txt", "model")
    assert words[0] == "schedule=finetune"
    assert words[words.index("--num-experts") + 1] == "4"
    assert main(["convert", "--check", "--to", str(folder)]) == 0
    (folder / "flags.txt").write_text("\n".join([*words, "--qk-layernorm"]))
    assert main(["convert", "--check", "--to", str(folder)]) == 1
    assert "flags.txt has" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags_file, "UNSAID", ("num_layers",))
        code, said = convert(sources[source], tmp_path / "bare", *EXPERTS)
    assert (code, not (tmp_path / "bare" / "flags.txt").exists()) == (0, True)
    assert "no flags.txt, so recipes/run.sh cannot run it: it cannot say num_layers" in said


def test_one_schema_for_every_way(sources: dict[str, Path], tmp_path: Path) -> None:
    summaries: dict[str, dict[str, Any]] = {}
    for way, (source, flags) in WAYS.items():
        code, said = convert(sources[source], tmp_path / way, *flags, "--json")
        assert code == 0, said
        summaries[way] = json.loads(said)
        said = convert(sources[source], tmp_path / f"{way} dry", *flags, "--dry-run", "--json")[1]
        summaries[f"{way}, planned"] = json.loads(said)
    made, planned = list(summaries.values())[::2], list(summaries.values())[1::2]
    for alike in (
        made,
        planned,
        [s["parity"] for s in made],
        [s["parity"]["layers"][0] for s in made],
    ):
        assert len({tuple(summary) for summary in alike}) == 1
    assert [s["num_experts"] for s in made] == [4, None, 4]
    assert [s["topk"] for s in made] == [2, None, 2]
    assert [s["mode"] for s in made] == ["copy", None, "copy"]
    assert [s["optimizer"] for s in made] == [True, False, False]
    assert [s["format"] for s in made] == ["megatron", "megatron", "hf"]
    assert [s["family"] for s in made] == [None, "llama", "mixtral"]


def test_the_comparison_s_need_is_said_before_a_byte_is_written(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On what, and in how much memory: in the plan, and on stderr of a run that then fails."""

    def no_room(*_: object) -> None:
        raise OSError("full")

    planned = convert(sources["hf"], tmp_path / "out", *EXPERTS, "--dry-run", "--json")[1]
    comparison = json.loads(planned)["comparison"]
    assert (comparison["tokens"], comparison["prompts"]) == (512, None)
    sizes = json.loads(planned)["tensors"]
    within = sum(size["num_bytes"] for name, size in sizes.items() if ".layers." in name)
    weights = 4 * within // 2 + 2 * (json.loads(planned)["num_bytes"] - within)
    outputs = 2 * 4 * 512 * (2 * 32 + hf_models.VOCAB)  # two layers and the logits
    assert comparison["memory_bytes"] == weights + outputs
    text = convert(sources["hf"], tmp_path / "out", *EXPERTS, "--dry-run")[1]
    said = "then source and result are run on 512 random tokens (--seed 1234), one layer in memory"
    assert said in text
    skipped = convert(sources["hf"], tmp_path / "out", *EXPERTS, "--dry-run", "--skip-parity")[1]
    assert "source and result are not compared" in skipped
    with monkeypatch.context() as patch:
        patch.setattr(compare, "_read", lambda _: "MemTotal: 9 kB\nMemAvailable:       7 kB\n")
        code, refused = convert(sources["hf"], tmp_path / "out", *EXPERTS)
    assert code == 2
    assert "GiB of memory, and 0.00 are free; use --skip-parity" in refused
    assert not (tmp_path / "out").exists()
    errors = io.StringIO()
    monkeypatch.setattr("ep_plugin.commands.convert.staged", no_room)
    with contextlib.redirect_stderr(errors):
        command = ["convert", "--from", str(sources["hf"]), "--to", str(tmp_path / "out")]
        assert main([*command, *EXPERTS]) == 2
    assert said in errors.getvalue()
    assert not (tmp_path / "out").exists()
