"""Hugging Face folders that somebody damaged: the same model comes out, or one sentence.

Of every family. Nothing is written before the folder is held against its config.json.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ep_plugin.checkpoint import family as families
from ep_plugin.checkpoint.formats.hf_safetensors import INDEX
from ep_plugin.checkpoint.open import Format, open_source
from ep_plugin.cli import main
from ep_plugin.errors import ConfigError
from ep_plugin.untrusted import one_line

CASES = {hf_models.model_type(case): case for case in reversed(hf_models.CASES)}
FEW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
HUGE = (10**9, 2**60, 2**62)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def folder(model_type: str) -> Path:
        path = root / model_type
        return path if path.exists() else hf_models.save(CASES[model_type], path)

    return folder


@pytest.fixture
def copy(models: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    def fresh(model_type: str) -> Path:
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
        return Path(shutil.copytree(models(model_type), tmp_path / "hf"))

    return fresh


def refused(folder: Path, *about: Any, output: Format = "megatron") -> str:
    with pytest.raises(ConfigError) as caught:
        pytest.fail(f"taken: {about}, {open_source(folder, output).args}")
    sentence = one_line(str(caught.value))
    assert sentence.isprintable()
    assert len(sentence) < 12_000
    return sentence


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite what the header of a safetensors file says, and leave the tensors as they are."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def edit_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(path)
    save_file(tensors | {name: change(tensors[name]).contiguous()}, path)


def names(folder: Path) -> list[str]:
    return sorted(json.loads((folder / INDEX).read_text())["weight_map"])


@pytest.mark.parametrize("model_type", CASES)
def test_every_tensor_of_another_shape_is_refused_with_what_asks_for_it(
    copy: Callable[[str], Path], model_type: str
) -> None:
    """One name of each row of the family's table: another shape, another dtype."""
    folder = copy(model_type)
    seen: set[str] = set()
    shapes = (lambda t: torch.cat([t, t[:1]]), lambda t: t.unsqueeze(-1), lambda t: t.flatten()[1:])
    for name in names(folder):
        row = re.sub(r"\d+", "#", name)
        if row in seen or (name == "lm_head.weight" and model_type == "gemma"):
            continue
        seen.add(row)
        whole = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
        edit_tensor(folder, name, shapes[len(seen) % 3])
        sentence = refused(folder)
        assert f"{name} is [" in sentence
        assert "config.json asks for [" in sentence
        for path, content in whole.items():
            path.write_bytes(content)
        edit_tensor(folder, name, lambda t: t.to(torch.int32))
        assert f"{name} is torch.int32" in refused(folder)
        for path, content in whole.items():
            path.write_bytes(content)
    assert open_source(folder, "megatron").source.tensors


@pytest.mark.parametrize("model_type", CASES)
def test_sizes_that_the_files_do_not_have_end_at_once(
    copy: Callable[[str], Path], model_type: str
) -> None:
    folder = copy(model_type)
    config = json.loads((folder / "config.json").read_text())
    fields = [*families.load(model_type).fields, "num_key_value_heads", "head_dim"]
    counts = [*fields, "num_experts", "num_local_experts"]
    free = ("max_position_embeddings", "initializer_range", "sliding_window")
    for key in counts:
        for value in (*HUGE, 1, 7):
            may_be = key in free or (key == "num_experts_per_tok" and value < 9)
            if may_be or config.get(key) in (None, value):
                continue
            (folder / "config.json").write_text(json.dumps(config | {key: value}))
            sentence = refused(folder)
            assert "config.json" in sentence
    (folder / "config.json").write_text(json.dumps(config))
    assert open_source(folder, "megatron").source.tensors


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(HUGE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=4,
)


