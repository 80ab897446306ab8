"""On which releases of Megatron a setting is there, and how it is typed. Data that a test holds.

What is listed is a test's reading of each release's TransformerConfig and parser
(`tests/helpers/list_settings.py`). A wheel of 0.16 has no parser: what is no field there is taken
to be as on 0.17.
"""

_RELEASES = {  # releases -> settings; those of all four are not listed
    "0.16": """
        async_tensor_model_parallel_allreduce moe_extended_tp moe_use_legacy_grouped_gemm""",
    "0.17 on": """
        cpu_offloading_retain_pinned_cpu_buffers fused_residual_rmsnorm
        inference_disable_triton_nvls_kernels inference_grouped_gemm_backend
        inference_moe_disable_fused_quant_kernels mla_down_proj_fusion
        moe_hybridep_num_blocks_permute moe_hybridep_num_blocks_unpermute
        moe_pad_experts_for_cuda_graph_inference moe_permute_fusion_into_hybridep
        moe_router_force_biased mtp_hybrid_override_pattern mtp_use_repeated_layer
        mup_attn_scale_power mup_base_head_dim mup_base_hidden_size mup_embedding_mult
        mup_output_mult mup_width_mult nccl_all_reduce_for_prefill use_mup""",
    "0.18 on": """
        cuda_graph_modules cuda_graph_scope_deprecated
        fine_grained_offloading_max_inflight_offloads fp8_output_proj
        high_priority_a2a_comm_stream inference_cuda_graph_scope
        inference_moe_token_dispatcher_type mlp_chunks_for_training
        moe_expert_rank_capacity_factor moe_hybridep_num_sms_preprocessing
        moe_mlp_glu_interleave_size moe_paged_stash moe_paged_stash_buffer_size_factor_cpu
        moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_page_size
        moe_single_grouped_bias moe_single_grouped_weight
        overlap_dispatch_backward_with_experts_wgrad save_tokens_per_expert_interval
        use_grouped_gemm_for_dense_mlp use_transformer_engine_op_fuser""",
    "0.19": """
        activation_offload_fraction delay_offload_until_cuda_graph
        delta_offload_bytes_across_pp_ranks dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32
        dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu
        dsa_indexer_skip_topk_offset dsa_indexer_topk_freq dsa_kernel_backend
        experimental_attention_variant_loss_scale_func expert_gtp_weight_remat_size
        expert_tensor_parallel_num_weight_shards flash_attention_version gtp_weight_remat_size
        mamba_training_ssm_states_dtype moe_flex_dispatcher_num_sms moe_grad_scale_func
        moe_hybridep_pad_uneven_dispatch_inputs moe_ncclep_static_shape moe_ncclep_zero_copy
        moe_router_quantile_balancing_ema moe_routing_trace_capture_hidden_states
        moe_routing_trace_capture_logits moe_routing_trace_dump_weights
        moe_routing_trace_max_training_iters moe_routing_trace_path
        moe_shared_expert_glu_interleave_size mtp_detach_heads mtp_grad_scale_func
        stream_ckpt_dequant tensor_parallel_num_weight_shards use_grouped_gemm_for_shared_expert""",
}
_WITHOUT_FLAG = """
    _cpu_offloading_context activation_func activation_func_fp8_input_store
    async_tensor_model_parallel_allreduce autocast_dtype batch_p2p_comm batch_p2p_sync beta_fast
    beta_slow bias_activation_fusion cpu_offloading cpu_offloading_activations
    cpu_offloading_double_buffering cpu_offloading_weights cuda_graph_retain_backward_graph
    cuda_graph_use_single_mempool deallocate_pipeline_outputs disable_parameter_transpose_cache
    embedding_init_method enable_autocast ep_overlap_early_attn_memory_release
    experimental_attention_variant_loss_scale_func expert_gtp_weight_remat_size
    finalize_model_grads_func fp4_param fp8_dot_product_attention fp8_multi_head_attention
    fp8_param fused_single_qkv_rope gated_linear_unit grad_scale_func grad_sync_func
    gtp_weight_remat_size hetereogenous_dist_checkpoint heterogeneous_block_specs
    inference_sampling_seed init_method memory_efficient_layer_norm moe_extended_tp
    moe_grad_scale_func moe_router_topk_limited_devices moe_token_dropping
    moe_use_legacy_grouped_gemm mtp_grad_scale_func no_sync_func
    num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
    num_microbatches_with_partial_activation_checkpoints num_moe_experts
    original_max_position_embeddings output_layer_init_method param_sync_func params_dtype
    persist_layer_norm pipeline_dtype quant_recipe softmax_scale timers tp_comm_atomic_ag
    tp_comm_atomic_rs tp_comm_overlap_disable_fc1 tp_comm_overlap_disable_qkv tp_only_amax_red
    use_inference_optimized_layers use_kitchen use_te_rng_tracker variable_seq_lengths
    virtual_pipeline_model_parallel_size
"""
_FLAGS = {  # setting -> how it is typed, where that is not its name with dashes
    "add_bias_linear": "--disable-bias-linear",
    "apply_rope_fusion": "--no-rope-fusion",
    "barrier_with_L1_time": "--no-barrier-with-level-1-timing",
    "bias_dropout_fusion": "--no-bias-dropout-fusion",
    "bias_gelu_fusion": "--no-bias-gelu-fusion",
    "bias_swiglu_fusion": "--no-bias-swiglu-fusion",
    "clone_scatter_output_in_embedding": """
        --no-clone-scatter-output-in-embedding
        --disable-clone-scatter-output-in-embedding""",
    "cuda_graph_scope_deprecated": "--cuda-graph-scope",
    "dsa_indexer_rotate_activation": """
        --no-dsa-indexer-rotate-activation
        --disable-dsa-indexer-rotate-activation""",
    "dsa_indexer_scoring_relu": """
        --no-dsa-indexer-scoring-relu
        --disable-dsa-indexer-scoring-relu""",
    "fp4": "--fp4-format",
    "fp8": "--fp8-format",
    "fp8_wgrad": "--no-fp8-wgrad --disable-fp8-wgrad",
    "gradient_accumulation_fusion": "--no-gradient-accumulation-fusion",
    "layernorm_epsilon": "--norm-epsilon",
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "masked_softmax_fusion": "--no-masked-softmax-fusion",
    "microbatch_group_size_per_vp_stage": "--microbatch-group-size-per-virtual-pipeline-stage",
    "overlap_p2p_comm": "--no-overlap-p2p-communication",
    "overlap_p2p_comm_warmup_flush": "--overlap-p2p-communication-warmup-flush",
    "perform_initialization": "--no-initialization",
    "stream_ckpt_dequant": "--no-stream-ckpt-dequant --disable-stream-ckpt-dequant",
    "tp_comm_bulk_dgrad": "--no-tp-comm-bulk-dgrad --disable-tp-comm-bulk-dgrad",
    "tp_comm_bulk_wgrad": "--no-tp-comm-bulk-wgrad --disable-tp-comm-bulk-wgrad",
    "tp_comm_overlap_ag": "--no-tp-comm-overlap-ag --disable-tp-comm-overlap-ag",
    "tp_comm_overlap_rs": "--no-tp-comm-overlap-rs --disable-tp-comm-overlap-rs",
    "tp_comm_split_ag": "--no-tp-comm-split-ag --disable-tp-comm-split-ag",
    "tp_comm_split_rs": "--no-tp-comm-split-rs --disable-tp-comm-split-rs",
    "use_mamba_mem_eff_path": "--disable-mamba-mem-eff-path",
}

RELEASES = {field: when for when, fields in _RELEASES.items() for field in fields.split()}
FLAGS = {field: (field,) for field in _WITHOUT_FLAG.split()} | {
    field: tuple(names.split()) for field, names in _FLAGS.items()
}
