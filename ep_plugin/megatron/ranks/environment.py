"""Environment variables: those that ranks must have alike, and those only warned of.

Must be alike: what chooses how a collective runs, since both of its ends must run the same, and
what changes numbers. Alike within a host: how its own ranks reach each other. Warned of: what
changes speed or memory, and what NCCL reads without being listed here. Not looked at: the network
of a host, logs, and places.
"""

import os
from collections.abc import Mapping

MUST = (
    # how a collective runs: NCCL does not compare them, and waits for ever or sums up wrongly
    *("NCCL_ALGO", "NCCL_PROTO", "NCCL_NET", "NCCL_BUFFSIZE", "NCCL_LL_BUFFSIZE"),
    *("NCCL_LL128_BUFFSIZE", "NCCL_P2P_NET_CHUNKSIZE", "NCCL_NVLS_ENABLE", "NCCL_COLLNET_ENABLE"),
    "NCCL_IB_DISABLE",
    *("NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS", "NCCL_MIN_CTAS", "NCCL_MAX_CTAS"),
    *("NCCL_NTHREADS", "TORCH_DIST_INIT_BARRIER"),
    # numbers: precision, kernels, compiled or not
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"),
    *("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE", "TRITON_INTERPRET", "TRITON_F32_DEFAULT"),
    *("TORCH_BLAS_PREFER_CUBLASLT", "DISABLE_ADDMM_CUDA_LT"),
    # the same on a CPU
    *("ATEN_CPU_CAPABILITY", "MKL_CBWR", "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA"),
    *("DNNL_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA"),
    # the plugin's device
    "EP_PLUGIN_DEVICE",
)
# between the ranks of one host; another host may need another value
TOGETHER = ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_CUMEM_ENABLE")
MUST_BEGIN = ("NVTE_",)  # Transformer Engine chooses attention and kernels by them
WARN = (
    # in which order kernels of several streams start: speed, and what overlaps
    "CUDA_DEVICE_MAX_CONNECTIONS",
    *("CUDA_LAUNCH_BLOCKING", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
)
WARN_BEGIN = ("NCCL_", "TORCH_NCCL_", "NVSHMEM_", "UB_")
OWN_BEGIN = (
    *("NVTE_DEBUG", "NVTE_BUILD", "NVTE_CUDA_ARCHS", "NVTE_FRAMEWORK", "NVTE_WITH_"),
    *("NCCL_DEBUG", "NCCL_SOCKET_", "NCCL_IB_HCA", "NCCL_IB_GID", "NCCL_IB_ADDR", "NCCL_IB_ROCE"),
    *("NCCL_TOPO_", "NCCL_GRAPH_", "NCCL_HOSTID", "NCCL_CONF_FILE", "NCCL_COMM_ID", "NCCL_OOB_"),
    *("NCCL_RAS_", "TORCH_NCCL_DEBUG_INFO_", "NVSHMEM_DEBUG", "NVSHMEM_HCA", "NVSHMEM_BOOTSTRAP"),
)


def must(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the set variables that all ranks must have alike."""
    return {name: value for name, value in environment.items() if _must(name)}


def together(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the set variables that the ranks of a host must have alike."""
    return {name: value for name, value in environment.items() if name in TOGETHER}


def warned(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the set variables that are only warned of."""
    return {
        name: value
        for name, value in environment.items()
        if (name in WARN or name.startswith(WARN_BEGIN))
        and not _must(name)
        and name not in TOGETHER
        and not name.startswith(OWN_BEGIN)
    }


def _must(name: str) -> bool:
    return name in MUST or (name.startswith(MUST_BEGIN) and not name.startswith(OWN_BEGIN))
