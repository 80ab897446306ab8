"""Megatron's own settings, a row for each: what our block does with it.

    acts        our block, or Megatron around it, honours the values in `legal`
    no effect   it names how Megatron's own block works inside; results stay what was asked for
    outside     it is about parts that our block neither has nor reads
    refused     nobody would honour it, so giving it is an error

A setting is a field of TransformerConfig or an argument of the command line; a release may have
fewer than all. Data alone: `theirs.check` reads it, and gives `when` its `Given`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

When = Callable[[Any], bool]  # of a `theirs.Given`


def _always(_: Any) -> bool:
    return True


@dataclass(frozen=True)
class Theirs:
    """One setting of Megatron's."""

    field: str  # of TransformerConfig, or an argument's destination
    effect: Literal["acts", "no effect", "outside", "refused"]
    legal: tuple[Any, ...] = ()  # of acts: the values honoured; (): all
    why: str = ""  # of no effect: why; else what follows the flag and its value in the error
    flag: str | None = None  # as typed; None: "--" and the field with dashes; "": there is none
    off: tuple[Any, ...] = (None, False)  # values that ask for nothing
    when: When = _always  # else the value asks for nothing, or a setting of ours takes its place

    @property
    def name(self) -> str:
        """Return how a user types it: its flag, or the field's name."""
        return f"--{self.field.replace('_', '-')}" if self.flag is None else self.flag or self.field


def _some(field: str, legal: tuple[str, ...], why: str, **more: Any) -> Theirs:
    return Theirs(field, "acts", legal=legal, why=why, **more)


def refused(field: str, why: str, **more: Any) -> Theirs:
    """Return the row of a setting that nobody would honour; `why` ends with what to write."""
    return Theirs(field, "refused", why=why, **more)


def _no_own_activation(given: Any) -> bool:
    return given.own("expert_activation") is None


def _no_own_fp8(given: Any) -> bool:
    return given.own("fp8") is None


def _fp8_experts(given: Any) -> bool:
    own = given.own("fp8")
    return bool(given.fp8) if own is None else own != "off"


def _graphs(given: Any) -> bool:
    return given.cuda_graph_impl not in (None, "none")


def _more_shards(given: Any) -> bool:
    size = given.tensor_model_parallel_size or 1
    return bool(given.tensor_parallel_num_weight_shards != size)


def _more_expert_shards(given: Any) -> bool:
    size = given.expert_tensor_parallel_size or given.tensor_model_parallel_size or 1
    return bool(given.expert_tensor_parallel_num_weight_shards != size)


ALL_VALUES = """
    moe_router_topk moe_router_pre_softmax moe_router_num_groups moe_router_group_topk
    moe_router_topk_scaling_factor moe_router_topk_limited_devices moe_input_jitter_eps
    moe_router_enable_expert_bias moe_router_bias_update_rate
    moe_aux_loss_coeff moe_z_loss_coeff moe_grad_scale_func moe_per_layer_logging
    moe_enable_deepep moe_shared_expert_overlap
    moe_router_force_load_balancing moe_router_quantile_balancing_ema
    moe_expert_capacity_factor
    num_experts num_moe_experts moe_layer_freq moe_ffn_hidden_size ffn_hidden_size hidden_size
    num_layers mtp_num_layers add_bias_linear gated_linear_unit swiglu
    moe_shared_expert_intermediate_size moe_shared_expert_gate
    use_grouped_gemm_for_shared_expert moe_shared_expert_glu_interleave_size
    init_method output_layer_init_method init_method_std perform_initialization
    use_cpu_initialization fp16 bf16 params_dtype deterministic_mode
    calculate_per_token_loss mlp_chunks_for_prefill mlp_chunks_for_training
    tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size
    expert_model_parallel_size expert_tensor_parallel_size sequence_parallel
    overlap_moe_expert_parallel_comm ep_overlap_early_attn_memory_release
    high_priority_a2a_comm_stream
    recompute_activations moe_layer_recompute fine_grained_activation_offloading
    enable_cuda_graph external_cuda_graph
"""
TYPED = {  # flags that are not the field's name; "": none
    "num_moe_experts": "--num-experts",
    "add_bias_linear": "--disable-bias-linear",
    "perform_initialization": "--no-initialization",
    "gated_linear_unit": "",
    "moe_router_topk_limited_devices": "",
}

