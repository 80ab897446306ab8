"""Conversion without Megatron: checkpoints made and read back by torch's own distributed
checkpoint."""

import argparse
import dataclasses
import io
import json
import pickle
import re
import shlex
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from spawn import run_ranks
from tolerance import MAX_ERROR
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ep_plugin.checkpoint.adapt.upcycle import upcycle
from ep_plugin.checkpoint.adapt.upcycling import Upcycling
from ep_plugin.checkpoint.formats.dist_writer import write_checkpoint
from ep_plugin.checkpoint.formats.megatron_dist import open_checkpoint
from ep_plugin.checkpoint.moe_layers import moe_layers, parse_layers
from ep_plugin.checkpoint.patterns import Rule, match_names
from ep_plugin.checkpoint.tensors import NewTensor
from ep_plugin.cli import build_parser, main
from ep_plugin.commands.convert.request import settings_from
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.theirs import check

L, H, F, V, E = 4, 8, 12, 32, 4
ITERATION = 30
FLAGS = ["--num-experts", str(E), "--topk", "2", "--skip-parity", "--drop-optimizer"]


def run_args(**changes: Any) -> argparse.Namespace:
    """The run arguments the conversion looks at, and one it must carry along."""
    values = {
        "num_layers": L,
        "hidden_size": H,
        "ffn_hidden_size": F,
        "num_experts": None,
        "moe_ffn_hidden_size": None,
        "moe_layer_freq": 1,
        "init_method_std": 0.02,
        "add_bias_linear": True,
        "transformer_impl": "local",
        "params_dtype": torch.float32,
        "num_attention_heads": 2,
        "lr": 0.125,
    }
    return argparse.Namespace(**(values | changes))


