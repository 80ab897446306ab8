"""`ep-plugin convert --prompts`: what models are compared on is what the user gave."""

import json
from pathlib import Path

import hf_models
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ep_plugin.checkpoint.prompts import draw, fill, read_prompts
from ep_plugin.cli import main
from ep_plugin.errors import ConfigError

WORDS = ["experts", "are", "chosen", "by", "a", "router"]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A model with a tokenizer beside it: word i is token i + 2, others are token 0."""
    folder = hf_models.save("llama", tmp_path / "llama")
    words = {"[UNK]": 0, "[PAD]": 1} | {word: i + 2 for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def convert(source: Path, target: Path, *flags: str) -> int:
    experts = ("--num-experts", "4", "--topk", "2", "--format", "hf", "--verify")
    return main(["convert", "--from", str(source), "--to", str(target), *experts, *flags])


def test_text_is_read_by_the_model_s_tokenizer(llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("experts are chosen\n\nby a strange router\n")
    assert read_prompts(text, llama) == [[2, 3, 4], [5, 6, 0, 7]]
    assert convert(llama, tmp_path / "moe", "--prompts", str(text)) == 0
    report = json.loads((tmp_path / "moe" / "parity.json").read_text())
    assert (report["prompts"], report["tokens"], report["sequence_length"]) == (2, 7, 4)
    model = hf_models.transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():  # each prompt by itself
        alone = [model(torch.tensor([ids])).logits.abs().max() for ids in read_prompts(text, llama)]
    largest = float(max(alone))
    assert report["logits_max_abs"] == pytest.approx(largest, rel=1e-6)
    assert report["passed"]


def test_ids_are_taken_as_they_are(llama: Path, tmp_path: Path) -> None:
    ids = tmp_path / "prompts.json"
    ids.write_text(json.dumps([[5, 95], list(range(90))]))
    assert read_prompts(ids, None) == [[5, 95], list(range(90))]
    assert convert(llama, tmp_path / "moe", "--prompts", str(ids)) == 0
    report = json.loads((tmp_path / "moe" / "parity.json").read_text())
    assert (report["tokens"], report["sequence_length"]) == (2 + 64, 64)  # the model's longest


def test_what_fills_a_prompt_up_does_not_count() -> None:
    batch = fill([[3], [1, 2, 4]], vocab_size=5, max_length=8)
    assert batch.kept.tolist() == [[True, False, False], [True, True, True]]
    values = torch.tensor([[[1.0], [9.0], [9.0]], [[2.0], [-3.0], [0.0]]])
    assert batch.max_abs(values) == 3
    everything = draw(10, vocab_size=7, max_length=4, seed=1)
    assert everything.tokens.shape == (3, 4)
    assert everything.kept.all()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.txt", None, r"cannot be read"),
        ("broken.json", "[[1, 2", r"cannot be read"),
        ("empty.txt", "\n", r"must hold at least one prompt"),
        ("empty.json", "[[1], []]", r"must hold at least one prompt"),
        ("words.json", '[["a"]]', r"must hold at least one prompt"),
        ("many.json", "[[1], [96]]", r"has token 96, and the vocabulary has 96"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    name: str,
    text: str | None,
    message: str,
    llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    assert convert(llama, tmp_path / "moe", "--prompts", str(path)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert message in said
    assert not (tmp_path / "moe").exists()


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a router")
    with pytest.raises(ConfigError, match="is text, and --from is no Hugging Face folder"):
        read_prompts(text, None)
    bare = hf_models.save("llama", tmp_path / "bare")
    with pytest.raises(ConfigError, match="has no tokenizer that transformers can load"):
        read_prompts(text, bare)


def test_names_that_no_token_has_are_set_aside(
    llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The package tokenizers prints them as they are, on stdout."""
    text = tmp_path / "text.txt"
    text.write_text("a router\n")
    before = read_prompts(text, llama)
    odd = {"content": "<odd>", "special": False, "__type": "AddedToken", "line\nPLANTED": 1}
    whole = {**odd, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    settings = json.loads((llama / "tokenizer_config.json").read_text())
    settings |= {"added_tokens_decoder": {"90": whole}, "additional_special_tokens": [odd]}
    (llama / "tokenizer_config.json").write_text(json.dumps(settings))
    (llama / "special_tokens_map.json").write_text(json.dumps({"mask_token": odd}))
    assert read_prompts(text, llama) == before
    text.write_text("a<odd>\n")
    assert len(read_prompts(text, llama)[0]) < len("a<odd>")
    assert "PLANTED" not in "".join(capfd.readouterr())


def test_a_tokenizer_s_own_code_is_not_run(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anybody asked whether it may be."""

    def asked(*_: object) -> str:
        raise AssertionError("asked on stdin")

    monkeypatch.setattr("builtins.input", asked)
    ran, text = tmp_path / "ran", tmp_path / "text.txt"
    text.write_text("a router")
    (llama / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (llama / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"Python code of its own, which is not run\)"):
        read_prompts(text, llama)
    assert not ran.exists()


def test_prompts_without_a_comparison_are_refused(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = tmp_path / "prompts.json"
    ids.write_text("[[1]]")
    paths = ["--from", str(llama), "--to", str(tmp_path / "moe"), "--prompts", str(ids)]
    assert main(["convert", *paths, "--format", "hf", "--skip-parity"]) == 2
    assert (
        "--prompts is for the comparison, which --skip-parity leaves out" in capsys.readouterr().err
    )