_ACTIVATION = (
    "is an activation that the experts do not have; use --ep-expert-activation swiglu, geglu, "
    "geglu_tanh, gelu or relu"
)
_SOME_GRAPHS = (
    "would capture parts of an MoE layer that ep_plugin's does not have; use attn, mlp and "
    "mamba alone, or --cuda-graph-impl full_iteration, or transformer_engine without modules"
)
_KEPT = (
    "; use --ep-save fp8 or recompute, or --recompute-granularity selective with "
    "--recompute-modules moe"
)

SOME_VALUES = (
    _some(
        "moe_router_load_balancing_type",
        ("aux_loss", "seq_aux_loss", "global_aux_loss", "quantile_balancing", "none"),
        "is not a balancing that our router has",
    ),
    _some(
        "moe_router_score_function",
        ("softmax", "sigmoid"),
        "is a score that our router does not have",
    ),
    _some(
        "moe_router_dtype",
        ("fp32", "fp64"),
        "is a dtype that our router does not compute in",
    ),
    _some(
        "moe_token_drop_policy",
        ("probs", "position"),
        "is a policy that our router does not have",
    ),
    _some(
        "moe_token_dispatcher_type",
        ("allgather", "alltoall", "flex"),
        "is not a dispatcher of Megatron's",
    ),
    _some(
        "moe_flex_dispatcher_backend",
        ("deepep", "hybridep", "ncclep"),
        "is not a backend of Megatron's flex dispatcher",
    ),
    _some(
        "activation_func",
        ("silu", "gelu", "gelu_tanh", "relu"),
        _ACTIVATION,
        flag="",
        when=_no_own_activation,
    ),
    _some(
        "transformer_impl",
        ("local", "transformer_engine"),
        "builds layers for inference, which have no place for our block",
    ),
    _some(
        "recompute_granularity",
        ("full", "selective"),
        "is not a granularity of Megatron's",
    ),
    _some(
        "recompute_modules",
        (
            "moe",
            "moe_act",
            "shared_experts",
            "mlp",
            "layernorm",
            "core_attn",
            "mla_up_proj",
            "gdn_norm_out",
        ),
        "has a part that Megatron does not recompute",
        when=lambda given: bool(given.selective),
    ),
    _some(
        "offload_modules",
        ("attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm"),
        f"has a part of Megatron's own experts{_KEPT}",
        when=lambda given: bool(given.fine_grained_activation_offloading),
    ),
    _some(
        "fp8",
        ("e4m3", "hybrid"),
        "is a format that the experts do not have",
        flag="--fp8-format",
        when=lambda given: bool(given.fp8) and _fp8_experts(given),
    ),
    _some(
        "fp8_recipe",
        ("delayed", "tensorwise", "blockwise"),
        "has no counterpart for the experts; use --ep-fp8 rowwise, blockwise or off",
        when=lambda given: bool(given.fp8) and _no_own_fp8(given),
    ),
    _some(
        "cuda_graph_impl",
        ("none", "local", "transformer_engine", "full_iteration"),
        "is not an implementation of Megatron's",
    ),
    _some(
        "optimizer",
        ("adam", "sgd", "lion", "muon", "dist_muon"),
        "takes single matrices alone, and the experts' weights are stacks of them here; use "
        "--optimizer muon, or adam, sgd or lion",
    ),
    *(
        _some(
            field,
            ("attn", "mlp", "mamba", "full_iteration", "full"),
            _SOME_GRAPHS,
            flag=flag,
            when=_graphs,
        )
        for field, flag in (
            ("cuda_graph_modules", None),
            ("cuda_graph_scope", None),
            ("cuda_graph_scope_deprecated", "--cuda-graph-scope"),
        )
    ),
)

