"""What the plugin relies on in every release alike; a release's own file adds the rest."""

from ep_plugin.megatron.seams.touchpoints import Touchpoint

MOE = "megatron.core.transformer.moe"
ARGUMENTS = "megatron.training.arguments"
GPT = "megatron.core.models.gpt"
MTP_LAYER = "megatron.core.transformer.multi_token_prediction:MultiTokenPredictionLayer"
_TENSOR_PARALLEL = "megatron.core.tensor_parallel"
_CHECKPOINTING = "megatron.core.dist_checkpointing"
_CONFIG = "megatron.core.transformer.transformer_config"
_UTILS = "megatron.core.transformer.utils"
_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"

HYBRID_MODEL = (  # of the releases that have it
    Touchpoint(
        "megatron.core.models.hybrid.hybrid_model:HybridModel.__init__",
        (
            "config",
            "hybrid_stack_spec",
            "vocab_size",
            "max_sequence_length",
            "hybrid_layer_pattern",
        ),
    ),
    Touchpoint("megatron.core.models.hybrid.hybrid_block:HybridStack"),
    Touchpoint("megatron.core.models.hybrid.hybrid_block:TENorm"),
    Touchpoint(
        "megatron.core.models.hybrid.hybrid_block:HybridStackSubmodules",
        ("attention_layer", "mlp_layer", "moe_layer"),
    ),
    Touchpoint("megatron.core.models.hybrid.hybrid_layer_specs:hybrid_stack_spec"),
)
_DISTRIBUTED = "megatron.core.distributed"
_TORCH_FSDP = f"{_DISTRIBUTED}.torch_fully_sharded_data_parallel:TorchFullyShardedDataParallel"
MEGATRON_FSDP = f"{_DISTRIBUTED}.fsdp.mcore_fsdp_adapter:FullyShardedDataParallel"
WRAPPERS = (  # that shard a model's parameters, in whatever way a release calls Megatron-FSDP's
    f"{_DISTRIBUTED}.fsdp.src.megatron_fsdp.megatron_fsdp:MegatronFSDP.__init__",
    f"{_TORCH_FSDP}.__init__",
)
COMMON = (
    *(Touchpoint(path, ("module",)) for path in WRAPPERS),
    # where the MoE layer's class is looked up, and its contract
    Touchpoint(f"{GPT}.moe_module_specs:MoELayer", base=f"{MOE}.moe_layer:MoELayer"),
    Touchpoint(
        f"{GPT}.moe_module_specs:get_moe_module_spec_for_backend",
        ("backend", "num_experts", "moe_grouped_gemm"),
    ),
    Touchpoint(f"{MOE}.moe_layer:MoELayer", base=f"{MOE}.moe_layer:BaseMoELayer"),
    Touchpoint(
        f"{MOE}.moe_layer:BaseMoELayer.__init__", ("config", "layer_number", "pg_collection")
    ),
    Touchpoint(f"{MOE}.moe_layer:MoELayer.forward", ("hidden_states", "padding_mask")),
    Touchpoint(
        f"{MOE}.shared_experts:SharedExpertMLP.__init__",
        ("config", "submodules", "gate", "pg_collection"),
    ),
    Touchpoint(
        "megatron.core.transformer.mlp:MLP.__init__",
        ("config", "submodules", "ffn_hidden_size", "tp_group"),
    ),
    Touchpoint("megatron.core.transformer.spec_utils:build_module", ("spec_or_module",)),
    Touchpoint("megatron.core.transformer.spec_utils:ModuleSpec", ("module", "submodules")),
    # process groups
    Touchpoint(f"{MOE}.moe_utils:get_default_pg_collection"),
    Touchpoint(f"{MOE}.moe_utils:apply_random_logits", ("logits",)),
    Touchpoint(
        "megatron.core.process_groups_config:ProcessGroupCollection",
        ("tp", "cp", "tp_cp", "tp_dp_cp", "ep", "expt_tp", "tp_ep", "expt_dp"),
    ),
    # losses
    Touchpoint(f"{MOE}.moe_utils:MoEAuxLossAutoScaler.apply"),
    Touchpoint(f"{MOE}.moe_utils:MoEAuxLossAutoScaler.set_loss_scale", ("scale",)),
    Touchpoint(
        "megatron.core.pipeline_parallel.schedules:forward_step_calc_loss",
        ("loss_func", "config", "vp_stage", "num_microbatches"),
    ),
    Touchpoint(
        "megatron.core.distributed.finalize_model_grads:_update_router_expert_bias",
        ("model", "config"),
    ),
    # distillation and generation
    Touchpoint(
        "megatron.training.training:training_log",
        ("loss_dict", "total_loss_dict", "skipped_iter"),
    ),
    Touchpoint("megatron.core.transformer.module:Float16Module", ("config", "module")),
    Touchpoint(
        f"{GPT}.gpt_model:GPTModel.forward",
        (
            *("input_ids", "position_ids", "attention_mask", "labels", "packed_seq_params"),
            *("inference_context", "runtime_gather_output"),  # generation
        ),
    ),
    Touchpoint(
        "megatron.core.models.common.language_module.language_module:"
        "LanguageModule.compute_language_model_loss",
        ("labels", "logits"),
    ),
    Touchpoint(
        "megatron.core.parallel_state:initialize_model_parallel",
        (
            *("tensor_model_parallel_size", "expert_model_parallel_size"),
            *("expert_tensor_parallel_size", "distributed_timeout_minutes"),
            "create_gloo_process_groups",
        ),
    ),
    Touchpoint(
        "megatron.core.inference.contexts:StaticInferenceContext.__init__",
        ("max_batch_size", "max_sequence_length"),
    ),
    Touchpoint(
        "megatron.core.distributed.distributed_data_parallel:"
        "DistributedDataParallel.finish_grad_sync"
    ),
    # arguments
    Touchpoint(f"{ARGUMENTS}:add_megatron_arguments", ("parser",)),
    Touchpoint(f"{ARGUMENTS}:validate_args", ("args", "defaults")),
    Touchpoint(f"{ARGUMENTS}:core_transformer_config_from_args", ("args",)),
    Touchpoint("megatron.training.initialize:initialize_megatron", ("allow_no_cuda",)),
    Touchpoint("megatron.training.global_vars:get_tensorboard_writer"),
    Touchpoint(f"{_CONFIG}:TransformerConfig.__post_init__"),
    Touchpoint(
        "megatron.core.transformer.pipeline_parallel_layer_layout:"
        "PipelineParallelLayerLayout.__init__",
        ("layout", "pipeline_model_parallel_size"),
    ),
    Touchpoint("megatron.core.transformer.module:MegatronModule.set_is_first_microbatch"),
    Touchpoint("megatron.core.transformer.cuda_graphs:TECudaGraphHelper.create_cudagraphs"),
    Touchpoint(
        "megatron.core.transformer.cuda_graphs:TECudaGraphHelper._get_cuda_graph_input_data"
    ),
    # initial values and recomputation
    Touchpoint(
        f"{_TENSOR_PARALLEL}.layers:_initialize_affine_weight_cpu",
        (
            *("weight", "output_size", "input_size", "per_partition_size", "partition_dim"),
            *("init_method", "stride", "params_dtype", "rank", "world_size"),
        ),
    ),
    Touchpoint(
        f"{_TENSOR_PARALLEL}.layers:_initialize_affine_weight_gpu",
        ("weight", "init_method", "partition_dim", "stride", "is_expert"),
    ),
    Touchpoint(f"{_TENSOR_PARALLEL}:checkpoint", ("function", "distribute_saved_activations")),
    # checkpoints
    Touchpoint(
        f"{_CHECKPOINTING}.mapping:ShardedTensor.from_rank_offsets",
        ("key", "data", "rank_offsets", "replica_id", "prepend_axis_num"),
    ),
    Touchpoint(
        f"{_CHECKPOINTING}.mapping:ShardedTensorFactory",
        ("key", "data", "build_fn", "merge_fn", "replica_id"),
    ),
    Touchpoint(f"{_CHECKPOINTING}.mapping:ShardedObject"),
    Touchpoint(
        f"{_UTILS}:make_sharded_object_for_checkpoint",
        ("obj", "key", "sharded_offsets", "replica_id"),
    ),
    Touchpoint(
        f"{_UTILS}:sharded_state_dict_default",
        ("module", "prefix", "sharded_offsets", "metadata", "tp_group"),
    ),
    Touchpoint(f"{_UTILS}:ensure_metadata_has_dp_cp_group", ("metadata",)),
    # the parity check of a converted checkpoint
    Touchpoint(f"{_CHECKPOINTING}:load", ("sharded_state_dict", "checkpoint_dir")),
    Touchpoint(f"{_CHECKPOINTING}:load_common_state_dict", ("checkpoint_dir",)),
    Touchpoint("megatron.core.parallel_state:destroy_model_parallel"),
    Touchpoint("megatron.core.parallel_state:get_data_parallel_group", ("with_context_parallel",)),
    Touchpoint(f"{_TENSOR_PARALLEL}:model_parallel_cuda_manual_seed", ("seed",)),
    Touchpoint(
        f"{GPT}:GPTModel.__init__",
        (
            *("config", "transformer_layer_spec", "vocab_size", "max_sequence_length"),
            *("share_embeddings_and_output_weights", "position_embedding_type"),
            *("rotary_percent", "rotary_base", "rope_scaling", "seq_len_interpolation_factor"),
        ),
    ),
    Touchpoint(
        f"{GPT}.gpt_layer_specs:get_gpt_decoder_block_spec",
        ("config", "use_transformer_engine", "normalization"),
    ),
    Touchpoint(
        f"{GPT}.gpt_layer_specs:get_gpt_layer_local_spec",
        ("qk_layernorm", "multi_latent_attention", "normalization"),
    ),
    Touchpoint(
        "megatron.core.transformer.moe.upcycling_utils:upcycle_state_dict",
        ("moe_model", "dense_model"),
    ),
    Touchpoint("megatron.training.global_vars:get_tokenizer"),
    # saves that are audited, and resumed at other layouts
    Touchpoint("megatron.training.training:save_checkpoint", ("iteration", "non_persistent_ckpt")),
    Touchpoint("megatron.training.training:maybe_finalize_async_save", ("blocking",)),
    Touchpoint(f"{_CHECKPOINTING}.dict_utils:nested_values"),
    Touchpoint(f"{_CHECKPOINTING}.strategies.async_utils:PersistentAsyncCaller.close"),
    Touchpoint("megatron.training.async_utils:is_empty_async_queue"),
    Touchpoint("megatron.training.training:train"),
    Touchpoint(
        "megatron.core.optimizer.optimizer:ChainedOptimizer.load_state_dict", ("state_dict",)
    ),
    # where every rank is
    Touchpoint("megatron.training.initialize:_initialize_distributed"),
    Touchpoint("megatron.training.training:load_checkpoint"),
    Touchpoint("megatron.training.training:evaluate"),
    Touchpoint("megatron.core.rerun_state_machine:RerunDataIterator.__next__"),
    Touchpoint("megatron.core.optimizer.optimizer:ChainedOptimizer.step"),
    Touchpoint("megatron.core.optimizer.optimizer:MixedPrecisionOptimizer.step"),
    Touchpoint("megatron.core.optimizer.optimizer:FP32Optimizer.step"),
    # parity of layouts
    Touchpoint(
        "megatron.training.training:train_step",
        (
            *("forward_step_func", "data_iterator", "model", "optimizer", "opt_param_scheduler"),
            *("config", "forward_backward_func"),
        ),
    ),
    Touchpoint("megatron.core.utils:unwrap_model", ("model",)),
    # which models are served
    Touchpoint("megatron.training.training:setup_model_and_optimizer"),
    Touchpoint("megatron.training:get_args"),
    Touchpoint("megatron.core.extensions.transformer_engine:HAVE_TE"),
    Touchpoint(f"{_CHECKPOINTING}:save", ("sharded_state_dict", "checkpoint_dir")),
    Touchpoint(
        "megatron.core.transformer.dot_product_attention:DotProductAttention.__init__",
        (
            *("config", "layer_number", "attn_mask_type", "attention_type", "softmax_scale"),
            *("cp_comm_type", "pg_collection"),
        ),
    ),
    # what ranks compare of the model
    Touchpoint("megatron.core.models.gpt.gpt_model:GPTModel"),
    Touchpoint("megatron.core.transformer.transformer_layer:TransformerLayer"),
    Touchpoint(MTP_LAYER),
    Touchpoint("megatron.core.ssm.mlp_layer:MLPLayer"),  # of a HybridModel on the CPU
    # latent attention on the CPU
    Touchpoint(f"{_TENSOR_PARALLEL}.mappings:gather_from_tensor_model_parallel_region", ("group",)),
    Touchpoint(f"{_TENSOR_PARALLEL}.mappings:scatter_to_sequence_parallel_region", ("group",)),
    Touchpoint("megatron.core.transformer.multi_latent_attention:HAVE_TE"),
    Touchpoint("megatron.core.transformer.multi_latent_attention:MLASelfAttention.__init__"),
    # how a process ends
    Touchpoint("megatron.core.full_cuda_graph:FullCudaGraphWrapper.cuda_graph"),
    # CPU mode, and the wheel
    Touchpoint(f"{_TENSOR_PARALLEL}.random:_lazy_call"),
    Touchpoint(f"{_TENSOR_PARALLEL}.random:device_ctx_manager"),
    Touchpoint("megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__", ("config",)),
    Touchpoint(f"{_OPTIMIZER}.state_dict"),
    Touchpoint(f"{_OPTIMIZER}.load_state_dict", ("state_dict",)),
    Touchpoint(f"{_OPTIMIZER}._get_main_param_and_optimizer_states", ("model_param",)),
    Touchpoint(f"{_OPTIMIZER}._set_main_param_and_optimizer_states", ("model_param", "tensors")),
    Touchpoint("megatron.core.datasets.utils:compile_helpers"),
    Touchpoint("megatron.core.optimizer.distrib_optimizer:HAVE_APEX_OR_TE"),
    Touchpoint("megatron.training.training:set_jit_fusion_options"),
)
