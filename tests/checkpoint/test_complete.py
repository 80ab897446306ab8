"""A parameter that is missing, or has another shape than belongs to the others, is found."""

import argparse
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import stored
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ep_plugin.checkpoint.complete import incomplete, not_there
from ep_plugin.checkpoint.formats.megatron_dist import open_checkpoint
from ep_plugin.checkpoint.tensors import TensorInfo
from ep_plugin.errors import ConfigError
from tests.checkpoint.test_whole import audit

MANY = settings(max_examples=100, deadline=None, database=None)
H, F = 8, 6
Shapes = dict[str, tuple[int, ...]]
ATTENTION = {
    "self_attention.linear_qkv.layer_norm_weight": (H,),
    "self_attention.linear_qkv.weight": (12, H),
    "self_attention.linear_proj.weight": (H, 4),
    "self_attention.q_layernorm.weight": (2,),
}
LATENT = {"input_layernorm.weight": (H,), "self_attention.linear_proj.weight": (H, 4)}
LATENT |= {"self_attention.linear_kv_down_proj.weight": (3, H)}
DENSE = {
    "mlp.linear_fc1.layer_norm_weight": (H,),
    "mlp.linear_fc1.weight": (2 * F, H),
    "mlp.linear_fc2.weight": (H, F),
}


def experts(count: int) -> Shapes:
    return {
        "pre_mlp_layernorm.weight": (H,),
        "mlp.router.weight": (count, H),
        "mlp.experts.experts.linear_fc1.weight": (count, 2 * F, H),
        "mlp.experts.experts.linear_fc2.weight": (count, H, F),
    }


@st.composite
def models(draw: st.DrawFn) -> Shapes:
    """A model of two layers of each kind and more, in any order."""
    counts = st.integers(1, 4)
    kinds = [DENSE, DENSE, experts(draw(counts)), experts(draw(counts))]
    kinds += [DENSE] * draw(st.integers(0, 3)) + [experts(2)] * draw(st.integers(0, 3))
    attention = draw(st.sampled_from((ATTENTION, LATENT)))
    found = {"embedding.word_embeddings.weight": (4, H), "output_layer.weight": (4, H)}
    found["decoder.final_layernorm.weight"] = (H,)
    for layer, kind in enumerate(draw(st.permutations(kinds))):
        below = {**attention, **kind}
        found |= {f"decoder.layers.{layer}.{name}": shape for name, shape in below.items()}
    return found


def wrong(shapes: Shapes) -> set[str]:
    args = argparse.Namespace(hidden_size=H, untie_embeddings_and_output_weights=True)
    tensors = {name: TensorInfo(shape, torch.float32) for name, shape in shapes.items()}
    return {name for name, _ in incomplete(tensors, args)}


def test_kinds_of_attention_in_one_model_have_shapes_of_their_own() -> None:
    wide = LATENT | {"self_attention.linear_proj.weight": (H, 6)}
    model = {"embedding.word_embeddings.weight": (4, H), "output_layer.weight": (4, H)}
    model["decoder.final_layernorm.weight"] = (H,)
    for layer, kind in enumerate((ATTENTION, wide, ATTENTION, wide, wide)):
        model |= {f"decoder.layers.{layer}.{name}": shape for name, shape in kind.items()}
    assert wrong(model) == set()
    name = "decoder.layers.3.self_attention.linear_proj.weight"
    assert wrong(model | {name: (H, 4)}) == {name}


@MANY
@given(models(), st.data())
def test_what_is_missing_or_of_another_shape_is_named(model: Shapes, data: st.DataObject) -> None:
    assert wrong(model) == set()
    name = data.draw(st.sampled_from(sorted(model)))
    without = {other: shape for other, shape in model.items() if other != name}
    assert name in wrong(without)
    if not re.search(r"\.experts\.", name):  # audit holds experts against one another
        shape = (*model[name][:-1], model[name][-1] + 1)
        shape = data.draw(st.sampled_from((shape, (), (1, *model[name]), (0, *model[name][1:]))))
        if not (name.endswith(("router.weight", *("embeddings.weight", "output_layer.weight")))
                and shape[1:] == (H,) and len(shape) == 2):  # fmt: skip
            found = wrong(model | {name: shape})
            same = {other for other in model if other.split(".")[3:] == name.split(".")[3:]}
            assert found
            assert found <= same