NO_EFFECT = {  # why -> settings
    "experts take the tokens there are: padding has probability 0 and changes no result": """
        moe_pad_expert_input_to_capacity""",
    "our router is one kernel already": "moe_router_fusion",
    "rows are padded inside the products where a kernel needs it": """
        moe_router_padding_for_quantization moe_router_padding_for_fp8""",
    "our permutation always is fused": "moe_permute_fusion",
    "the experts' bias, activation and probability are one function of our own": """
        bias_activation_fusion bias_gelu_fusion bias_swiglu_fusion use_te_activation_func
        use_fused_weighted_squared_relu""",
    "the experts' products always are grouped, and their parameters are our own": """
        moe_grouped_gemm moe_use_legacy_grouped_gemm moe_single_grouped_weight
        moe_single_grouped_bias use_transformer_engine_op_fuser""",
    "our weight gradients are added to main_grad wherever it is fp32": """
        gradient_accumulation_fusion""",
    "the experts' FP8 scales are those of the values at hand, without a history": """
        fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo tp_only_amax_red""",
    "our FP8 weights are made once a step, and are read without a transpose": """
        disable_parameter_transpose_cache keep_fp8_transpose_cache""",
    "is about recipe custom, and --ep-fp8 is the experts' recipe": "fp8_quantizer_factory",
    "belongs to --first-last-layers-bf16, which FP8 experts refuse": """
        num_layers_at_start_in_bf16 num_layers_at_end_in_bf16""",
    "belongs to --fp4-format, which is refused": """
        fp4_recipe fp4_param fp4_param_gather fp4_quantizer_factory""",
    "belongs to --moe-routing-trace-path, which is refused": """
        moe_routing_trace_max_training_iters moe_routing_trace_capture_logits
        moe_routing_trace_capture_hidden_states moe_routing_trace_dump_weights""",
    "belongs to --moe-paged-stash, which is refused": """
        moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda
        moe_paged_stash_buffer_size_factor_cpu""",
    "belongs to --moe-use-upcycling, which is refused": "moe_upcycling_granularity",
    "is about Megatron's own flex dispatcher": """
        moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_num_sms
        moe_hybridep_num_sms_preprocessing moe_hybridep_num_blocks_permute
        moe_hybridep_num_blocks_unpermute moe_hybridep_pad_uneven_dispatch_inputs
        moe_permute_fusion_into_hybridep moe_ncclep_static_shape moe_ncclep_zero_copy""",
    "belongs to --transformer-impl inference_optimized, which is refused": """
        inference_moe_token_dispatcher_type inference_grouped_gemm_backend
        inference_moe_disable_fused_quant_kernels""",
}

_LOADS = "; use --tensorboard-dir FOLDER, which gets each expert's share"
_SHARDS = "spreads weights over groups of ranks that our block does not know; use "
_OFFLOAD = f"moves what Transformer Engine's layers keep, not what our experts keep{_KEPT}"
MEGATRON_FSDP = (  # Megatron's wrapper of a loop of one's own is refused with the same words
    "saves each expert under a name with its number, and ours are stacks of experts, which it "
    "could not save; use --use-distributed-optimizer with --ckpt-format torch_dist"
)
TORCH_FSDP = (
    "shards every weight over the same ranks, those that hold other experts too, and is not tested "
    "with our experts; use --use-distributed-optimizer"
)
_FP8_WEIGHTS = "keeps weights in FP8, and our experts' stay in bf16; leave it out, or use "
_NAMED = (
    "chooses recipes by names of modules, and our experts' are not asked; use --ep-fp8 rowwise, "
    "blockwise or off beside it"
)

