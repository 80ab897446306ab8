"""Rows that several families share."""

from ep_plugin.checkpoint.family import Row
from ep_plugin.checkpoint.patterns import LayerKind

_HF = "model.layers.{layer}."
_MEGATRON = "decoder.layers.{layer}."

EMBEDDING = (
    Row("model.embed_tokens.weight", "embedding.word_embeddings.weight"),
    Row("model.norm.weight", "decoder.final_layernorm.weight"),
    Row("lm_head.weight", "output_layer.weight", when="untie_embeddings_and_output_weights"),
)
ATTENTION = (
    Row(_HF + "input_layernorm.weight", _MEGATRON + "self_attention.linear_qkv.layer_norm_weight"),
    Row(_HF + "self_attn.{qkv}_proj.weight", _MEGATRON + "self_attention.linear_qkv.weight", "qkv"),
    Row(_HF + "self_attn.o_proj.weight", _MEGATRON + "self_attention.linear_proj.weight"),
)
QKV_BIAS = (
    Row(_HF + "self_attn.{qkv}_proj.bias", _MEGATRON + "self_attention.linear_qkv.bias", "qkv"),
)
QK_NORM = (
    Row(_HF + "self_attn.q_norm.weight", _MEGATRON + "self_attention.q_layernorm.weight"),
    Row(_HF + "self_attn.k_norm.weight", _MEGATRON + "self_attention.k_layernorm.weight"),
)
# Multi-head latent attention; Megatron keeps the norms of the latents before the projections up.
_MLA = _MEGATRON + "self_attention."
LATENT_ATTENTION = (
    Row(_HF + "input_layernorm.weight", _MEGATRON + "input_layernorm.weight"),
    Row(_HF + "self_attn.q_a_proj.weight", _MLA + "linear_q_down_proj.weight"),
    Row(_HF + "self_attn.q_a_layernorm.weight", _MLA + "linear_q_up_proj.layer_norm_weight"),
    Row(_HF + "self_attn.q_b_proj.weight", _MLA + "linear_q_up_proj.weight"),
    Row(_HF + "self_attn.kv_a_proj_with_mqa.weight", _MLA + "linear_kv_down_proj.weight"),
    Row(_HF + "self_attn.kv_a_layernorm.weight", _MLA + "linear_kv_up_proj.layer_norm_weight"),
    Row(_HF + "self_attn.kv_b_proj.weight", _MLA + "linear_kv_up_proj.weight"),
    Row(_HF + "self_attn.o_proj.weight", _MLA + "linear_proj.weight"),
)


def feed_forward(hf: str, megatron: str, layers: LayerKind) -> tuple[Row, ...]:
    """Return the rows of one gated MLP, below these names of a layer."""
    return (
        Row(
            _HF + hf + "gate_proj.weight",
            _MEGATRON + megatron + "linear_fc1.weight_w",
            layers=layers,
        ),
        Row(
            _HF + hf + "up_proj.weight", _MEGATRON + megatron + "linear_fc1.weight_v", layers=layers
        ),
        Row(
            _HF + hf + "down_proj.weight", _MEGATRON + megatron + "linear_fc2.weight", layers=layers
        ),
    )


DENSE = (
    Row(
        _HF + "post_attention_layernorm.weight",
        _MEGATRON + "mlp.linear_fc1.layer_norm_weight",
        layers="dense",
    ),
    *feed_forward("mlp.", "mlp.", "dense"),
)
MOE_NORM = (
    Row(
        _HF + "post_attention_layernorm.weight",
        _MEGATRON + "pre_mlp_layernorm.weight",
        layers="moe",
    ),
)
ROUTER = Row(_HF + "mlp.gate.weight", _MEGATRON + "mlp.router.weight", layers="moe")
EXPERTS = feed_forward("mlp.experts.{expert}.", "mlp.experts.experts.{expert}.", "moe")
