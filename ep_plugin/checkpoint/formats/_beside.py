"""Files of a Hugging Face model that go along with its weights: tokenizer and generation."""

import shutil
from pathlib import Path

from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import check_regular, reason

_AGAIN = "copy the model again"
_MAX_BESIDE_BYTES = 512 << 20
# Files of tokenizers, by every name that transformers and the models' own code give them.
_BESIDE = (
    *("tokenizer*", "special_tokens*", "added_tokens*", "vocab*", "merges*"),
    *("*.model", "*.tiktoken", "tiktoken*", "tekken*.json", "spm*", "*.spm", "*vocab*.json"),
    *("*.jinja", "chat_template*", "additional_chat_templates/*", "normalizer.json"),
    *("dict.txt", "byte_maps.json", "emoji.json", "word_shape.json", "word_pronunciation.json"),
    *("bpe.codes", "*.tokenizer", "generation_config.json"),
)
# Data, and nothing that is run or unpickled.
_DATA = (
    *(".json", ".jsonl", ".txt", ".model", ".tiktoken", ".jinja", ".spm", ".codes", ".vocab"),
    *(".tokenizer", ".bpe", ".merges"),
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def left_beside(folder: Path) -> list[Path]:
    """Return what looks like a tokenizer's and is no data, such as its code: it is not copied."""
    found = {path for pattern in (*_BESIDE, "tokenization*.py") for path in folder.glob(pattern)}
    kept = (*_DATA, *_WEIGHTS)
    return sorted(p.relative_to(folder) for p in found if _is_entry(p) and p.suffix not in kept)


def files_beside(folder: Path, to_copy: bool = True) -> list[Path]:
    """Return the files of a model's tokenizer and for generation, relative to `folder`.

    Where they are `to_copy`, raises ConfigError for one that is too large, or a link out of the
    model; links of the Hub's cache, from snapshots/REVISION to blobs, stay within.
    """
    paths = {path for pattern in _BESIDE for path in folder.glob(pattern) if _is_entry(path)}
    found = sorted(path for path in paths if path.suffix in _DATA)
    for path in found if to_copy else ():
        _check_beside(path, folder)
    return [path.relative_to(folder) for path in found]


def _is_entry(path: Path) -> bool:
    return path.is_symlink() or path.is_file()


def _check_beside(path: Path, folder: Path) -> None:
    try:
        real, home = path.resolve(strict=True), folder.resolve()
        size = check_regular(real, _AGAIN).st_size
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{path} cannot be read ({reason(error)}); {_AGAIN}") from error
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not real.is_relative_to(home) and not real.is_relative_to(blobs):
        raise ConfigError(
            f"{path} is a link to {real}, outside of the model; put the file itself there, or "
            "remove the link"
        )
    if size > _MAX_BESIDE_BYTES:
        raise ConfigError(
            f"{path} has {size} bytes, more than a tokenizer's file needs; remove it from the model"
        )


def copy_beside(source: Path, target: Path) -> None:
    """Copy what a model folder holds for its tokenizer and for generation."""
    for path in files_beside(source):
        (target / path).parent.mkdir(exist_ok=True)
        shutil.copyfile((source / path).resolve(), target / path)