REFUSED = (
    refused(
        "moe_router_force_biased",
        "adds random numbers to logits, and our router adds none; leave it out",
    ),
    refused("use_megatron_fsdp", MEGATRON_FSDP),
    refused("use_torch_fsdp2", TORCH_FSDP),
    refused("moe_enable_routing_replay", "needs Megatron's own router; leave it out"),
    refused("moe_routing_trace_path", f"needs Megatron's own router{_LOADS}"),
    refused("save_tokens_per_expert_interval", f"needs Megatron's own experts{_LOADS}"),
    refused(
        "moe_expert_rank_capacity_factor",
        "drops the tokens of a rank beyond so many, and ours drops none and bounds their memory; "
        "use --ep-rank-capacity 1.25",
    ),
    refused(
        "moe_token_dropping",
        "is not read by Megatron; use moe_expert_capacity_factor=1.25",
        flag="",
    ),
    refused(
        "moe_pad_experts_for_cuda_graph_inference",
        "pads Megatron's own experts; use --ep-dispatcher symm_mem",
    ),
    refused("moe_paged_stash", "is for Megatron's own experts; use --ep-save fp8 or recompute"),
    refused("squared_relu", _ACTIVATION, when=_no_own_activation),
    refused("quick_geglu", _ACTIVATION, when=_no_own_activation),
    refused(
        "glu_linear_offset",
        "is added to the linear half by Megatron, and by our experts not; leave it out",
    ),
    refused(
        "activation_func_clamp_value",
        "bounds the activation's input, and our experts do not; leave it out",
    ),
    refused(
        "activation_func_fp8_input_store",
        "is not read by our experts; use --ep-save fp8",
        flag="",
        when=lambda given: given.own("save") != "fp8",
    ),
    refused(
        "moe_mlp_glu_interleave_size",
        "mixes rows of gate and linear half, and our experts keep them apart; leave it out",
    ),
    refused(
        "moe_apply_probs_on_input",
        "weighs what experts read, and ours weigh the activation; leave it out",
    ),
    refused("moe_latent_size", "shrinks tokens for the experts, and ours read all; leave it out"),
    refused(
        "moe_use_upcycling",
        "makes Megatron's own block; use ep-plugin convert --from DENSE --to EXPERTS "
        "--num-experts 8 --topk 2, then --load EXPERTS",
    ),
    refused(
        "init_model_with_meta_device",
        "makes parameters without storage, and our experts' have it at once; leave it out",
    ),
    refused(
        "batch_invariant_mode",
        "wants bits of a token that no other token changes, and our experts do not promise that; "
        "leave it out",
    ),
    refused(
        "moe_extended_tp", "is not read by Megatron; use expert_tensor_parallel_size=2", flag=""
    ),
    refused(
        "tensor_parallel_num_weight_shards",
        f"{_SHARDS}--tensor-model-parallel-size 2",
        when=_more_shards,
    ),
    refused(
        "expert_tensor_parallel_num_weight_shards",
        f"{_SHARDS}--expert-tensor-parallel-size 2",
        when=_more_expert_shards,
    ),
    refused(
        "gtp_weight_remat_size", f"{_SHARDS}tensor_model_parallel_size=2", flag="", off=(None, 1)
    ),
    refused(
        "expert_gtp_weight_remat_size",
        f"{_SHARDS}expert_tensor_parallel_size=2",
        flag="",
        off=(None, 1),
    ),
    refused(
        "delay_wgrad_compute",
        "delays weight gradients, and our block computes them in the backward; leave it out",
    ),
    refused(
        "overlap_dispatch_backward_with_experts_wgrad",
        "is Megatron's; use --ep-overlap chunked",
    ),
    refused("cpu_offloading_num_layers", _OFFLOAD),
    refused("cpu_offloading", _OFFLOAD, flag=""),
    refused(
        "fp8_wgrad",
        "is not read for the experts; use --ep-fp8-wgrad bf16 beside it",
        flag="--no-fp8-wgrad",
        off=(None, True),
        when=lambda given: _fp8_experts(given) and given.own("fp8_wgrad") is None,
    ),
    refused("fp8_param", f"{_FP8_WEIGHTS}--ep-fp8 off", flag="", when=_fp8_experts),
    refused("fp8_param_gather", f"{_FP8_WEIGHTS}--ep-fp8 off", when=_fp8_experts),
    refused(
        "first_last_layers_bf16",
        "keeps whole layers in bf16, and their experts would run in FP8; leave it out, or use "
        "--ep-fp8 off",
        when=_fp8_experts,
    ),
    refused(
        "fp4",
        "has no counterpart for the experts; use --fp8-format e4m3, or --ep-fp8 rowwise",
        flag="--fp4-format",
    ),
    refused("te_precision_config_file", _NAMED, when=_no_own_fp8),
    refused("quant_recipe", _NAMED, flag="", when=_no_own_fp8),
    refused("use_kitchen", _NAMED, flag="", when=_no_own_fp8),
)

