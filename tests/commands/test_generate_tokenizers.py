"""Tokenizers of `ep-plugin generate`: GPT-2's byte pairs and vocabularies of tiktoken."""

import base64
import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_plugin.checkpoint import text as text_module
from ep_plugin.checkpoint.text import Place, choose
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.workers.tokenizer import load

pytestmark = pytest.mark.megatron
END = "<|endoftext|>"
TIK = "tokenizer.tiktoken.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with GPT-2's two files, and another with a vocabulary of tiktoken."""
    root = tmp_path_factory.mktemp("tokenizers")
    (root / "gpt2").mkdir()
    tokenizer: Any = transformers.GPT2Tokenizer()
    words = ["the cat sat on the mat", "then the other cat", "caf\u00e9 \u4f60\u597d"] * 9
    trained = tokenizer.train_new_from_iterator(words, 300)
    trained.backend_tokenizer.model.save(str(root / "gpt2"))
    tokens = [*(bytes([byte]) for byte in range(256)), b"th", b"he", b"the", b"ca", b"cat", b" t"]
    rows = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": str(token)}
        for rank, token in enumerate(tokens)
    ]
    (root / TIK).write_text(json.dumps(rows))
    return root


def gpt2(folder: Path) -> Namespace:
    vocab, merges = (str(folder / "gpt2" / name) for name in ("vocab.json", "merges.txt"))
    return Namespace(tokenizer_type="GPT2BPETokenizer", vocab_file=vocab, merge_file=merges)


def tiktoken(folder: Path, **own: Any) -> Namespace:
    sizes = {"vocab_size": 272, "tiktoken_num_special_tokens": 10, "tiktoken_pattern": "v2"}
    return Namespace(
        tokenizer_type="TikTokenizer", tokenizer_model=str(folder / TIK), **sizes | own
    )


TEXTS = st.text(st.sampled_from("the cat\n  1\u00e9\u4f60\U0001f600"), max_size=20)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(text=TEXTS)
def test_byte_pairs_are_those_of_transformers(folder: Path, text: str) -> None:
    named = choose(None, gpt2(folder), folder)
    assert named == choose(str(folder / "gpt2"), Namespace(), folder)
    ours, theirs = load(named), _theirs(folder)
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == text
    if END in theirs.get_vocab():
        assert ours.end == theirs.get_vocab()[END]


def _theirs(folder: Path) -> Any:
    vocab = json.loads((folder / "gpt2" / "vocab.json").read_text())
    lines = (folder / "gpt2" / "merges.txt").read_text().splitlines()
    merges = [tuple(line.split(" ")) for line in lines if not line.startswith("#")]
    return transformers.GPT2Tokenizer(vocab=vocab, merges=merges)


@settings(max_examples=80, derandomize=True, deadline=None)
@given(text=TEXTS)
def test_a_vocabulary_of_tiktoken_counts_behind_its_special_tokens(folder: Path, text: str) -> None:
    ours = load(choose(None, tiktoken(folder), folder))
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    assert all(10 <= each < 272 for each in ids)
    assert (ours.end, ours.size) == (2, 272)
    assert ours.encode("the</s>") == [10 + 258, 2]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"tiktoken_pattern": "v9"}, "describe no tokenizer of tiktoken"),
        ({"vocab_size": "many"}, "describe no tokenizer of tiktoken"),
        ({"vocab_size": 1 << 40}, "describe no tokenizer of tiktoken"),
        ({"special_tokens": [1]}, "describe no tokenizer of tiktoken"),
        ({"vocab_size": 5000}, "is no vocabulary of tiktoken with"),
        ({"tokenizer_model": "/nowhere/x.json"}, "names the tokenizer '/nowhere/x.json', not here"),
    ],
)
def test_run_arguments_that_fit_no_vocabulary_are_refused(
    folder: Path, args: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=f"{re.escape(says)}.*give --tokenizer"):
        load(choose(None, Namespace(**vars(tiktoken(folder)) | args), folder))


@pytest.mark.parametrize(
    ("vocab", "merges"),
    [
        ("[]", "a b"),
        ('{"a": "b"}', ""),
        ('{"a": -1}', ""),
        ('{"a": 1, "b": 2}', "a b c"),
        ('{"a": 1, "b": 2}', "a b"),
        ('{"a": 1, "ab": 2}', "a b"),
        ('{"a": 1, "b": 1}', ""),
        ('{"a": 18446744073709551615}', ""),
    ],
)
def test_files_that_are_no_byte_pairs_are_refused(tmp_path: Path, vocab: str, merges: str) -> None:
    (tmp_path / "vocab.json").write_text(vocab)
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(ConfigError, match="give --tokenizer"):
        load(choose(str(tmp_path), Namespace(), tmp_path))


def test_a_gpt2_tokenizer_without_its_files_is_refused(tmp_path: Path) -> None:
    args = Namespace(tokenizer_type="GPT2BPETokenizer", vocab_file="/nowhere/vocab.json")
    with pytest.raises(ConfigError, match="not here; give --tokenizer"):
        choose(None, args, tmp_path)
    with pytest.raises(ConfigError, match=f"{tmp_path} names no tokenizer; give --tokenizer"):
        choose(None, Namespace(tokenizer_type="GPT2BPETokenizer"), tmp_path)


def test_a_place_is_of_plain_values(folder: Path) -> None:
    place = choose(None, tiktoken(folder), folder)
    assert Place(**json.loads(json.dumps(vars(place)))) == place


def test_a_name_is_not_asked_for_where_there_is_no_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One sentence at once; behind a proxy, which alone may know the hub, it is asked for."""

    def no_such_host(*_: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(text_module.socket, "getaddrinfo", no_such_host)
    monkeypatch.setattr(text_module, "getproxies", dict)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"'gpt22' is no folder or file here.* network cannot"):
        load(Place("file or name", "gpt22"))
    assert not text_module.hub_is_reachable()
    monkeypatch.setattr(text_module, "getproxies", lambda: {"https": "http://proxy"})
    assert text_module.hub_is_reachable()
