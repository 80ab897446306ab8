"""What transformers is given of a folder with a tokenizer: plain files in bounds, and settings.

transformers does what such settings say: it opens files they name (`vocab_file`), imports packages
and passes options to them (`mecab_kwargs`), and takes any of its classes. So it is given a folder
of its own: files of known names, settings that say how text is split, and classes on a list.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import check_regular, parse_json, read_text, reason, shown

MOST_BYTES = 256 << 20  # of a tokenizer's file
_FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tiktoken.model", "added_tokens.json"),
)
_CONFIG, _SPECIAL, _MODEL = "tokenizer_config.json", "special_tokens_map.json", "config.json"
# Of transformers itself, made by the packages tokenizers and sentencepiece alone.
_CLASSES = (
    "PreTrainedTokenizer", "TokenizersBackend", "LlamaTokenizer", "CodeLlamaTokenizer",
    "GemmaTokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer", "Qwen2Tokenizer", "CohereTokenizer",
    "BertTokenizer", "RobertaTokenizer", "T5Tokenizer", "BloomTokenizer", "XLMRobertaTokenizer",
    "AlbertTokenizer", "CodeGenTokenizer", "OpenAIGPTTokenizer", "DebertaV2Tokenizer",
    "XGLMTokenizer",
)  # fmt: skip
_TOKENS = re.compile(r"[a-z_]+_tokens?|added_tokens_decoder")
# Of one token. tokenizers prints other names as they are; numbers are those of a table of tokens.
_OF_TOKEN = re.compile(
    r"content|single_word|lstrip|rstrip|normalized|special|__type|\d{1,19}|[a-z_]{1,40}_token"
)
_NUMBERS = re.compile(
    r"add_[a-z]+_token|add_prefix_space|add_dummy_prefix|do_lower_case|legacy|strip_accents|"
    r"tokenize_chinese_chars|split_special_tokens|clean_up_tokenization_spaces|"
    r"spaces_between_special_tokens|extra_ids|keep_accents|remove_space"
)
_LONGEST = re.compile(r'("model_max_length"\s*:)\s*\d{19,40}\b')  # 10^30 where none is known
_WORDS = {"errors": ("strict", "replace", "ignore"), "padding_side": ("left", "right")}
_WORDS["truncation_side"] = _WORDS["padding_side"]


@contextmanager
def as_transformers_loads(folder: Path, called: str, instead: str) -> Iterator[Path]:
    """Yield a folder from which transformers loads the tokenizer in `folder`, for as long.

    Raises ConfigError for files out of bounds, and for a class of tokenizer that is not read.
    """
    with TemporaryDirectory(prefix="ep_plugin_") as name:
        view = Path(name)
        for file in _FILES:
            _link(folder / file, view / file, instead)
        settings = _read(folder / _CONFIG, instead)
        if settings is not None:
            _write(view / _CONFIG, _settings(settings, called, instead))
        special = _read(folder / _SPECIAL, instead)
        if special is not None:
            _write(view / _SPECIAL, _tokens(special))
        model = (_read(folder / _MODEL, instead) or {}).get("model_type")
        if isinstance(model, str) and _class_of(model) in (*_CLASSES, "MistralCommonBackend"):
            _write(view / _MODEL, {"model_type": model})
        with _without_copies():
            yield view


@contextmanager
def _without_copies() -> Iterator[None]:
    """Keep tiktoken, to which transformers gives what is no SentencePiece model, from copying it.

    It would leave the copy in the folder for temporary files.
    """
    name = "TIKTOKEN_CACHE_DIR"
    before = os.environ.get(name)
    os.environ[name] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _settings(found: dict[str, Any], called: str, instead: str) -> dict[str, Any]:
    kept = {name: value for name, value in found.items() if _stays(name, value)}
    kept |= _tokens(found)
    kind = found.get("tokenizer_class")
    if isinstance(kind, str) and kind.removesuffix("Fast") in _CLASSES:
        return kept | {"tokenizer_class": kind}
    if "auto_map" in found:
        raise ConfigError(
            f"{called} has no tokenizer that transformers can load (it needs Python code of its "
            f"own, which is not run); {instead}"
        )
    if kind is not None:
        raise ConfigError(
            f"{called} has a tokenizer of the class {shown(kind)}, which is not read: it may open "
            f"other files or packages; {instead}"
        )
    return kept


def _stays(name: str, value: Any) -> bool:
    if _NUMBERS.fullmatch(name):
        return isinstance(value, bool | int | float | None)
    return value in _WORDS.get(name, ())


def _tokens(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: _token(value) for name, value in settings.items() if _TOKENS.fullmatch(name)}


def _token(value: Any) -> Any:
    """Return a token, or a list or a table of tokens, with the names that tokens have."""
    if isinstance(value, dict):
        return {name: _token(of) for name, of in value.items() if _OF_TOKEN.fullmatch(name)}
    return [_token(each) for each in value] if isinstance(value, list) else value


def _class_of(model_type: str) -> str:
    """Return the class that transformers takes for a model, "" where it knows none."""
    from importlib import import_module

    names = import_module("transformers.models.auto.tokenization_auto").TOKENIZER_MAPPING_NAMES
    found = names.get(model_type)
    found = found[-1] or found[0] if isinstance(found, tuple) else found  # of releases before 5
    return (found or "").removesuffix("Fast")


def _link(source: Path, target: Path, instead: str) -> None:
    """Let `target` lead to a regular file of a size that a tokenizer's may have, if it is there."""
    if not os.path.lexists(source):
        return
    try:
        size = check_regular(source, instead).st_size
    except OSError as error:
        raise ConfigError(f"{source} cannot be read ({reason(error)}); {instead}") from error
    if size > MOST_BYTES:
        raise ConfigError(
            f"{source} has {size} bytes, and a tokenizer's file {MOST_BYTES} at most; {instead}"
        )
    target.symlink_to(source.resolve())


def _read(path: Path, instead: str) -> dict[str, Any] | None:
    if not os.path.lexists(path):
        return None
    text = _LONGEST.sub(r"\1 0", read_text(path, instead))
    found: dict[str, Any] = parse_json(text, str(path), instead)
    return found


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values))
