"""megatron-core 0.19: what the plugin relies on."""

from ep_plugin.megatron.touchpoints import Touchpoint

_MOE = "megatron.core.transformer.moe"
_ARGUMENTS = "megatron.training.arguments"

TOUCHPOINTS = (
    # where the MoE layer's class is looked up, and its contract
    Touchpoint("megatron.core.models.gpt.moe_module_specs:MoELayer"),
    Touchpoint(
        "megatron.core.models.gpt.moe_module_specs:get_moe_module_spec_for_backend",
        ("backend", "num_experts", "moe_grouped_gemm"),
    ),
    Touchpoint(
        f"{_MOE}.moe_layer:MoELayer.__init__",
        ("config", "submodules", "layer_number", "pg_collection", "is_mtp_layer", "name"),
    ),
    Touchpoint(
        f"{_MOE}.moe_layer:BaseMoELayer.__init__",
        ("config", "layer_number", "pg_collection", "is_mtp_layer"),
    ),
    Touchpoint(f"{_MOE}.moe_layer:MoELayer.forward", ("hidden_states", "padding_mask")),
    # losses and logging
    Touchpoint(f"{_MOE}.moe_utils:MoEAuxLossAutoScaler.set_loss_scale", ("scale",)),
    Touchpoint(f"{_MOE}.moe_utils:get_default_pg_collection"),
    Touchpoint(f"{_MOE}.moe_logging:get_moe_metrics_tracker"),
    Touchpoint(
        f"{_MOE}.moe_logging:MoEMetricsTracker.record",
        ("name", "value", "layer_number", "num_layers", "reduce_group", "avg_group"),
    ),
    Touchpoint(
        f"{_MOE}.moe_logging:MoEMetricsTracker.report",
        ("loss_scale", "iteration", "writer", "wandb_writer", "num_layers"),
    ),
    # arguments
    Touchpoint(f"{_ARGUMENTS}:add_megatron_arguments", ("parser",)),
    Touchpoint(f"{_ARGUMENTS}:validate_args", ("args", "defaults")),
    Touchpoint(f"{_ARGUMENTS}:parse_and_validate_args", ("extra_args_provider", "args_defaults")),
    # initial values
    Touchpoint(
        "megatron.core.tensor_parallel.layers:_initialize_affine_weight_cpu",
        ("weight", "output_size", "input_size", "per_partition_size", "partition_dim", "stride"),
    ),
    Touchpoint(
        "megatron.core.tensor_parallel.layers:_initialize_affine_weight_gpu",
        ("weight", "init_method", "partition_dim", "stride", "is_expert"),
    ),
    Touchpoint(
        "megatron.core.tensor_parallel:checkpoint", ("function", "distribute_saved_activations")
    ),
    # checkpoints
    Touchpoint(
        "megatron.core.dist_checkpointing.mapping:ShardedTensor.from_rank_offsets",
        ("key", "data", "rank_offsets", "replica_id", "prepend_axis_num"),
    ),
    Touchpoint(
        "megatron.core.dist_checkpointing.mapping:ShardedTensorFactory",
        ("key", "data", "build_fn", "merge_fn", "replica_id"),
    ),
    Touchpoint(
        "megatron.core.transformer.utils:make_sharded_object_for_checkpoint",
        ("obj", "key", "sharded_offsets", "replica_id"),
    ),
    Touchpoint(
        "megatron.core.transformer.utils:sharded_state_dict_default",
        ("module", "prefix", "sharded_offsets", "metadata", "tp_group"),
    ),
    Touchpoint("megatron.core.datasets.utils:compile_helpers"),
)