@FEW
@given(data=st.data())
def test_any_value_in_config_json_is_read_or_refused(
    models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    source = models(data.draw(st.sampled_from(sorted(CASES))))
    folder = tmp_path_factory.mktemp("config") / "hf"
    shutil.copytree(source, folder)
    key = data.draw(st.sampled_from(sorted(json.loads((source / "config.json").read_text()))))
    edit(folder / "config.json", lambda config: config.update({key: data.draw(ANYTHING)}))
    read_or_refused(folder, source)


@FEW
@given(data=st.data())
def test_any_damage_of_a_file_is_read_or_refused(
    models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    source = models(data.draw(st.sampled_from(["qwen3", "mixtral"])))
    folder = tmp_path_factory.mktemp("bytes") / "hf"
    shutil.copytree(source, folder)
    path = data.draw(st.sampled_from([*sorted(folder.glob("*.safetensors")), folder / INDEX]))
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else 400
    begin = data.draw(st.integers(0, end - 1))
    after = data.draw(st.integers(begin, end) | st.just(len(content)))
    path.write_bytes(content[:begin] + data.draw(st.binary(max_size=9)) + content[after:])
    read_or_refused(folder, source)


def read_or_refused(folder: Path, source: Path) -> None:
    """Open the folder; where it is taken, it has the tensors of `source`."""
    try:
        opened = open_source(folder, "megatron").source
    except ConfigError:
        refused(folder)
    else:
        whole = open_source(source, "megatron").source
        assert opened.tensors.keys() == whole.tensors.keys()
        for name in list(whole.tensors)[:3]:
            opened.read_tensor(name)
    shutil.rmtree(folder.parent)


SHARDS = (
    *(5, None, [], {}, ["a"], True, "", ".", "..", "\0", "a" * 5000, "/etc/passwd"),
    *("../outside.safetensors", "/outside.safetensors", "a/b.safetensors", "x\n.safetensors"),
)


@pytest.mark.parametrize("value", SHARDS, ids=lambda value: repr(value)[:20])
def test_a_shard_s_name_is_that_of_a_file_in_the_folder(
    copy: Callable[[str], Path], value: Any
) -> None:
    folder = copy("qwen3")
    first = names(folder)[0]
    shutil.copy(next(folder.glob("*.safetensors")), folder.parent / "outside.safetensors")
    edit(folder / INDEX, lambda index: index["weight_map"].update({first: value}))
    assert "no safetensors file of this folder" in refused(folder) or value == "x\n.safetensors"
    refused(folder)


HEADERS: dict[str, Any] = {
    "a shape of 2**62": {"shape": [1 << 62, 1]},
    "a product of 2**80": {"shape": [1 << 40, 1 << 40]},
    "a negative size": {"shape": [-1, 4]},
    "no size": {"shape": [0]},
    "a size of true": {"shape": [True]},
    "many dimensions": {"shape": [1] * 5000},
    "beyond the file": {"data_offsets": [0, 1 << 40]},
    "backwards": {"data_offsets": [8, 0]},
    "three offsets": {"data_offsets": [0, 4, 8]},
    "offsets of text": {"data_offsets": ["0", "4"]},
    "another dtype": {"dtype": "X9"},
    "no dtype": {"dtype": None},
    "a wider dtype": {"dtype": "F64"},
    "more keys": {"more": 1},
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_lies_is_refused(copy: Callable[[str], Path], kind: str) -> None:
    folder = copy("qwen3")
    path = min(folder.glob("*.safetensors"))

    def change(header: dict[str, Any]) -> None:
        name = next(name for name in header if name != "__metadata__")
        header[name] |= HEADERS[kind]

    edit_header(path, change)
    refused(folder)


def test_tensors_do_not_overlap_and_leave_no_hole(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen3")
    place = json.loads((folder / INDEX).read_text())["weight_map"]

    def onto_another(header: dict[str, Any]) -> None:
        sizes: dict[int, str] = {}
        for name in sorted(place, key=place.__getitem__):
            if name in header:
                begin, end = header[name]["data_offsets"]
                other = sizes.setdefault(end - begin, name)
                if other != name:
                    header[name]["data_offsets"] = header[other]["data_offsets"]
                    return
        pytest.fail("no two tensors of one size")

    path = next(path for path in sorted(folder.glob("*.safetensors")) if _alike(path))
    edit_header(path, onto_another)
    assert "and what is before it ends at" in refused(folder)


def _alike(path: Path) -> bool:
    sizes = [tensor.nbytes for tensor in load_file(path).values()]
    return len(set(sizes)) < len(sizes)


@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_header_s_length_is_bounded_by_the_file(copy: Callable[[str], Path], length: int) -> None:
    folder = copy("qwen3")
    path = min(folder.glob("*.safetensors"))
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(folder)


def test_one_tensor_is_in_one_shard(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen3")
    first = min(folder.glob("*.safetensors"))
    shutil.copy(first, folder / "extra.safetensors")
    edit(folder / INDEX, lambda index: index["weight_map"].update(x="extra.safetensors"))
    assert "index.json has no entry for" in refused(folder)


def test_files_beside_stay_in_the_model(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """A link of the Hub's cache leads to its blobs; others are refused, and nothing is written."""
    folder = copy("qwen3")
    (tmp_path / "secret.jinja").write_text("secret")
    for name in ("tokenizer.json", "vocab.txt", "additional_chat_templates"):
        target = tmp_path if name.startswith("additional") else tmp_path / "secret.jinja"
        (folder / name).symlink_to(target)
        sentence = refused(folder, output="hf")
        assert name in sentence
        assert "outside of the model" in sentence
        to = tmp_path / "out"
        flags = ["--num-experts", "4", "--topk", "2", "--format", "hf", "--skip-parity"]
        assert main(["convert", "--from", str(folder), "--to", str(to), *flags]) == 2
        assert not list(tmp_path.glob("*out*"))
        (folder / name).unlink()
    (folder / "tokenizer.json").symlink_to(folder / "tokenizer.json")
    assert "tokenizer.json cannot be read" in refused(folder, output="hf")
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    assert open_source(folder, "megatron").source.tensors  # a pipe is no file of a tokenizer
    (folder / "tokenizer.json").unlink()
    cache = tmp_path / "models--a"
    (cache / "blobs").mkdir(parents=True)
    shutil.copytree(folder, cache / "snapshots" / "1")
    (cache / "blobs" / "0").write_text("{}")
    (cache / "snapshots" / "1" / "tokenizer.json").symlink_to("../../blobs/0")
    assert open_source(cache / "snapshots" / "1", "hf").source.tensors


@pytest.mark.parametrize("model_type", sorted(CASES))
def test_two_saves_in_one_folder_are_not_chosen_from(
    model_type: str, copy: Callable[[str], Path]
) -> None:
    """transformers loads the single file, and others the shards of the index."""
    folder = copy(model_type)
    save_file(hf_models.tensors(folder), folder / "model.safetensors", {"format": "pt"})
    sentence = refused(folder)
    assert "model.safetensors" in sentence
    assert INDEX in sentence
    (folder / INDEX).unlink()
    open_source(folder, "megatron")
    files = dict.fromkeys(hf_models.tensors(folder), "model.safetensors")
    for path in folder.glob("model-*.safetensors"):
        path.unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    open_source(folder, "megatron")
