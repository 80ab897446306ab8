"""What the comparison hands to Megatron of a checkpoint that is not trusted."""

import pickle
import pickletools
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader

from ep_plugin.checkpoint.tensors import Damaged
from ep_plugin.megatron.arguments.table import TABLE
from ep_plugin.megatron.workers import saved_model
from ep_plugin.megatron.workers.foreign import as_megatron_loads
from ep_plugin.registry import HOME
from tests.commands.test_convert import H, L, dense_tensors, save_dense

FOLDER = "iter_0000030"
STACKED, NORM = "decoder.layers.mlp.linear_fc2.weight", "decoder.final_layernorm.weight"


def named(content: bytes) -> set[str]:
    """Return what a pickle of protocol 2 names."""
    return {str(arg) for op, arg, _ in pickletools.genops(content) if op.name == "GLOBAL"}


def test_megatron_unpickles_what_we_wrote(tmp_path: Path) -> None:
    """Tensors come from the source; `.metadata` and run arguments are ours, without its objects."""
    save_dense(tmp_path / "dense", backend=print, sizes=torch.Size([2]), ep_router="evil.router")
    with as_megatron_loads(tmp_path / "dense" / FOLDER, "mine.router") as view:
        assert {path.name for path in view.iterdir()} == {".metadata", "metadata.json", "common.pt"}
        args = torch.load(view / "common.pt", weights_only=False)["args"]
        loaded = {
            NORM: torch.empty(H),
            STACKED: torch.empty(dense_tensors()[STACKED].shape, dtype=torch.float64),
        }
        dcp.load(loaded, storage_reader=FileSystemReader(view))
        metadata = FileSystemReader(view).read_metadata()
    assert args.ep_router == "mine.router"
    assert args.num_layers == L
    assert not hasattr(args, "backend")
    assert metadata.planner_data is None
    for name, values in loaded.items():
        assert torch.equal(values, dense_tensors()[name].to(values.dtype))
    assert not view.exists()
    assert FileSystemReader.read_data.__module__ == FileSystemReader.__module__


def test_a_dtype_that_is_not_the_stored_one(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense")
    path = tmp_path / "dense" / FOLDER / ".metadata"
    metadata = FileSystemReader(path.parent).read_metadata()
    metadata.state_dict_metadata[NORM].properties.dtype = torch.int32
    path.write_bytes(pickle.dumps(metadata))
    with (
        as_megatron_loads(path.parent, None) as view,
        pytest.raises((Damaged, dcp.api.CheckpointException), match=r"and \.metadata says"),
    ):
        dcp.load({NORM: torch.empty(H)}, storage_reader=FileSystemReader(view))


def test_no_setting_of_a_checkpoint_is_imported() -> None:
    """Options that a user may name with dots: the router's name is typed, others are set aside."""
    choices = {row.dest.removeprefix("ep_") for row in TABLE} & HOME.keys()
    assert {"router", "dispatcher", "gemm", "overlap"} <= choices
    for choice in choices - {"router"}:
        assert "." not in (saved_model._PLAIN[f"ep_{choice}"] or "")