def dense_tensors() -> dict[str, Tensor]:
    """A dense GPT's tensors under stored names, layers stacked; seeded, SwiGLU, with biases."""
    generator = torch.Generator().manual_seed(7)
    shapes = {
        "embedding.word_embeddings.weight": (V, H),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (L, H),
        "decoder.layers.self_attention.linear_qkv.weight": (L, 3 * H, H),
        "decoder.layers.self_attention.linear_proj.weight": (L, H, H),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (L, H),
        "decoder.layers.mlp.linear_fc1.weight": (L, 2 * F, H),
        "decoder.layers.mlp.linear_fc1.bias": (L, 2 * F),
        "decoder.layers.mlp.linear_fc2.weight": (L, H, F),
        "decoder.layers.mlp.linear_fc2.bias": (L, H),
        "decoder.final_layernorm.weight": (H,),
        "optimizer.state.exp_avg.decoder.final_layernorm.weight": (H,),
        "decoder.layers.self_attention.linear_qkv.bias": (L, 3 * H),
        "decoder.layers.self_attention.linear_proj.bias": (L, H),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def per_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with the layer in the name."""
    unstacked = {}
    for name, values in tensors.items():
        if not name.startswith("decoder.layers."):
            unstacked[name] = values
            continue
        rest = name.removeprefix("decoder.layers.")
        unstacked |= {f"decoder.layers.{i}.{rest}": values[i].clone() for i in range(L)}
    return unstacked


def objects(stacked: bool) -> dict[str, Any]:
    """Extra states as Megatron names them, none like another, and one entry of the ended run."""
    states: dict[str, Any] = {"rng_state/shard_0.0_1.1": ["rng"]}
    modules = ("self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
    for number, module in enumerate(modules, start=1):
        for i in range(L):
            where = ("", f"{i}_{L}") if stacked else (f"{i}.", "0_1")
            key = f"decoder.layers.{where[0]}{module}._extra_state/shard_{where[1]}"
            states[key] = [None] * (number + len(modules) * i)
    return states


def save_dense(
    root: Path,
    tensors: dict[str, Tensor] | None = None,
    stacked: bool = True,
    common_in_file: bool = False,
    beside: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write a dense checkpoint; returns its iteration folder."""
    tensors = dense_tensors() if tensors is None else tensors
    tensors = tensors if stacked else per_layer(tensors)
    common = {
        "args": run_args(**changes),
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        "opt_param_scheduler": {"max_lr": 1.0},
        "content_metadata": {"singleton_local_shards": False},
    }
    beside = objects(stacked) if beside is None else beside
    state: dict[str, Any] = {**tensors, **beside}
    folder = root / f"iter_{ITERATION:07d}"
    folder.mkdir(parents=True)
    if common_in_file:
        torch.save(common, folder / "common.pt")
    else:
        state["common_state/shard_0_1"] = [common]
    dcp.save(state, checkpoint_id=folder, planner=unflattened(), no_dist=True)
    finish(root)
    return folder


def unflattened() -> dcp.DefaultSavePlanner:
    """Keep objects whole, as Megatron does."""
    return dcp.DefaultSavePlanner(flatten_state_dict=False)


def finish(root: Path) -> None:
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (root / f"iter_{ITERATION:07d}" / "metadata.json").write_text(json.dumps(config))
    (root / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


def load_all(root: Path) -> dict[str, Any]:
    """Read every tensor and object of a checkpoint with torch's own reader."""
    reader = dcp.FileSystemReader(root / f"iter_{ITERATION:07d}")
    entries = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if hasattr(entry, "chunks")
        else io.BytesIO()
        for name, entry in entries.items()
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def convert(root: Path, target: Path, *extra: str) -> int:
    return main(["convert", "--from", str(root), "--to", str(target), *FLAGS, *extra])


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "per-layer"])
@pytest.mark.parametrize(
    ("layers", "chosen"), [("all", (0, 1, 2, 3)), ("every:2", (0, 2)), ("[0]*3+[1]", (3,))]
)
def test_every_expert_is_the_dense_ffn(
    tmp_path: Path, stacked: bool, layers: str, chosen: tuple[int, ...]
) -> None:
    """All experts of the chosen layers, and everything untouched, to the bit; nothing else."""
    save_dense(tmp_path / "dense", stacked=stacked)
    assert convert(tmp_path / "dense", tmp_path / "moe", "--layers", layers) == 0
    new = load_all(tmp_path / "moe")
    routers = {f"decoder.layers.{i}.mlp.router.{kind}" for i in chosen for kind in WEIGHT_BIAS}
    expected: dict[str, Any] = {}
    for name, values in per_layer(dense_tensors()).items():
        found = re.fullmatch(r"(decoder\.layers\.(\d+)\.mlp\.)(linear_fc\d\.(weight|bias))", name)
        if name.startswith("optimizer."):
            continue
        if found and int(found[2]) in chosen:
            expected[f"{found[1]}experts.experts.{found[3]}"] = torch.stack([values] * E)
        else:
            expected[name] = values
    for name, value in objects(stacked=False).items():
        found = re.fullmatch(r"(decoder\.layers\.(\d+)\.)mlp\.(linear_fc\d)\._.*", name)
        if found and int(found[2]) in chosen:
            key = f"{found[1]}mlp.experts.experts.{found[3]}._extra_state/shard_"
            expected |= {f"{key}{expert}_{E}": [None] for expert in range(E)}
        elif not name.startswith("rng_state"):
            expected[name] = value
    assert set(new) == set(expected) | routers | {"common_state/shard_0_1"}
    for name, values in expected.items():
        if isinstance(values, Tensor):
            assert torch.equal(new[name], values), name
        else:
            assert new[name] == values, name


WEIGHT_BIAS = ("weight", "bias")


