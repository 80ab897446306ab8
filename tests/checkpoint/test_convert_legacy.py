"""Megatron's per-rank files, cut here by hand over every kind of rank and put together again."""

import argparse
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ep_plugin.checkpoint.formats import megatron_dist, megatron_legacy
from ep_plugin.checkpoint.formats._archive import Archive
from ep_plugin.checkpoint.open import kind_of
from ep_plugin.cli import main

L, H, F, V, E = 4, 8, 6, 16, 4
TP, PP, EP, CHUNKS = 2, 2, 2, 2


def run_args(**changes: Any) -> argparse.Namespace:
    values = {
        "num_layers": L,
        "hidden_size": H,
        "ffn_hidden_size": F,
        "moe_ffn_hidden_size": F,
        "num_attention_heads": 2,
        "kv_channels": 4,
        "num_experts": E,
        "moe_layer_freq": [0, 1, 1, 1],
        "tensor_model_parallel_size": TP,
        "pipeline_model_parallel_size": PP,
        "expert_model_parallel_size": EP,
        "expert_tensor_parallel_size": None,
        "transformer_impl": "transformer_engine",
        "multi_latent_attention": False,
        "untie_embeddings_and_output_weights": True,
        "add_bias_linear": True,
        "swiglu": True,
        "init_method_std": 0.02,
    }
    return argparse.Namespace(**(values | changes))


def whole_model() -> dict[str, Tensor]:
    """Every tensor of the model under the names of a torch_dist checkpoint, experts stacked."""
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (V, H),
        "output_layer.weight": (V, H),
        "decoder.final_layernorm.weight": (H,),
    }
    for layer in range(L):
        below: dict[str, tuple[int, ...]] = {
            "self_attention.linear_qkv.weight": (3 * H, H),
            "self_attention.linear_qkv.bias": (3 * H,),
            "self_attention.linear_proj.weight": (H, H),
            "self_attention.linear_proj.bias": (H,),
        }
        if layer == 0:
            below |= {"mlp.linear_fc1.weight": (2 * F, H), "mlp.linear_fc2.weight": (H, F)}
        else:
            below |= {
                "pre_mlp_layernorm.weight": (H,),
                "mlp.router.weight": (E, H),
                "mlp.experts.experts.linear_fc1.weight": (E, 2 * F, H),
                "mlp.experts.experts.linear_fc2.weight": (E, H, F),
            }
        shapes |= {f"decoder.layers.{layer}.{name}": shape for name, shape in below.items()}
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def cut(name: str, values: Tensor, tp: int) -> Tensor:
    """Return one tensor-parallel rank's piece."""
    if "linear_fc1" in name:
        return torch.cat([half.chunk(TP)[tp] for half in values.chunk(2)])
    if "linear_fc2.weight" in name or "linear_proj.weight" in name:
        return values.chunk(TP, dim=1)[tp]
    if "qkv" in name or "word_embeddings" in name or "output_layer" in name:
        return values.chunk(TP)[tp]
    return values


# Interleaved: layer -> (pipeline rank, chunk), each holding one layer under number 0.
PLACES = {0: (0, 0), 1: (1, 0), 2: (0, 1), 3: (1, 1)}


def rank_state(tp: int, pp: int, ep: int, spelling: str) -> dict[str, Any]:
    """Return the file of one rank; `spelling` is whose experts they are."""
    state: dict[str, Any] = {f"model{chunk}": {} for chunk in range(CHUNKS)}
    for name, values in whole_model().items():
        if not name.startswith("decoder.layers."):
            home = (0, 0) if name.startswith("embedding") else (PP - 1, CHUNKS - 1)
            if home[0] == pp:
                state[f"model{home[1]}"][name] = cut(name, values, tp)
            continue
        layer, below = int(name.split(".")[2]), name.split(".", 3)[3]
        if PLACES[layer][0] != pp:
            continue
        model = state[f"model{PLACES[layer][1]}"]
        if ".experts.experts." not in name:
            model[f"decoder.layers.0.{below}"] = cut(name, values, tp)
            continue
        mine = [cut(name, values[expert], tp) for expert in range(ep * 2, ep * 2 + 2)]
        fc = below.removeprefix("mlp.experts.experts.")
        if spelling == "stacked":
            model[f"decoder.layers.0.mlp.experts.{fc}"] = torch.stack(mine)
        for local, piece in enumerate(mine):
            if spelling == "sequential":
                model[f"decoder.layers.0.mlp.experts.local_experts.{local}.{fc}"] = piece
            elif spelling == "grouped":
                model[f"decoder.layers.0.mlp.experts.{fc}{local}"] = piece
    state["model0"]["decoder.layers.0.self_attention.linear_qkv._extra_state"] = None
    return state