QKV, PROJ = "self_attention.linear_qkv", "self_attention.linear_proj"
Q, KV = "self_attention.linear_q", "self_attention.linear_kv"
# Run arguments, and what they alone add to each layer: as Megatron 0.19 saves it.
ASKED: list[tuple[dict[str, object], tuple[str, ...]]] = [
    ({"add_bias_linear": True}, (f"{PROJ}.bias", f"{QKV}.bias", "mlp.linear_fc2.bias")),
    ({"add_qkv_bias": True}, (f"{QKV}.bias",)),
    ({"qk_layernorm": True},
     ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")),
    ({"normalization": "LayerNorm"}, (f"{QKV}.layer_norm_bias", "mlp.linear_fc1.layer_norm_bias")),
    ({"num_experts": 4, "moe_layer_freq": 1, "moe_router_enable_expert_bias": True},
     ("mlp.router.expert_bias",)),
    ({"num_experts": 4, "moe_layer_freq": 1, "moe_shared_expert_intermediate_size": 8,
      "moe_shared_expert_gate": True},
     ("mlp.shared_experts.linear_fc1.weight", "mlp.shared_experts.gate_weight")),
    ({"multi_latent_attention": True, "qk_layernorm": True},
     (f"{Q}_proj.weight", f"{KV}_down_proj.weight", f"{KV}_up_proj.layer_norm_weight")),
    ({"multi_latent_attention": True, "q_lora_rank": 8},
     (f"{Q}_down_proj.weight", f"{Q}_up_proj.weight", f"{KV}_up_proj.weight")),
    ({"hybrid_layer_pattern": "*-*-"}, (f"{PROJ}.weight",)),
]  # fmt: skip


@pytest.mark.parametrize(("more", "added"), ASKED)
def test_what_all_layers_lack_and_run_arguments_ask_for(
    more: dict[str, object], added: tuple[str, ...]
) -> None:
    args = argparse.Namespace(**{
        "hidden_size": H, "ffn_hidden_size": F, "num_layers": 4, "num_attention_heads": 2,
        "normalization": "RMSNorm", **more,
    })  # fmt: skip
    asked = dict(not_there({"decoder.layers.0.x", "decoder.layers.1.x"}, args))
    outside = {name for name in asked if ".layers." not in name}
    model = {name.replace(".1.", f".{layer}.") for layer in range(4) for name in asked} | outside
    if "hybrid_layer_pattern" in more:  # layers 0 and 2 have attention, 1 and 3 an FFN
        model |= {name.replace(".0.", ".2.") for name in asked}
    assert not list(not_there(model, args))
    for name in added:
        without = {one for one in model if not one.endswith(name)}
        assert len(without) < len(model), name
        lacking = [found for found, _ in not_there(without, args)]
        assert {found.partition(".layers.")[2].partition(".")[2] for found in lacking} == {name}


def test_positions_that_are_learned_are_there() -> None:
    args = argparse.Namespace(position_embedding_type="learned_absolute", num_layers=1)
    names = {"decoder.layers.0.x", "embedding.position_embeddings.weight"}
    assert not list(not_there(names, args))
    missing = list(not_there({"decoder.layers.0.x"}, args))
    assert [name for name, _ in missing] == ["embedding.position_embeddings.weight"]


@pytest.mark.parametrize("name", ["attention", "router"])
def test_audit_names_what_all_layers_lack(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = stored.healthy()
    vars(content.common["args"]).update(hidden_size=stored.H, num_attention_heads=2)
    if name == "router":
        content.common["args"].moe_router_enable_expert_bias = True
    for part in ("qkv.weight", "proj.weight") if name == "router" else ("qkv.weight",):
        key = f"decoder.layers.self_attention.linear_{part}"
        for state in stored.STATES:
            content.add(state + key, torch.ones(stored.L, 3, stored.H))
    code, said = audit(stored.write(content, tmp_path / "moe"), capsys)
    assert code == 1
    lacks = {"attention": "self_attention.linear_proj.weight", "router": "mlp.router.expert_bias"}
    found = {one["where"]: one["message"] for one in json.loads(said)}
    for layer in range(stored.L):
        said = found[f"decoder.layers.{layer}.{lacks[name]}"]
        assert said == "is missing, and by the run arguments it must be there"


@pytest.mark.parametrize("name", ["of_another_plugin", "qk_l2_norm", "linear_attention_freq"])
def test_run_arguments_that_are_tensors_are_read(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = stored.healthy()
    vars(content.common["args"]).update(hidden_size=stored.H, num_attention_heads=2)
    setattr(content.common["args"], name, torch.ones(3))
    code, said = audit(stored.write(content, tmp_path / "moe"), capsys)
    found = [one["where"] for one in json.loads(said)]
    if name == "linear_attention_freq":  # layers that are no GPT's
        assert (code, found) == (0, [])
    else:
        assert (code, len(found)) == (1, 2 * stored.L)


@pytest.mark.parametrize(
    ("router", "asked"), [(None, True), ("expert_choice", True), ("mine.router", False)]
)
def test_a_router_of_one_s_own_may_have_other_parameters(router: str | None, asked: bool) -> None:
    args = argparse.Namespace(num_layers=1, num_experts=4, moe_layer_freq=1, ep_router=router)
    missing = [name for name, _ in not_there({"decoder.layers.0.x"}, args)]
    assert ("decoder.layers.0.mlp.router.weight" in missing) is asked


def test_the_only_layer_of_a_kind_is_held_against_itself() -> None:
    name = "mlp.linear_fc2.weight"
    layer = {f"decoder.layers.0.{n}": shape for n, shape in {**ATTENTION, **DENSE}.items()}
    outside = {"embedding.word_embeddings.weight": (4, H), "output_layer.weight": (4, H)}
    model = {**layer, **outside, "decoder.final_layernorm.weight": (H,)}
    assert wrong(model) == set()
    del model[f"decoder.layers.0.{name}"]
    assert wrong(model) == {f"decoder.layers.0.{name}"}


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint16, torch.int8, torch.complex64])
@pytest.mark.parametrize("name", [stored.TABLE, *(f"decoder.layers.0.{n}" for n in ATTENTION)])
def test_weights_are_floating_point(name: str, dtype: torch.dtype) -> None:
    args = argparse.Namespace(hidden_size=H)
    model = {name: (H,), "decoder.layers.0.mlp.linear_fc1.weight": (12, H)}
    tensors = {key: TensorInfo(shape, dtype) for key, shape in model.items()}
    assert (name, f"is {dtype}, which no weight is") in incomplete(tensors, args)


def test_a_model_of_no_layers_that_are_known_is_left_alone() -> None:
    assert wrong({"encoder.layers.0.self_attention.linear_qkv.weight": (3, 3)}) == set()


@pytest.mark.parametrize("key", [stored.NORM, stored.TABLE])
@pytest.mark.parametrize("spoil", ["drop", "shape"])
def test_audit_names_what_is_missing(
    key: str, spoil: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = stored.healthy()
    content.common["args"].hidden_size = stored.H
    for state in stored.STATES:
        content.drop(state + key)
    if spoil == "shape":
        content.add(key, torch.zeros(*stored.SHAPES[key], 2))
    code, said = audit(stored.write(content, tmp_path / "moe"), capsys)
    assert code == 1
    assert key in said
    assert ("missing" if spoil == "drop" else "hidden size") in said


def _entry(size: tuple[int, ...]) -> TensorStorageMetadata:
    shape = torch.Size(size)
    chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), shape)
    return TensorStorageMetadata(TensorProperties(dtype=torch.float32), shape, [chunk])