OUTSIDE = {  # what they are about -> settings
    "ranks, pipeline and training loop": """
        pipeline_model_parallel_comm_backend virtual_pipeline_model_parallel_size pipeline_dtype
        hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank hybrid_context_parallel
        cp_comm_type timers finalize_model_grads_func grad_scale_func no_sync_func grad_sync_func
        param_sync_func enable_autocast autocast_dtype variable_seq_lengths overlap_p2p_comm
        batch_p2p_comm batch_p2p_sync use_ring_exchange_p2p deallocate_pipeline_outputs
        defer_embedding_wgrad_compute wgrad_deferral_limit overlap_p2p_comm_warmup_flush
        microbatch_group_size_per_vp_stage num_layers_in_first_pipeline_stage
        num_layers_in_last_pipeline_stage pipeline_model_parallel_layout
        account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
        barrier_with_L1_time test_mode config_logger_dir disable_bf16_reduced_precision_matmul
        overlap_grad_reduce overlap_param_gather overlap_param_gather_with_optimizer_step
        optimizer_cpu_offload optimizer_cuda_graph optimizer_offload_fraction
        use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d save_wgrads_interval
        reuse_grad_buf_for_mxfp8_param_ag stream_ckpt_dequant hetereogenous_dist_checkpoint""",
    "attention, norms, embedding, output and dense blocks": """
        num_attention_heads attention_backend softmax_scale softmax_type num_query_groups
        kv_channels hidden_dropout attention_dropout fp32_residual_connection layernorm_epsilon
        apply_residual_connection_post_layernorm layernorm_zero_centered_gamma add_qkv_bias
        rotary_interleaved window_size window_attn_skip_freq normalization qk_layernorm
        qk_l2_norm qk_clip qk_clip_alpha qk_clip_threshold log_max_attention_logit
        attention_output_gate multi_latent_attention no_rope_freq apply_query_key_layer_scaling
        attention_softmax_in_fp32 masked_softmax_fusion persist_layer_norm
        memory_efficient_layer_norm bias_dropout_fusion apply_rope_fusion fused_single_qkv_rope
        fused_residual_rmsnorm clone_scatter_output_in_embedding embedding_init_method
        embedding_init_method_std cross_entropy_loss_fusion cross_entropy_fusion_impl q_lora_rank
        kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rope_type rotary_base
        rotary_percent rotary_scaling_factor original_max_position_embeddings beta_fast beta_slow
        mscale mscale_all_dim cache_mla_latents mla_down_proj_fusion mrope_section
        flash_attention_version experimental_attention_variant
        experimental_attention_variant_loss_scale_func dsa_indexer_n_heads dsa_indexer_head_dim
        dsa_indexer_topk dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss dsa_indexer_topk_freq
        dsa_indexer_skip_topk_offset dsa_kernel_backend dsa_indexer_rope_interleaved
        dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon
        dsa_indexer_k_norm_fp32 linear_attention_freq linear_conv_kernel_dim linear_key_head_dim
        linear_value_head_dim linear_num_key_heads linear_num_value_heads use_kitchen_attention
        kitchen_attention_backend fp8_dot_product_attention fp8_multi_head_attention
        fp8_output_proj use_grouped_gemm_for_dense_mlp openai_gelu
        async_tensor_model_parallel_allreduce""",
    "Mamba, multi-token prediction, widths, other layers": """
        is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads
        use_mamba_mem_eff_path mamba_training_ssm_states_dtype heterogeneous_block_specs
        mtp_standalone mtp_loss_scaling_factor mtp_use_repeated_layer mtp_hybrid_override_pattern
        mtp_grad_scale_func mtp_detach_heads use_mup mup_width_mult mup_base_hidden_size
        mup_embedding_mult mup_output_mult mup_base_head_dim mup_attn_scale_power""",
    "tensor-parallel exchanges of attention, dense blocks and Megatron's shared expert": """
        tp_comm_overlap tp_comm_overlap_cfg tp_comm_bulk_wgrad tp_comm_bulk_dgrad
        tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag
        tp_comm_atomic_ag tp_comm_split_rs tp_comm_atomic_rs tp_comm_overlap_disable_qkv
        tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend use_te_rng_tracker""",
    "how, not whether, parts around our block are recomputed, moved and captured": """
        recompute_method recompute_num_layers distribute_saved_activations checkpoint_activations
        num_microbatches_with_partial_activation_checkpoints min_offloaded_tensor_size
        fine_grained_offloading_max_inflight_offloads delay_offload_until_cuda_graph
        delta_offload_bytes_across_pp_ranks activation_offload_fraction _cpu_offloading_context
        cpu_offloading_activations cpu_offloading_weights cpu_offloading_double_buffering
        cpu_offloading_retain_pinned_cpu_buffers cuda_graph_use_single_mempool
        cuda_graph_retain_backward_graph cuda_graph_warmup_steps""",
    "text generation": """
        flash_decode inference_rng_tracker inference_sampling_seed symmetric_ar_type
        use_inference_optimized_layers inference_fuse_tp_communication
        nccl_all_reduce_for_prefill inference_disable_triton_nvls_kernels
        inference_cuda_graph_scope""",
}

THEIRS = (
    *(Theirs(field, "acts", flag=TYPED.get(field)) for field in ALL_VALUES.split()),
    *SOME_VALUES,
    *(
        Theirs(field, "no effect", why=why)
        for why, fields in NO_EFFECT.items()
        for field in fields.split()
    ),
    *REFUSED,
    *(
        Theirs(field, "outside", why=f"is about {what}")
        for what, fields in OUTSIDE.items()
        for field in fields.split()
    ),
)
