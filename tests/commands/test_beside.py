"""Tokenizer and generation config go along with a Hugging Face model, or the summary says what to
do."""

import ast
import json
from pathlib import Path

import hf_models
import pytest
import transformers

from ep_plugin.checkpoint.formats._iteration import iteration_folder
from ep_plugin.checkpoint.formats.hf_safetensors import files_beside, left_beside
from ep_plugin.checkpoint.manifest import manifest_problems
from ep_plugin.checkpoint.open import open_source
from ep_plugin.cli import main
from ep_plugin.errors import ConfigError

transformers.utils.logging.disable_progress_bar()
OTHERS = ("config.json", "model.safetensors", "pytorch_model.bin", "README.md", "modeling_my.py")


def names_in_transformers() -> set[str]:
    """Return the file names in VOCAB_FILES_NAMES of every tokenizer that transformers has."""
    found: set[str] = set()
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization*.py"):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Dict):
                continue
            if any(getattr(t, "id", "") == "VOCAB_FILES_NAMES" for t in node.targets):
                found |= {ast.literal_eval(value) for value in node.value.values}
    return found


def test_every_kind_of_tokenizer_file_goes_along(tmp_path: Path) -> None:
    """Those that transformers names, those of models' own code, chat templates; no weights."""
    names = names_in_transformers()
    assert {"tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "vocab.txt"} <= names
    names |= {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    names |= {"qwen.tiktoken", "tekken.json", "generation_config.json"}
    names |= {"chat_template.jinja", "additional_chat_templates/tools.jinja"}
    runs = ["tokenization_qwen.py", "tokenizer.pkl", "tokenizer.so", "vocab.pickle"]
    for name in (*names, *OTHERS, *runs):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert {str(path) for path in files_beside(tmp_path)} == names
    assert [str(path) for path in left_beside(tmp_path)] == runs


def test_a_tokenizer_elsewhere_matters_where_it_is_copied_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = hf_models.save("llama", tmp_path / "hf")
    (tmp_path / "tokenizer.json").write_text("{}")
    (source / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match="outside of the model; put the file itself there"):
        open_source(source, "hf")
    assert open_source(source, "megatron").left_out == ()


def test_an_iteration_on_another_disk_is_to_be_named_itself(tmp_path: Path) -> None:
    real, root = tmp_path / "disk" / "iter_0000020", tmp_path / "run"
    real.mkdir(parents=True)
    root.mkdir()
    (root / "iter_0000020").symlink_to(real)
    (root / "latest_checkpointed_iteration.txt").write_text("20")
    with pytest.raises(ConfigError, match=f"out of {root}; give the folder {real} itself$"):
        iteration_folder(root, lambda _: True)
    (tmp_path / "linked").symlink_to(real)
    assert iteration_folder(tmp_path / "linked", lambda _: True) == tmp_path / "linked"


@pytest.mark.parametrize("experts", [[], ["--num-experts", "4", "--topk", "2"]])
def test_the_summary_says_what_became_of_them(
    experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Copied; or where a run finds them; or what is to be copied by hand."""
    source = hf_models.save("llama", tmp_path / "hf")
    skip = ["--skip-parity", "--json"]

    def said(source: Path, target: str, *flags: str) -> str:
        command = ["convert", "--from", str(source), "--to", str(tmp_path / target)]
        assert main([*command, *skip, *flags]) == 0
        sentence: str = json.loads(capsys.readouterr().out)["tokenizer"]
        return sentence

    assert said(source, "bare", *experts) == f"{source} has no tokenizer, and a run needs one"
    if experts:
        moved = said(source, "only", "--format", "hf", *experts)
        assert "copied beside the weights: generation_config.json; " in moved
        assert moved.endswith(f"from the model that it began with into {tmp_path / 'only'}")
    texts = {"tokenizer.json": "{}", "additional_chat_templates/tools.jinja": "x"}
    texts["tokenization_my.py"] = "import os"
    for name, text in texts.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    flags = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {source}"
    assert said(source, "run", *experts).endswith(flags)
    back = said(tmp_path / "run", "back", "--format", "hf")
    assert "has no tokenizer; copy its tokenizer (tokenizer.json, tokenizer_config.json" in back
    if experts:
        copied = said(source, "moe", "--format", "hf", *experts)
        assert copied.startswith("copied beside the weights: additional_chat_templates/tools.jinja")
        assert "generation_config.json, tokenizer.json; not copied, being no data: " in copied
        assert "data: tokenization_my.py; copy by hand what you trust" in copied
        assert not (tmp_path / "moe" / "tokenization_my.py").exists()
        del texts["tokenization_my.py"]
        for name, text in texts.items():
            assert (tmp_path / "moe" / name).read_text() == text
        assert manifest_problems(tmp_path / "moe") == []