def _renamed(metadata: Metadata, old: str, new: str) -> None:
    metadata.state_dict_metadata[new] = metadata.state_dict_metadata.pop(old)
    for index in [one for one in metadata.storage_data if one.fqn == old]:
        moved = MetadataIndex(new, index.offset, index.index)
        metadata.storage_data[moved] = metadata.storage_data.pop(index)


def _object(metadata: Metadata) -> None:
    metadata.state_dict_metadata[stored.NORM] = BytesStorageMetadata()


def _no_axis(metadata: Metadata) -> None:
    metadata.state_dict_metadata["decoder.layers.mlp.x"] = _entry(())


def _huge(metadata: Metadata) -> None:
    metadata.state_dict_metadata[stored.NORM] = _entry((0, 1 << 61, 1 << 61))


def _twice(metadata: Metadata) -> None:
    alone = stored.ROUTER.replace("layers.", "layers.1.")
    metadata.state_dict_metadata[alone] = _entry((0, 3))


STRANGE: dict[Callable[[Metadata], None], str] = {
    _object: "is an object, named as a tensor is",
    _no_axis: "is of all layers, and has no axis of them",
    lambda found: _renamed(found, stored.NORM, "x/shard_0_1"): "named as an object is",
    _huge: "a shape in it is none",
    _twice: "twice, on its own and with that of all layers",
}


@pytest.mark.parametrize("spoil", STRANGE)
def test_names_that_do_not_belong_to_what_they_name(
    spoil: Callable[[Metadata], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = stored.write(stored.healthy(), tmp_path / "moe")
    (file,) = root.glob("iter_*/.metadata")
    metadata = pickle.loads(file.read_bytes())
    spoil(metadata)
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConfigError, match=STRANGE[spoil]):
        open_checkpoint(root)
    assert audit(root, capsys)[0] == 1


def test_a_router_without_an_axis_is_for_no_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = stored.healthy()
    for state in stored.STATES:
        content.drop(state + stored.ROUTER)
    content.add(stored.ROUTER, torch.zeros(stored.L))
    code, said = audit(stored.write(content, tmp_path / "moe"), capsys)
    assert code == 1
    assert "router.weight is for 0 experts" in said