def test_the_audit_of_what_was_converted_is_fine_and_says_how_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_dense(tmp_path / "dense")
    assert convert(tmp_path / "dense", tmp_path / "moe", "--layers", "every:2") == 0
    capsys.readouterr()
    assert main(["audit", str(tmp_path / "moe"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["iteration"] == ITERATION
    assert [(r["block"], r["experts"], r["distinct"]) for r in report["layers"]] == [
        (f"decoder.layers.{layer}.mlp", E, 1) for layer in (0, 2)
    ]
    assert {finding["level"] for finding in report["findings"]} == {"warning"}
    assert len(report["findings"]) == 2 * 2  # layers, fc1 and fc2


def save_sharded(root: str) -> None:
    """Save on two ranks: fc1 and fc2 sharded over tensor parallelism, the rest replicated."""
    mesh = init_device_mesh("cpu", (2,))
    shards = {"mlp.linear_fc1.weight": 1, "mlp.linear_fc2.weight": 2, "linear_qkv.weight": 0}
    state: dict[str, Any] = {}
    for name, values in dense_tensors().items():
        axis = next((dim for end, dim in shards.items() if name.endswith(end)), None)
        state[name] = values if axis is None else distribute_tensor(values, mesh, [Shard(axis)])
    common = {"args": run_args(), "iteration": ITERATION, "content_metadata": None}
    state["common_state/shard_0_1"] = [common]
    folder = Path(root) / f"iter_{ITERATION:07d}"
    dcp.save(state, checkpoint_id=folder, planner=unflattened())


def test_source_saved_by_two_ranks(tmp_path: Path) -> None:
    """Chunks cut along rows, columns and the stacked layers come together as they were."""
    run_ranks(2, save_sharded, str(tmp_path / "dense"))
    finish(tmp_path / "dense")
    assert len(list((tmp_path / "dense").glob("iter*/*.distcp"))) == 2
    assert convert(tmp_path / "dense", tmp_path / "moe") == 0
    new = load_all(tmp_path / "moe")
    old = per_layer(dense_tensors())
    for i in range(L):
        prefix = f"decoder.layers.{i}."
        qkv = prefix + "self_attention.linear_qkv.weight"
        assert torch.equal(new[qkv], old[qkv])
        for fc in ("linear_fc1.weight", "linear_fc2.weight"):
            experts = new[f"{prefix}mlp.experts.experts.{fc}"]
            assert all(torch.equal(one, old[f"{prefix}mlp.{fc}"]) for one in experts)


def test_output_is_kept_in_float64(tmp_path: Path) -> None:
    """Whatever the router chooses, probabilities that sum to 1 give the dense FFN's output."""
    tensors = {name: values.double() for name, values in dense_tensors().items()}
    save_dense(tmp_path / "dense", tensors)
    assert convert(tmp_path / "dense", tmp_path / "moe") == 0
    new = load_all(tmp_path / "moe")
    x = torch.randn(40, H, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for i in range(L):
        mlp = f"decoder.layers.{i}.mlp."
        weights = {
            name.removeprefix("linear_").replace(".weight", "").replace(".", "_"): new[
                f"{mlp}experts.experts.{name}"
            ]
            for name in (f"linear_fc{n}.{kind}" for n in (1, 2) for kind in WEIGHT_BIAS)
        }
        logits, ids = (x @ new[mlp + "router.weight"].T).topk(2)
        assert ids.unique().numel() == E
        mixed = reference.moe(x, ids, logits.softmax(-1), weights, "swiglu")
        dense = {name: values[:1] for name, values in weights.items()}
        alone = reference.moe(x, ids[:, :1] * 0, logits[:, :1] * 0 + 1, dense, "swiglu")
        assert (mixed - alone).abs().max() <= MAX_ERROR[torch.float64]


def test_router_is_random_and_seeded(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", init_method_std=0.5, add_bias_linear=False)
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        assert convert(tmp_path / "dense", tmp_path / name, "--seed", seed) == 0
    a, b, c = (load_all(tmp_path / name) for name in "abc")
    routers = [f"decoder.layers.{i}.mlp.router.weight" for i in range(L)]
    assert not any(name.endswith("router.bias") for name in a)
    for name in routers:
        assert a[name].shape == (E, H)
        assert torch.equal(a[name], b[name])
        assert not torch.equal(a[name], c[name])
    rows = torch.cat([a[name] for name in routers])
    assert rows.unique(dim=0).shape == rows.shape
    assert 0.4 < rows.std() < 0.6


@pytest.mark.parametrize("in_file", [True, False], ids=["common.pt", "common_state"])
def test_run_arguments_are_those_of_an_moe_run(tmp_path: Path, in_file: bool) -> None:
    """Kept in the source's own style; model arguments changed, the ended run's state left out."""
    save_dense(tmp_path / "dense", common_in_file=in_file)
    assert convert(tmp_path / "dense", tmp_path / "moe", "--layers", "every:2") == 0
    folder = tmp_path / "moe" / f"iter_{ITERATION:07d}"
    assert (folder / "common.pt").exists() == in_file
    common = (
        torch.load(folder / "common.pt", weights_only=False)
        if in_file
        else load_all(tmp_path / "moe")["common_state/shard_0_1"][0]
    )
    assert set(common) == {"args", "checkpoint_version", "iteration", "content_metadata"}
    assert common["content_metadata"] == {
        "singleton_local_shards": False,
        "non_homogeneous_layers": True,
    }
    assert vars(common["args"]) == vars(
        run_args(
            moe_router_load_balancing_type="aux_loss",
            moe_aux_loss_coeff=0.01,
            num_experts=E,
            moe_ffn_hidden_size=F,
            moe_layer_freq=2,
            moe_router_topk=2,
            moe_router_score_function="softmax",
            moe_router_pre_softmax=False,
            moe_router_topk_scaling_factor=None,
            no_save_optim=True,
            no_save_rng=True,
        )
    )
    tracker = tmp_path / "moe" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == str(ITERATION)


def test_arguments_of_classes_that_are_not_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a pickle names is not run, and not copied either: it is refused, or left out by name."""
    module = types.ModuleType("absent_framework")
    exec("class Backend:\n    def __init__(self, name): self.name = name", vars(module))
    sys.modules[module.__name__] = module
    save_dense(tmp_path / "dense", backend=module.Backend("auto"), hostile=Hostile(), plain=[1])
    del sys.modules[module.__name__]
    assert convert(tmp_path / "dense", tmp_path / "moe") == 2
    assert re.search(
        r"args.backend in .* is an object of absent_framework.Backend, .*; use --leave-out backend",
        capsys.readouterr().err,
    )
    assert convert(tmp_path / "dense", tmp_path / "moe", "--leave-out", "backend") == 2
    assert "is an object of tests.commands.test_convert.mark" in capsys.readouterr().err
    assert not (tmp_path / "moe").exists()
    both = ("--leave-out", "backend", "hostile")
    assert convert(tmp_path / "dense", tmp_path / "moe", *both) == 0
    assert not Hostile.called
    args = load_all(tmp_path / "moe")["common_state/shard_0_1"][0]["args"]
    assert not Hostile.called
    assert args.plain == [1]
    assert not {"backend", "hostile"} & vars(args).keys()


def test_a_router_of_ones_own_is_named_by_the_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name in a checkpoint is not imported, and what is typed takes its place."""
    save_dense(tmp_path / "dense", ep_router="hostile_router")
    save_dense(tmp_path / "own", ep_router="their.router")
    typed = ("--router", "mine.router")
    assert convert(tmp_path / "dense", tmp_path / "moe", *typed) == 2
    assert "its router is 'hostile_router'; leave --router out" in capsys.readouterr().err
    assert convert(tmp_path / "own", tmp_path / "moe") == 2
    assert "trained with the router 'their.router'" in (said := capsys.readouterr().err)
    assert "use --router with its name" in said
    assert convert(tmp_path / "own", tmp_path / "moe", *typed) == 0
    args = load_all(tmp_path / "moe")["common_state/shard_0_1"][0]["args"]
    assert args.ep_router == "mine.router"
    assert not {"their", "mine"} & sys.modules.keys()


@pytest.mark.parametrize("name", ["num_layers", "hidden_size", "ffn_hidden_size", "num_experts"])
@pytest.mark.parametrize("value", ["4", 4.0, -1, 1 << 70, [4], True])
def test_sizes_that_are_none(
    name: str, value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_dense(tmp_path / "dense", **{name: value})
    assert convert(tmp_path / "dense", tmp_path / "moe") == 2
    assert re.search(rf"have {name} = .*, where a whole number", capsys.readouterr().err)


def test_nothing_is_left_out_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_dense(tmp_path / "dense")
    assert convert(tmp_path / "dense", tmp_path / "moe", "--leave-out", "backed") == 2
    assert "--leave-out backed is no run argument" in capsys.readouterr().err


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    held=st.lists(st.one_of(st.text(min_size=1), st.binary(min_size=1)), min_size=1, max_size=4),
    typed=st.booleans(),
)
def test_a_state_is_refused_or_emptied_and_named(
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    held: list[str | bytes],
    typed: bool,
) -> None:
    root = tmp_path_factory.mktemp("states")
    layer = "decoder.layers.{}.self_attention.linear_qkv._extra_state/shard_0_1"
    kept = "decoder.layers.0.self_attention.core_attention.note/shard_0_1"
    states = {layer.format(place): [value] for place, value in enumerate(held)}
    save_dense(root / "dense", stacked=False, beside=states | {kept: ["a note"]}, note=[1])
    flags = ("--leave-out", "_extra_state", "note") if typed else ()
    capsys.readouterr()
    code = convert(root / "dense", root / "moe", *flags)
    said = capsys.readouterr()
    if not typed:
        assert code == 2
        assert "use --leave-out _extra_state" in said.err
        return
    assert code == 0, said.err
    written = load_all(root / "moe")
    assert all(written[name] == [None] and name in said.out for name in states)
    assert written[kept] == ["a note"]
    assert re.search(r"^emptied, \d+ in all: decoder", said.out, re.MULTILINE)
    assert "run arguments left out: note\n" in said.out


def test_no_state_is_emptied_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_dense(tmp_path / "dense", stacked=False, beside={})
    assert convert(tmp_path / "dense", tmp_path / "moe", "--leave-out", "_extra_state") == 2
    assert "--leave-out _extra_state: " in capsys.readouterr().err


class Hostile:
    """Calls `mark` when unpickled."""

    called: list[str] = []  # noqa: RUF012

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (mark, ("by torch",))


def mark(who: str) -> None:
    Hostile.called.append(who)


def test_transformer_engine_norm_is_unfused(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", transformer_impl="transformer_engine")
    assert convert(tmp_path / "dense", tmp_path / "moe", "--layers", "[1,0,0,0]") == 0
    new, old = load_all(tmp_path / "moe"), per_layer(dense_tensors())
    fused = "decoder.layers.{}.mlp.linear_fc1.layer_norm_weight"
    assert torch.equal(new["decoder.layers.0.pre_mlp_layernorm.weight"], old[fused.format(0)])
    assert fused.format(0) not in new
    assert torch.equal(new[fused.format(1)], old[fused.format(1)])


def test_names_are_matched_whole() -> None:
    rules = (Rule("layers.{layer}.fc{fc}.{kind}", "moved.{layer}.{fc}.{kind}"),)
    (match,) = match_names(["layers.12.fc1.bias"], rules, (True,) * 13)
    assert (match.layer, match.target) == (12, "moved.12.1.bias")
    wrong = ["xlayers.1.fc1.bias", "layers.1.fc1.bias.x", "layers.1.fc3.bias", "layers.a.fc1.bias"]
    with pytest.raises(ConfigError) as error:
        match_names(["layers.1.fc1.bias", *wrong], rules, (True,) * 13)
    assert ", ".join(wrong) in str(error.value)
    assert str(error.value).startswith("4 names")


def test_layers() -> None:
    assert parse_layers("all", 3) == 1
    assert parse_layers("every:3", 3) == 3
    assert parse_layers("([0]+[1]*2)*2", 6) == [0, 1, 1, 0, 1, 1]
    assert moe_layers(3, 7) == (True, False, False, True, False, False, True)


def break_nothing(_: Path) -> None:
    """The settings alone are wrong."""


def keep_tracker_only(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def garble_tracker(folder: Path) -> None:
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("soon")


def empty_root(folder: Path) -> None:
    keep_tracker_only(folder)
    (folder.parent / "latest_checkpointed_iteration.txt").unlink()


def remove_root(folder: Path) -> None:
    empty_root(folder)
    folder.parent.rmdir()


def rename_folder(folder: Path) -> None:
    """Give the iteration's folder alone, under another name."""
    root = folder.parent
    (root / "latest_checkpointed_iteration.txt").unlink()
    for path in folder.iterdir():
        path.rename(root / path.name)
    folder.rmdir()


def remove_config(folder: Path) -> None:
    (folder / "metadata.json").unlink()


def other_backend(folder: Path) -> None:
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')


def remove_metadata(folder: Path) -> None:
    (folder / ".metadata").unlink()


def garble_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"no pickle at all")


def replace_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps({"a": 1}))


def truncate(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])


def remove_file(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()


def garble_file(folder: Path) -> None:
    """Overwrite the tensors, after the objects that are written first."""
    path = folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    content[half:] = b"\0" * (len(content) - half)
    path.write_bytes(bytes(content))


def lose_part(folder: Path) -> None:
    """Forget one chunk, as if a rank had not saved."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    entry = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc1.weight"]
    entry.chunks = []
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


BAD_INPUT: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (remove_root, r"is not a folder"),
    "empty": (empty_root, r"is not a checkpoint: it has neither .*latest_checkpointed"),
    "no iteration": (keep_tracker_only, r"names iter_0000030, which .* does not have"),
    "tracker": (garble_tracker, r"must hold an iteration number or 'release'; got 'soon'"),
    "folder name": (rename_folder, r"is not named as Megatron names an iteration's folder"),
    "no metadata.json": (remove_config, r"has no metadata.json.*--ckpt-format torch_dist"),
    "other format": (other_backend, r"is a 'zarr' checkpoint, not torch_dist"),
    "no .metadata": (remove_metadata, r"has no .metadata: its save did not finish"),
    "damaged .metadata": (garble_metadata, r".metadata cannot be read"),
    "foreign .metadata": (replace_metadata, r"holds a dict where a Metadata belongs"),
    "truncated": (truncate, r"__0_0.distcp is truncated: it has \d+ bytes, but .* places \d+"),
    "file missing": (remove_file, r"lacks __0_0.distcp \(\d+ bytes\)"),
    "a rank's part missing": (lose_part, r"holds 0 of the 768 elements of decoder.layers.mlp.l"),
    "damaged": (garble_file, r"(tensor|run arguments) .*(damaged|cannot be read)"),
}


def refused(root: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Convert, expect exit code 2, one sentence and nothing written; returns the sentence."""
    before = sorted(root.rglob("*"))
    capsys.readouterr()
    assert convert(root / "dense", root / "moe", *flags) == 2
    assert sorted(root.rglob("*")) == before
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("ep-plugin convert: error: ")
    return lines[-1]


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    damage, message = BAD_INPUT[case]
    damage(save_dense(tmp_path / "dense"))
    assert re.search(message, refused(tmp_path, capsys))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topk", "5"], r"--topk \(5\) must be at most --num-experts \(4\); use --topk 4"),
        (["--topk", "1"], r"--topk 1 divided by its own sum .*; use --topk 1 --pre-softmax"),
        (["--num-experts", "1"], r"--num-experts must be at least 2; got 1"),
        (
            ["--layers", "[0,1]"],
            r"\[0,1\] has 2 entries, but the checkpoint has 4 layers; use \[1,1,1,1",
        ),
        (["--layers", "[0]*4"], r"leaves every layer dense"),
        (["--layers", "[2]*4"], r"is no list of 0 and 1"),
        (["--layers", "odd"], r"'odd' cannot be read; use all, every:N"),
        (["--layers", "every:0"], r"needs N >= 1; got 'every:0'"),
        (["--layers", "__import__('os')"], r"cannot be read"),
        (["--parity-tolerance", "nan"], r"--parity-tolerance must be a number"),
        (["--scaling-factor", "0"], r"--scaling-factor must .*; use --scaling-factor 1"),
        (["--scaling-factor", "-1"], r"--scaling-factor must .*; use --scaling-factor 1"),
    ],
)
def test_bad_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    save_dense(tmp_path / "dense")
    assert re.search(message, refused(tmp_path, capsys, *flags))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"untie_embeddings_and_output_weights": True},
            r"output_layer.weight is missing, and embedding and output are untied",
        ),
        (
            {"padded_vocab_size": V + 128},
            r"word_embeddings.weight has shape \[32, .* ask for 160 \(padded_vocab_size\)",
        ),
    ],
    ids=["tied said untied", "another vocabulary"],
)
def test_arguments_that_do_not_fit_the_tensors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    save_dense(tmp_path / "dense", **changes)
    assert re.search(message, refused(tmp_path, capsys))
    right = {"untie_embeddings_and_output_weights": False, "padded_vocab_size": V}
    save_dense(tmp_path / "right" / "dense", **right)
    assert convert(tmp_path / "right" / "dense", tmp_path / "right" / "moe") == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quick_geglu", True),
        ("squared_relu", True),
        ("activation_func_clamp_value", 0.01),
        ("glu_linear_offset", 1.0),
    ],
)
def test_an_activation_that_experts_do_not_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: Any
) -> None:
    """Also where nothing is compared."""
    save_dense(tmp_path / "dense", **{name: value})
    assert f"the dense model has {name}, which experts cannot" in refused(tmp_path, capsys)


