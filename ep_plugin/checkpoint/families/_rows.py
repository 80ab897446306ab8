"""Rows that several families share."""

from ep_plugin.checkpoint.family import Row
from ep_plugin.checkpoint.patterns import LayerKind

_HF = "model.layers.{layer}."
_MEGATRON = "decoder.layers.{layer}."

_H, _HEADS = "hidden_size", "num_attention_heads"
_NORM, _TABLE = (_H,), ("padded_vocab_size", _H)
_QKV = "{qkv}*kv_channels"

EMBEDDING = (
    Row("model.embed_tokens.weight", "embedding.word_embeddings.weight", _TABLE),
    Row("model.norm.weight", "decoder.final_layernorm.weight", _NORM),
    Row(
        "lm_head.weight", "output_layer.weight", _TABLE, when="untie_embeddings_and_output_weights"
    ),
)
_ATTENTION = _MEGATRON + "self_attention."
ATTENTION = (
    Row(_HF + "input_layernorm.weight", _ATTENTION + "linear_qkv.layer_norm_weight", _NORM),
    Row(_HF + "self_attn.{qkv}_proj.weight", _ATTENTION + "linear_qkv.weight", (_QKV, _H), "qkv"),
    Row(
        _HF + "self_attn.o_proj.weight",
        _ATTENTION + "linear_proj.weight",
        (_H, f"{_HEADS}*kv_channels"),
    ),
)
QKV_BIAS = (Row(_HF + "self_attn.{qkv}_proj.bias", _ATTENTION + "linear_qkv.bias", (_QKV,), "qkv"),)
QK_NORM = tuple(
    Row(
        _HF + f"self_attn.{part}_norm.weight",
        _ATTENTION + f"{part}_layernorm.weight",
        ("kv_channels",),
    )
    for part in "qk"
)
# Multi-head latent attention; Megatron keeps the norms of the latents before the projections up.
_Q, _KV, _ROTARY = "q_lora_rank", "kv_lora_rank", "qk_pos_emb_head_dim"
LATENT_ATTENTION = tuple(
    Row(_HF + hf, _MEGATRON + megatron, shape)
    for hf, megatron, shape in (
        ("input_layernorm.weight", "input_layernorm.weight", _NORM),
        ("self_attn.q_a_proj.weight", "self_attention.linear_q_down_proj.weight", (_Q, _H)),
        (
            "self_attn.q_a_layernorm.weight",
            "self_attention.linear_q_up_proj.layer_norm_weight",
            (_Q,),
        ),
        (
            "self_attn.q_b_proj.weight",
            "self_attention.linear_q_up_proj.weight",
            (f"{_HEADS}*qk_head_dim+{_HEADS}*{_ROTARY}", _Q),
        ),
        (
            "self_attn.kv_a_proj_with_mqa.weight",
            "self_attention.linear_kv_down_proj.weight",
            (f"{_KV}+{_ROTARY}", _H),
        ),
        (
            "self_attn.kv_a_layernorm.weight",
            "self_attention.linear_kv_up_proj.layer_norm_weight",
            (_KV,),
        ),
        (
            "self_attn.kv_b_proj.weight",
            "self_attention.linear_kv_up_proj.weight",
            (f"{_HEADS}*qk_head_dim+{_HEADS}*v_head_dim", _KV),
        ),
        (
            "self_attn.o_proj.weight",
            "self_attention.linear_proj.weight",
            (_H, f"{_HEADS}*v_head_dim"),
        ),
    )
)


def feed_forward(hf: str, megatron: str, size: str, layers: LayerKind) -> tuple[Row, ...]:
    """Return the rows of one gated MLP of `size` channels, below these names of a layer."""
    return tuple(
        Row(_HF + hf + f"{name}.weight", _MEGATRON + megatron + ours, shape, layers=layers)
        for name, ours, shape in (
            ("gate_proj", "linear_fc1.weight_w", (size, _H)),
            ("up_proj", "linear_fc1.weight_v", (size, _H)),
            ("down_proj", "linear_fc2.weight", (_H, size)),
        )
    )


DENSE = (
    Row(
        _HF + "post_attention_layernorm.weight",
        _MEGATRON + "mlp.linear_fc1.layer_norm_weight",
        _NORM,
        layers="dense",
    ),
    *feed_forward("mlp.", "mlp.", "ffn_hidden_size", "dense"),
)
MOE_NORM = (
    Row(
        _HF + "post_attention_layernorm.weight",
        _MEGATRON + "pre_mlp_layernorm.weight",
        _NORM,
        layers="moe",
    ),
)
_ROUTER = ("num_experts", _H)
ROUTER = Row(_HF + "mlp.gate.weight", _MEGATRON + "mlp.router.weight", _ROUTER, layers="moe")
EXPERTS = feed_forward(
    "mlp.experts.{expert}.", "mlp.experts.experts.{expert}.", "moe_ffn_hidden_size", "moe"
)
SHARED = "moe_shared_expert_intermediate_size"