def save(root: Path, spelling: str, **changes: Any) -> Path:
    for tp in range(TP):
        for pp in range(PP):
            for ep in range(EP):
                folder = root / "iter_0000009" / f"mp_rank_{tp:02d}_{pp:03d}_{ep:03d}"
                folder.mkdir(parents=True)
                args = run_args(**{"add_bias_linear": False, "add_qkv_bias": True, **changes})
                common = {"args": args, "checkpoint_version": 3.0, "iteration": 9}
                state = {**common, **rank_state(tp, pp, ep, spelling), "optimizer": {"x": 1}}
                torch.save(state, folder / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("9")
    return root


@pytest.mark.parametrize("spelling", ["stacked", "sequential", "grouped"])
def test_every_cut_is_mended(spelling: str, tmp_path: Path) -> None:
    """Tensor-, pipeline- and expert-parallel ranks, interleaved chunks: the whole model again."""
    root = save(tmp_path / "legacy", spelling)
    assert kind_of(root) == "per-rank"
    paths = ["--from", str(root), "--to", str(tmp_path / "out")]
    assert main(["convert", *paths, "--skip-parity"]) == 0
    made = megatron_dist.open_checkpoint(tmp_path / "out")
    expected = whole_model()
    assert set(made.tensors) == set(expected)
    for name, values in expected.items():
        assert torch.equal(made.read_tensor(name), values), name
    assert made.folder.name == "iter_0000009"


@pytest.mark.parametrize("dry", [False, True])
def test_states_that_do_not_go_along_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dry: bool
) -> None:
    root = save(tmp_path / "legacy", "stacked")
    paths = ["--from", str(root), "--to", str(tmp_path / "out"), "--skip-parity"]
    assert main(["convert", *paths, "--dry-run"]) == 0
    assert "emptied" not in capsys.readouterr().out  # there are some, and none holds anything
    held = {"linear_qkv": torch.ones(4, dtype=torch.uint8), "linear_proj": b"scales"}
    rank = root / "iter_0000009" / "mp_rank_01_001_000" / "model_optim_rng.pt"
    content = torch.load(rank, weights_only=False)
    for name, value in held.items():
        content["model1"][f"decoder.layers.0.self_attention.{name}._extra_state"] = value
    torch.save(content, rank)
    assert main(["convert", *paths, *(["--dry-run"] if dry else [])]) == 0
    said = capsys.readouterr().out
    names = [f"decoder.layers.3.self_attention.{name}._extra_state" for name in sorted(held)]
    if dry:
        assert all(f"{name} -> (emptied)" in said for name in names)
    else:
        assert f"emptied, 2 in all: {', '.join(names)}\n" in said


def test_other_bytes_of_any_tensor_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch writes the sum of each record; the records that are read are summed once each."""
    root = save(tmp_path / "legacy", "stacked")
    summed: list[tuple[int, str]] = []
    check = Archive.check

    def remembered(archive: Archive, name: str) -> None:
        summed.append((id(archive), name))
        check(archive, name)

    monkeypatch.setattr(Archive, "check", remembered)
    source = megatron_legacy.open_checkpoint(root)
    for name in source.tensors:
        source.read_tensor(name)
        source.read_tensor(name)
    storages = [pair for pair in summed if pair[1].startswith("data/")]
    assert len(storages) == len(set(storages)) > L
    ranks = sorted(root.glob("iter_*/*/model_optim_rng.pt"))
    for path, at in ((ranks[0], 0), (ranks[-1], -1)):  # last of all are experts
        healthy = path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            record = [r for r in archive.infolist() if "/data/" in r.filename][at]
            name = record.filename.partition("/")[2]
            begin = healthy.index(archive.read(record))
        damaged = bytearray(healthy)
        damaged[begin + record.file_size - 3] ^= 1
        path.write_bytes(damaged)
        paths = ["--from", str(root), "--to", str(tmp_path / "out")]
        assert main(["convert", *paths, "--skip-parity"]) == 2
        said = capsys.readouterr().err
        assert f"{path} is truncated or damaged (its record {name} has other bytes" in said
        assert not (tmp_path / "out").exists()
        path.write_bytes(healthy)


def test_only_models_that_can_be_run_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = save(tmp_path / "legacy", "stacked", add_bias_linear=False)
    paths = ["--from", str(root), "--to", str(tmp_path / "out")]
    assert main(["convert", *paths]) == 2
    assert "is in per-rank files, which no program here can run" in capsys.readouterr().err


def test_broken_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(name: str) -> str:
        paths = ["--from", str(tmp_path / name), "--to", str(tmp_path / "out")]
        assert main(["convert", *paths, "--skip-parity"]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    root = save(tmp_path / "lost", "stacked")
    shutil.rmtree(root / "iter_0000009" / "mp_rank_01_001_000")
    assert "lacks mp_rank_01_001_000/model_optim_rng.pt" in refused("lost")
    root = save(tmp_path / "cut", "stacked")
    path = root / "iter_0000009" / "mp_rank_01_001_001" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    assert f"{path} is truncated or damaged" in refused("cut")
    save(tmp_path / "etp", "stacked", expert_tensor_parallel_size=1)
    assert "has experts cut over 1 ranks and the rest over 2" in refused("etp")


def test_a_tensor_without_elements_is_no_number_of_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = save(tmp_path / "odd", "stacked")
    path = root / "iter_0000009" / "mp_rank_00_000_000" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    chunk = next(key for key in state if key.startswith("model"))
    name = "decoder.layers.0.mlp.experts.linear_fc1.weight"
    state[chunk][name] = torch.empty(1 << 59, 0)
    torch.save(state, path)
    to = ["--to", str(tmp_path / "out"), "--format", "megatron", "--skip-parity"]
    assert main(["convert", "--from", str(root), *to]) == 2
    assert f"holds {1 << 59} experts, and the run arguments say" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["decoder.layers.{}.mlp.linear_fc2.weight", "x{}", "x\x1b[31m"])
def test_names_that_no_tensor_has(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "ranks", "stacked")
    file = min((tmp_path / "ranks").glob("iter_*/mp_rank_*/model_optim_rng.pt"))
    content = torch.load(file, weights_only=False)
    state = next(state for key, state in content.items() if key.startswith("model"))
    state[name.format("9" * 5000)] = torch.ones(2)
    torch.save(content, file)
    words = ("--from", str(tmp_path / "ranks"), "--to", str(tmp_path / "out"), "--skip-parity")
    assert main(["convert", *words]) == 2
    assert "which none has" in capsys.readouterr().err
