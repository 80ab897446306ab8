"""Switches of torch that change numbers, as they stand in this process: a script may set them."""

from collections.abc import Callable

import torch
from torch.backends import cuda, cudnn, mkldnn

_SWITCHES: dict[str, Callable[[], object]] = {
    "torch.set_default_dtype": torch.get_default_dtype,
    "torch.use_deterministic_algorithms": torch.are_deterministic_algorithms_enabled,
    # What torch.set_float32_matmul_precision and allow_tf32 set too; these cannot always be read.
    "torch.backends.fp32_precision": lambda: torch.backends.fp32_precision,  # type: ignore[attr-defined]
    "torch.backends.cuda.matmul.fp32_precision": lambda: cuda.matmul.fp32_precision,
    "torch.backends.cudnn.conv.fp32_precision": lambda: cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
    "torch.backends.mkldnn.matmul.fp32_precision": lambda: mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
    "torch.backends.mkldnn.enabled": lambda: mkldnn.enabled,
    "torch.backends.cudnn.enabled": lambda: cudnn.enabled,
    "torch.backends.cudnn.deterministic": lambda: cudnn.deterministic,
    "torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction": (
        lambda: cuda.matmul.allow_fp16_reduced_precision_reduction
    ),
    "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction": (
        lambda: cuda.matmul.allow_bf16_reduced_precision_reduction
    ),
    "torch.backends.cuda.enable_flash_sdp": cuda.flash_sdp_enabled,
    "torch.backends.cuda.enable_mem_efficient_sdp": cuda.mem_efficient_sdp_enabled,
    "torch.backends.cuda.enable_cudnn_sdp": cuda.cudnn_sdp_enabled,
    "torch.backends.cuda.enable_math_sdp": cuda.math_sdp_enabled,
    "torch.set_autocast_enabled": torch.is_autocast_enabled,
}


def switches() -> dict[str, str]:
    """Return what each switch is at, as text, by how it is set."""
    return {name: str(value()) for name, value in _SWITCHES.items()}


def switch_facts() -> dict[str, str]:
    """Return them as facts that ranks must have alike."""
    return {f"switch:{name}": value for name, value in switches().items()}
