"""Run arguments that say another model than the tensors are: each is held against the shapes."""

import argparse
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_plugin.checkpoint.complete import incomplete
from ep_plugin.checkpoint.sizes_said import wrong_sizes
from ep_plugin.checkpoint.tensors import TensorInfo

MANY = settings(max_examples=100, deadline=None, database=None)
SIZE = st.integers(1, 6)
Model = tuple[dict[str, TensorInfo], argparse.Namespace]


@st.composite
def models(draw: st.DrawFn) -> Model:
    """A model whose shapes are counted here from what its arguments say."""
    heads, width, hidden, dense, own, shared, rows = (draw(SIZE) for _ in range(7))
    groups = draw(st.sampled_from([None, 1, heads]))
    gate, apart = draw(st.booleans()), draw(st.booleans())
    number = draw(st.integers(2, 4))
    args = argparse.Namespace(
        **{"hidden_size": hidden, "num_attention_heads": heads, "kv_channels": width},
        **{"group_query_attention": groups is not None, "num_query_groups": groups or 1},
        **{"ffn_hidden_size": dense, "moe_ffn_hidden_size": draw(st.sampled_from([None, own]))},
        **{"moe_shared_expert_intermediate_size": shared, "swiglu": gate},
        **{"padded_vocab_size": rows, "untie_embeddings_and_output_weights": True},
    )
    each = args.moe_ffn_hidden_size or dense
    halves = 2 if gate else 1
    qkv = 3 * heads * width if groups is None else heads * width + groups * width + groups * width
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (rows, hidden),
        "output_layer.weight": (rows, hidden),
        "decoder.final_layernorm.weight": (hidden,),
        "decoder.layers.0.self_attention.linear_qkv.weight": (qkv, hidden),
        "decoder.layers.0.mlp.linear_fc1.weight": (halves * dense, hidden),
        "decoder.layers.0.mlp.linear_fc2.weight": (hidden, dense),
        "decoder.layers.1.mlp.shared_experts.linear_fc1.weight": (halves * shared, hidden),
        "decoder.layers.1.mlp.shared_experts.linear_fc2.weight": (hidden, shared),
    }
    experts = "decoder.layers.1.mlp.experts.experts"
    if not apart:
        shapes[f"{experts}.linear_fc1.weight"] = (number, halves * each, hidden)
        shapes[f"{experts}.linear_fc2.weight"] = (number, hidden, each)
    for expert in range(number) if apart else ():
        parts = ("_w", "_v") if gate else ("",)
        shapes |= {f"{experts}.{expert}.linear_fc1.weight{p}": (each, hidden) for p in parts}
        shapes[f"{experts}.{expert}.linear_fc2.weight"] = (hidden, each)
    return {name: TensorInfo(shape, torch.float32) for name, shape in shapes.items()}, args


@given(models())
@MANY
def test_a_model_of_its_own_arguments_is_fine(model: Model) -> None:
    assert not [*wrong_sizes(*model)]


@given(models(), st.data())
@MANY
def test_another_argument_names_what_it_contradicts(model: Model, data: st.DataObject) -> None:
    tensors, args = model
    names = {
        "num_attention_heads": "linear_qkv",
        "kv_channels": "linear_qkv",
        "ffn_hidden_size": "mlp.linear_fc2",
        "moe_shared_expert_intermediate_size": "shared_experts.linear_fc2",
        "padded_vocab_size": "output_layer",
        "swiglu": "mlp.linear_fc1",
    }
    if args.moe_ffn_hidden_size is not None:
        names["moe_ffn_hidden_size"] = "linear_fc2"
    name = data.draw(st.sampled_from(sorted(names)))
    value: Any = getattr(args, name)
    other = not value if name == "swiglu" else data.draw(SIZE.filter(lambda size: size != value))
    setattr(args, name, other)
    found = dict(wrong_sizes(tensors, args))
    assert any(names[name] in one for one in found)
    said = "ffn_hidden_size" if name == "swiglu" else name
    assert any(said in text for text in found.values())


@given(models())
@MANY
def test_what_makes_other_layers_is_not_judged(model: Model) -> None:
    tensors, args = model
    args.ffn_hidden_size += 1
    assert [*wrong_sizes(tensors, args)]
    args.experimental_attention_variant = "gated_delta_net"
    assert not [*wrong_sizes(tensors, args)]


@pytest.mark.parametrize("untied", [True, False, None])
def test_an_output_layer_of_tied_embeddings(untied: bool | None) -> None:
    args = argparse.Namespace(untie_embeddings_and_output_weights=untied)
    names = ("embedding.word_embeddings", "output_layer", "decoder.final_layernorm")
    names += ("decoder.layers.0.mlp.linear_fc2",)
    tensors = {f"{name}.weight": TensorInfo((4, 4), torch.float32) for name in names}
    found = {name for name, text in incomplete(tensors, args) if "tied" in text}
    assert found == ({"output_layer.weight"} if untied is False else set())
