"""Megatron's flags that need a GPU, or a package for GPUs: what CPU mode does with each.

What is only faster or smaller, or watches the GPU, is taken away and named in one line. What
changes the model or how its state is kept is refused, before anything is built. FP8 is taken away:
a model in FP8 is tried in its plain precision.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ep_plugin.errors import ConfigError

# argument -> the value that CPU mode gives it, and how that is typed
GIVEN: dict[str, tuple[Any, str]] = {
    "transformer_impl": ("local", "--transformer-impl local"),
    "distributed_backend": ("gloo", "--distributed-backend gloo"),
    "gradient_accumulation_fusion": (False, "--no-gradient-accumulation-fusion"),
    "masked_softmax_fusion": (False, "--no-masked-softmax-fusion"),
    "apply_rope_fusion": (False, "--no-rope-fusion"),
    "persist_layer_norm": (False, "--no-persist-layer-norm"),
    "no_persist_layer_norm": (True, "--no-persist-layer-norm"),
    "cross_entropy_fusion_impl": ("native", "--cross-entropy-fusion-impl native"),
    "main_grads_dtype": ("fp32", "--main-grads-dtype fp32"),
    "main_params_dtype": ("fp32", "--main-params-dtype fp32"),
    "exp_avg_dtype": ("fp32", "--exp-avg-dtype fp32"),
    "exp_avg_sq_dtype": ("fp32", "--exp-avg-sq-dtype fp32"),
}
# value that asks for nothing -> arguments that get it; their flags are left out
LEFT_OUT: dict[Any, str] = {
    False: """
        moe_permute_fusion moe_router_fusion use_transformer_engine_op_fuser use_te_activation_func
        fused_residual_rmsnorm fused_single_qkv_rope mla_down_proj_fusion use_flash_attn
        use_fused_weighted_squared_relu use_grouped_gemm_for_dense_mlp
        use_grouped_gemm_for_shared_expert moe_single_grouped_weight moe_single_grouped_bias
        disable_bf16_reduced_precision_matmul async_ckpt_use_cpu_shm
        tp_comm_overlap tp_comm_overlap_rs_dgrad defer_embedding_wgrad_compute
        ddp_average_in_collective nccl_ub disable_symmetric_registration use_sharp
        high_priority_a2a_comm_stream te_rng_tracker
        fine_grained_activation_offloading optimizer_cpu_offload overlap_cpu_optimizer_d2h_h2d
        use_torch_optimizer_for_cpu_offload optimizer_cuda_graph use_precision_aware_optimizer
        fp8_output_proj fp8_param_gather fp4_param_gather first_last_layers_bf16
        fp8_dot_product_attention fp8_multi_head_attention reuse_grad_buf_for_mxfp8_param_ag
        keep_fp8_transpose_cache moe_router_padding_for_fp8 moe_router_padding_for_quantization
        use_kitchen_attention record_memory_history nvtx_ranges log_device_memory_used log_energy
        log_max_attention_logit log_straggler""",
    None: """
        fp8 fp4 te_precision_config_file flash_attention_version symmetric_ar_type
        nccl_communicator_config_path pipeline_model_parallel_comm_backend sharp_enabled_group
        gpu_sniff_test_interval tp_comm_overlap_cfg flight_recorder_dump_path""",
    (): "high_priority_stream_groups offload_modules",
}
TYPED = {  # flags that are not the argument's name
    "fp8": "--fp8-format",
    "fp4": "--fp4-format",
    "nccl_ub": "--use-nccl-ub",
}
# Parts that Megatron recomputes with functions of Transformer Engine.
RECOMPUTED_BY_ENGINE = ("layernorm", "mla_up_proj", "gdn_norm_out")
_ENGINE = "needs Transformer Engine's attention"


@dataclass(frozen=True)
class Refused:
    """An argument without which it would be another model, or be kept in another way."""

    when: Callable[[Any], bool]  # of all arguments; this one is neither None nor off
    why: str
    use: str


REFUSED = {
    "qk_clip": Refused(lambda args: True, _ENGINE, "leave it out"),
    "use_megatron_fsdp": Refused(
        lambda args: True, "shards over GPUs", "use --use-distributed-optimizer"
    ),
    "use_torch_fsdp2": Refused(
        lambda args: True, "shards over GPUs", "use --use-distributed-optimizer"
    ),
    "experimental_attention_variant": Refused(
        lambda args: True, "is attention by kernels for GPUs", "leave it out"
    ),
    "position_embedding_type": Refused(
        lambda args: args.position_embedding_type == "relative",
        _ENGINE,
        "use --position-embedding-type rope",
    ),
    "context_parallel_size": Refused(
        lambda args: args.context_parallel_size > 1, _ENGINE, "use --context-parallel-size 1"
    ),
    "non_persistent_ckpt_type": Refused(
        lambda args: args.non_persistent_ckpt_type == "local",
        "needs a package for GPUs",
        "use --non-persistent-ckpt-type global",
    ),
}


def to_cpu(args: Any) -> str:
    """Give flags that need a GPU their CPU value, in place; return what was changed, as typed.

    Raises ConfigError for those without which it would be another model.
    """
    for name, row in REFUSED.items():
        value = getattr(args, name, None)
        if value and row.when(args):
            typed = flag(name) if value is True else f"{flag(name)} ({value})"
            raise ConfigError(f"{typed} {row.why}, and this run is on the CPU; {row.use}")
    changed = []
    for name, (value, typed) in GIVEN.items():
        if getattr(args, name, value) != value:
            setattr(args, name, value)
            changed.append(typed)
    without = _leave_out(args)
    said = [" ".join(dict.fromkeys(changed)), f"without {' '.join(without)}" if without else ""]
    return ", ".join(filter(None, said)) or "no flag changed"


def _leave_out(args: Any) -> list[str]:
    """Take away what needs a GPU; return the flags as typed."""
    without = []
    for off, names in LEFT_OUT.items():
        for name in names.split():
            if getattr(args, name, None):
                setattr(args, name, list(off) if off == () else off)
                without.append(flag(name))
    if getattr(args, "attention_backend", None) is not None:
        without += _attention(args)
    if getattr(args, "profile", False) and not args.use_pytorch_profiler:
        args.profile = False
        without.append("--profile")
    modules = getattr(args, "recompute_modules", None) or []
    left = [part for part in modules if part not in RECOMPUTED_BY_ENGINE]
    if len(left) < len(modules):
        args.recompute_modules = left
        if not left and args.recompute_granularity == "selective":
            args.recompute_granularity = None
        taken = [part for part in modules if part in RECOMPUTED_BY_ENGINE]
        without.append(f"--recompute-modules {' '.join(taken)}")
    return without


def _attention(args: Any) -> list[str]:
    """Take a kernel of attention away; `local` and `unfused` are what runs here."""
    backend = args.attention_backend
    if backend.name not in ("flash", "fused"):
        return []
    args.attention_backend = type(backend).auto
    return [f"--attention-backend {backend.name}"]


def flag(name: str) -> str:
    """Return how an argument is typed."""
    return TYPED.get(name, f"--{name.replace('_', '-')}")
