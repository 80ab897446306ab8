"""Checks, before experts are built, that their sizes can be computed on this device."""

import os
from typing import Any

import torch

from ep_plugin.errors import ConfigError, largest_divisor
from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.experts import autotune
from ep_plugin.moe.experts.fp8 import blockwise, rowwise
from ep_plugin.moe.groups import ExpertGroups
from ep_plugin.registry import resolve

FP8: dict[str, tuple[Any, Any]] = {  # recipe -> module with `check` and `prepare`, class
    "rowwise": (rowwise, rowwise.Rowwise),
    "blockwise": (blockwise, blockwise.Blockwise),
}


def check_sizes(config: MoEConfig, etp: int, device: torch.device) -> None:
    """Raise ConfigError if F does not divide over `etp`, or the FP8 recipe refuses the sizes."""
    ffn = config.ffn_hidden_size
    if ffn % etp:
        raise ConfigError(
            f"<ffn_hidden_size> ({ffn}) must be divisible by <etp> ({etp}); use "
            f"<etp={largest_divisor(ffn, etp)}>"
        )
    if config.fp8 != "off":
        FP8[config.fp8][0].check(config.hidden_size, ffn // etp, device)


def check_memory(
    config: MoEConfig, groups: ExpertGroups, device: torch.device, dtype: torch.dtype
) -> None:
    """Raise ConfigError if this rank's weights alone are larger than the memory of its device."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    elif device.type == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    if type(torch.empty(0)) is not torch.Tensor:  # torch's fake mode: weights without storage
        return
    experts, ffn = config.num_experts // groups.ep_size, config.ffn_hidden_size // groups.etp_size
    values = experts * ffn * config.hidden_size * (3 if config.gated else 2)
    num_bytes = (values + config.num_experts * config.hidden_size) * dtype.itemsize
    if num_bytes > memory:
        raise ConfigError(
            f"<num_experts> ({config.num_experts}) of <hidden_size> ({config.hidden_size}) and "
            f"<ffn_hidden_size> ({config.ffn_hidden_size}) take {num_bytes / 2**30:.1f} GiB on "
            f"this rank, and {device} has {memory / 2**30:.1f} GiB; use more ranks of <ep>, or "
            "smaller sizes"
        )


def check_capturable(config: MoEConfig, etp: int, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ConfigError if the step is in a CUDA graph and a product needs a host sync."""
    if not config.in_graph or not uses_gemm(config):
        return
    ffn = config.ffn_hidden_size // etp
    for sizes in (
        (config.hidden_size, ffn * (2 if config.gated else 1)),
        (ffn, config.hidden_size),
    ):
        name = config.gemm
        if name == "auto":
            name = autotune.rule(*sizes, dtype, device.type == "cuda")
        if resolve("gemm", name)(*sizes, dtype).waits_for_host:
            raise ConfigError(_waits(name, config.gemm, sizes, dtype))


def uses_gemm(config: MoEConfig) -> bool:
    """Whether any product goes through a grouped GEMM backend; FP8 products do not."""
    return config.fp8 == "off" or config.fp8_wgrad == "bf16"


def _waits(name: str, asked: str, sizes: tuple[int, int], dtype: torch.dtype) -> str:
    if asked != "auto":
        return (
            f"<gemm> ({asked}) waits for the host, and a CUDA graph cannot; use <gemm=auto>, or "
            "run the step without a CUDA graph"
        )
    return (
        f"a CUDA graph needs a grouped GEMM that does not wait for the host, and for experts of "
        f"{sizes[0]} to {sizes[1]} features in {str(dtype).removeprefix('torch.')} there is only "
        f"{name}; use bf16 and sizes that are multiples of 8, or run the step without a CUDA graph"
    )
