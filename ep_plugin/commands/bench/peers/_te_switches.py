"""Switches of Transformer Engine that its library reads from the environment."""

import os

CUTLASS = "NVTE_USE_CUTLASS_GROUPED_GEMM"  # one kernel for all experts in bf16, on Hopper


def named(backend: str) -> str:
    """Return a backend's name with what the environment switches on."""
    return f"{backend}+cutlass" if os.environ.get(CUTLASS) == "1" else backend


def told() -> str:
    """Return what the environment sets, for a reader; "" for nothing."""
    return f"{CUTLASS}=1" if os.environ.get(CUTLASS) == "1" else ""
