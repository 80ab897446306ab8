"""Run arguments as the flags that ask Megatron for them: what a user of a converted model types."""

import argparse

_VALUES = {  # flag -> argument, where it is set
    "--num-layers": "num_layers",
    "--hidden-size": "hidden_size",
    "--ffn-hidden-size": "ffn_hidden_size",
    "--num-attention-heads": "num_attention_heads",
    "--kv-channels": "kv_channels",
    "--max-position-embeddings": "max_position_embeddings",
    "--seq-length": "seq_length",
    "--padded-vocab-size": "padded_vocab_size",
    "--normalization": "normalization",
    "--norm-epsilon": "layernorm_epsilon",
    "--init-method-std": "init_method_std",
    "--position-embedding-type": "position_embedding_type",
    "--rotary-base": "rotary_base",
    "--window-size": "window_size",
    "--transformer-impl": "transformer_impl",
    "--ep-dense-activation": "ep_dense_activation",
}
# argument -> flags that count where it is set
_VALUES_WITH = {
    "group_query_attention": {"--num-query-groups": "num_query_groups"},
    "use_rope_scaling": {"--rope-scaling-factor": "rope_scaling_factor"},
    "use_mup": {
        "--mup-embedding-mult": "mup_embedding_mult",
        "--mup-attn-scale-power": "mup_attn_scale_power",
    },
    "num_experts": {
        "--ep-expert-activation": "ep_expert_activation",
        "--ep-shared-expert": "ep_shared_expert",
        "--num-experts": "num_experts",
        "--moe-ffn-hidden-size": "moe_ffn_hidden_size",
        "--moe-layer-freq": "moe_layer_freq",
        "--moe-router-topk": "moe_router_topk",
        "--moe-router-score-function": "moe_router_score_function",
        "--moe-router-topk-scaling-factor": "moe_router_topk_scaling_factor",
        "--moe-router-num-groups": "moe_router_num_groups",
        "--moe-router-group-topk": "moe_router_group_topk",
        "--ep-group-score-topk": "ep_group_score_topk",
        "--moe-router-load-balancing-type": "moe_router_load_balancing_type",
        "--moe-aux-loss-coeff": "moe_aux_loss_coeff",
        "--moe-shared-expert-intermediate-size": "moe_shared_expert_intermediate_size",
        "--moe-token-dispatcher-type": "moe_token_dispatcher_type",
    },
    "multi_latent_attention": {
        "--q-lora-rank": "q_lora_rank",
        "--kv-lora-rank": "kv_lora_rank",
        "--qk-head-dim": "qk_head_dim",
        "--qk-pos-emb-head-dim": "qk_pos_emb_head_dim",
        "--v-head-dim": "v_head_dim",
        "--rope-type": "rope_type",
        "--rotary-scaling-factor": "rotary_scaling_factor",
        "--mscale": "mscale",
        "--mscale-all-dim": "mscale_all_dim",
    },
}
_SWITCHES = {  # flag -> argument, given when the argument is true
    "--swiglu": "swiglu",
    "--apply-layernorm-1p": "layernorm_zero_centered_gamma",
    "--use-mup": "use_mup",
    "--group-query-attention": "group_query_attention",
    "--add-qkv-bias": "add_qkv_bias",
    "--qk-layernorm": "qk_layernorm",
    "--untie-embeddings-and-output-weights": "untie_embeddings_and_output_weights",
    "--use-rope-scaling": "use_rope_scaling",
    "--multi-latent-attention": "multi_latent_attention",
    "--moe-router-pre-softmax": "moe_router_pre_softmax",
    "--moe-router-enable-expert-bias": "moe_router_enable_expert_bias",
    "--moe-shared-expert-gate": "moe_shared_expert_gate",
    "--bf16": "bf16",
    "--fp16": "fp16",
}


def run_flags(args: argparse.Namespace) -> list[str]:
    """Return the flags of a model with these arguments; data and optimizer are the user's."""
    flags = [] if args.add_bias_linear else ["--disable-bias-linear"]
    flags += [flag for flag, name in _SWITCHES.items() if getattr(args, name, False)]
    values = dict(_VALUES)
    for condition, more in _VALUES_WITH.items():
        if getattr(args, condition, None):
            values |= more
    for flag, name in values.items():
        value = getattr(args, name, None)
        if value is not None:
            flags += [flag, _text(value)]
    return flags


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).replace(" ", "")