@pytest.mark.parametrize("name", ["quick_geglu", "squared_relu"])
@pytest.mark.parametrize("ours", ["relu", "gelu"])
def test_an_activation_that_ours_takes_the_place_of_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, ours: str
) -> None:
    """The run with experts would refuse it, and it says nothing of the model."""
    dense, moe = tmp_path / "dense", tmp_path / "moe"
    save_dense(dense, **{name: True, "ep_dense_activation": ours})
    assert convert(dense, moe) == 0
    args = open_checkpoint(moe).common["args"]
    assert (getattr(args, name), args.ep_dense_activation) == (False, ours)
    check(args)
    assert f"--{name.replace('_', '-')}" not in capsys.readouterr().out


def test_without_megatron(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before anything is written, with the way out."""
    save_dense(tmp_path / "dense")
    monkeypatch.setitem(sys.modules, "ep_plugin.megatron.workers.model_run", None)
    paths = ["--from", str(tmp_path / "dense"), "--to", str(tmp_path / "moe")]
    settings = ["--num-experts", "4", "--topk", "2", "--drop-optimizer"]
    assert main(["convert", *paths, *settings]) == 2
    assert re.search(r"needs megatron-core .* or use --skip-parity", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == [tmp_path / "dense"]


def test_output_that_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_dense(tmp_path / "dense")
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "notes.txt").write_text("mine")
    message = refused(tmp_path, capsys)
    assert re.search(r"moe exists and is not empty; use .*moe-2", message)
    (tmp_path / "moe" / "notes.txt").unlink()
    assert convert(tmp_path / "dense", tmp_path / "moe") == 0


@pytest.mark.parametrize("below", ["moe", "a/b/moe"])
def test_output_below_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], below: str
) -> None:
    save_dense(tmp_path / "dense")
    (tmp_path / "notes.txt").write_text("mine")
    assert convert(tmp_path / "dense", tmp_path / "notes.txt" / below) == 2
    said = capsys.readouterr().err
    assert f"would lie below {tmp_path / 'notes.txt'}, which is a file; use a --to" in said


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(["normalization", "ep_router", "position_embedding_type"]),
    value=st.text("\x1b\x07\n\r\u2028\u202e\x9b", min_size=1, max_size=9),
)
def test_nothing_that_a_terminal_obeys_is_printed_of_a_checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
) -> None:
    root = tmp_path_factory.mktemp("said")
    save_dense(root / "dense", **{name: f"a{value}b"})
    capsys.readouterr()
    assert convert(root / "dense", root / "out", "--skip-parity") == 0
    said = capsys.readouterr().out
    assert f"a{value.encode('unicode_escape').decode()}b" in said
    assert all(letter.isprintable() or letter == "\n" for letter in said)


def test_unmatched_and_missing_names_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = {"decoder.layers.mamba.weight": torch.zeros(L, 2), "vision.weight": torch.zeros(2)}
    save_dense(tmp_path / "dense", dense_tensors() | extra)
    message = refused(tmp_path, capsys)
    assert "vision.weight" in message
    assert all(f"decoder.layers.{i}.mamba.weight" in message for i in range(L))
    tensors = dense_tensors()
    del tensors["decoder.layers.mlp.linear_fc2.weight"]
    save_dense(tmp_path / "two" / "dense", tensors)
    message = refused(tmp_path / "two", capsys, "--layers", "[0,0,1,1]")
    assert "decoder.layers.0.mlp.linear_fc2.weight is missing" in message


def test_moe_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_dense(tmp_path / "dense", num_experts=8)
    assert "is a Mixture-of-Experts already (num_experts = 8)" in refused(tmp_path, capsys)


def test_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_dense(tmp_path / "dense")
    save, calls = torch.save, []

    def save_then_interrupt(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) > 10:
            assert len(list(tmp_path.glob(".moe.partial/checkpoint/iter_*/*.distcp.part"))) == 1
            raise KeyboardInterrupt
        save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", save_then_interrupt)
    assert convert(tmp_path / "dense", tmp_path / "moe") == 130
    assert len(calls) == 11
    assert list(tmp_path.iterdir()) == [folder.parent]


def test_one_source_tensor_at_a_time(tmp_path: Path) -> None:
    """While the whole checkpoint is written, no more than the tensor at hand is alive."""
    save_dense(tmp_path / "dense")
    source = open_checkpoint(tmp_path / "dense")
    seen: list[StorageWeakRef] = []
    alive = []

    def read(name: str) -> Tensor:
        values = source.read_tensor(name)
        alive.append(sum(not storage.expired() for storage in seen))
        seen.append(StorageWeakRef(values.untyped_storage()))
        return values

    counted = dataclasses.replace(source, read_tensor=read)
    new = upcycle(counted, Upcycling(num_experts=E, topk=2), keep_optimizer=False)
    written: list[int] = []
    write_checkpoint(tmp_path / "moe", counted, new.common, new.content, written.append)
    assert len(alive) == len(per_layer(dense_tensors())) - 1
    assert max(alive) == 0
    assert sum(written) == new.num_bytes
    sizes = [entry.info.num_bytes for entry in new.content if isinstance(entry, NewTensor)]
    assert max(written) < max(sizes)  # experts go one by one


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_dense(tmp_path / "dense")
    assert convert(tmp_path / "dense", tmp_path / "moe", "--dry-run", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "moe").exists()
    assert convert(tmp_path / "dense", tmp_path / "moe", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    new = load_all(tmp_path / "moe")
    tensors = {name: values for name, values in new.items() if isinstance(values, Tensor)}
    assert {name: entry["shape"] for name, entry in report["tensors"].items()} == {
        name: list(values.shape) for name, values in tensors.items()
    }
    assert report["num_bytes"] == sum(values.nbytes for values in tensors.values())
    assert summary["num_bytes"] == report["num_bytes"]
    assert summary["moe_layers"] == [0, 1, 2, 3]
    assert summary["parity"] is None
    assert summary["megatron_flags"][:3] == ["--load", str(tmp_path / "moe"), "--finetune"]


def test_the_recipe_s_conversions_are_legal() -> None:
    """Flags of recipes/convert.sh exist, their values go together, and runs are told of them."""
    script = (Path(__file__).parents[2] / "recipes" / "convert.sh").read_text().replace("\\\n", " ")
    lines = [shlex.split(line) for line in script.splitlines() if line.startswith("ep-plugin conv")]
    lines = [line for line in lines if "--check" not in line]
    modes = set()
    for words in lines:
        numbers = ["1" if word == "$PROCESSES" else word for word in words[1:]]
        args = build_parser("convert").parse_args(numbers)
        settings = settings_from(vars(args))
        modes.add(settings.mode)
        target = str(args.target)
        (train,) = (shlex.split(s) for s in script.splitlines() if f'--load "{target}"' in s)
        width = 192 // settings.granularity
        for flag, value in (
            ("--num-experts", settings.num_experts),
            ("--moe-router-topk", settings.topk),
            ("--moe-ffn-hidden-size", width),
        ):
            assert train[train.index(flag) + 1] == str(value)
    assert modes == {"copy", "granular", "drop"}
