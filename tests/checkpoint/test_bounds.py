"""Sizes, counts, names and nesting that no file can mean end in one sentence, in little time and
memory, whichever file says them."""

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bounded
import torch
from safetensors.torch import save_file

from ep_plugin.checkpoint.formats.dist_writer import write_metadata
from tests.commands.test_convert import save_dense

BILLION, LARGE, LONG = 10**9, 1 << 60, "x" * 5000
NESTED = "[" * 200_000
UP = ["--num-experts", "4", "--topk", "2", "--skip-parity"]
CONFIG = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8},
    **{"intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "head_dim": 4, "vocab_size": 16, "rms_norm_eps": 1e-6},
    **{"rope_theta": 1e4, "max_position_embeddings": 32, "tie_word_embeddings": False},
    **{"hidden_act": "silu", "torch_dtype": "float32", "attention_bias": False},
}
BOUND = 5.0  # seconds of processor time, against hanging; a second is what it should be


def megatron(root: Path) -> Iterator[Path]:
    """Checkpoints of Megatron's whose arguments or `.metadata` say too much."""
    sizes = ("num_layers", "num_experts", "hidden_size", "padded_vocab_size", "num_query_groups")
    changes: list[dict[str, Any]] = [{name: big} for name in sizes for big in (BILLION, LARGE)]
    changes += [{"num_experts": 4, "moe_layer_freq": freq} for freq in (LARGE, "[1]*999999999")]
    changes += [{LONG: 1}, {"optimizer": LONG}, {"transformer_impl": LONG}, {"ep_router": LONG}]
    changes += [{"ep_experts_per_layer": [LARGE], "num_experts": 4}, {"ep_vocab_size": LARGE}]
    for number, change in enumerate(changes):
        save_dense(root / f"args{number}", **change)
        yield root / f"args{number}"
    whole = [[0], [LARGE], 0, 1 << 40]
    records: list[dict[str, Any]] = [
        {"name": "decoder.layers.0.mlp.linear_fc1.weight", "shape": [LARGE], "chunks": [whole]},
        {"name": "decoder.layers.mlp.linear_fc1.weight", "shape": [BILLION], "chunks": [whole]},
        {"name": "decoder.layers." + "9" * 5000 + ".mlp.linear_fc1.weight", "shape": [1]},
        {"name": LONG, "shape": [1, LARGE, LARGE], "chunks": [whole] * 1000},
        {"name": "a", "shape": [0] * 5000, "chunks": []},
    ]
    for number, record in enumerate(records):
        folder = save_dense(root / f"metadata{number}")
        write_metadata(folder, [("x" * 300, [{"dtype": "float32", "chunks": []} | record])])
        yield folder.parent


def hugging_face(root: Path) -> Iterator[Path]:
    """Folders of Hugging Face's whose config.json, index or header says too much."""

    def folder(name: str, config: str, weight: bytes | None = None) -> Path:
        path = root / name
        path.mkdir(parents=True)
        (path / "config.json").write_text(config)
        save_file({"model.embed_tokens.weight": torch.zeros(16, 8)}, path / "model.safetensors")
        if weight is not None:
            (path / "model.safetensors").write_bytes(struct.pack("<Q", len(weight)) + weight)
        return path

    good = json.dumps(CONFIG)
    for key in [name for name, value in CONFIG.items() if type(value) is int]:
        for big in (BILLION, LARGE):
            yield folder(f"{key}{big}", json.dumps(CONFIG | {key: big}))
    for number, odd in enumerate((NESTED, json.dumps(CONFIG | {LONG: 1, "model_type": LONG}))):
        yield folder(f"config{number}", odd)
        path = folder(f"index{number}", good)
        (path / "model.safetensors.index.json").write_text(odd)
        yield path
        yield folder(f"header{number}", good, odd.encode())
    for number, shape in enumerate(([LARGE], [LARGE, LARGE], [1] * 100_000, [BILLION, 0])):
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        header = json.dumps({"model.embed_tokens.weight": entry, LONG: entry}).encode()
        yield folder(f"shape{number}", good, header)


def manifests(root: Path) -> Iterator[Path]:
    entry = {"num_bytes": LARGE, "sha256": LONG}
    texts = (NESTED, json.dumps({"files": {LONG: entry}, "tensors": {}}), '{"files":' + NESTED)
    for number, text in enumerate(texts):
        path = root / str(number)
        path.mkdir(parents=True)
        (path / "manifest.json").write_text(text)
        yield path


def test_what_no_file_can_mean_costs_little(tmp_path: Path) -> None:
    lines = []
    for number, source in enumerate(megatron(tmp_path / "megatron")):
        to = ["--from", str(source), "--to", str(tmp_path / f"out{number}")]
        lines += [["audit", str(source)], ["convert", *to, *UP], ["convert", *to, "--format", "hf"]]
    for source in hugging_face(tmp_path / "hf"):
        lines.append(["convert", "--from", str(source), "--to", str(tmp_path / "out")])
    lines += [["convert", "--check", "--to", str(path)] for path in manifests(tmp_path / "m")]
    ended = subprocess.run(
        [sys.executable, bounded.__file__],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        check=False,
    )
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(found) == len(lines), (lines[len(found)], ended.stderr[-2000:])
    for line, one in zip(lines, found, strict=True):
        assert one["code"] in (0, 1, 2), (line, one)
        assert one["seconds"] < BOUND, (line, one)
        assert "Traceback" not in one["said"], (line, one)
