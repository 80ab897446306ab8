"""What tokens travel as where `dispatch_dtype` is fp8: e4m3, rounded as on arrival."""

from functools import partial
from typing import Any

from torch import Tensor

from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.dispatcher._exchange import Narrow
from ep_plugin.moe.kernels import select


def narrow_of(config: MoEConfig) -> Narrow | None:
    """Return what makes rows [P, H] narrow as the experts' recipe would; None for bf16."""
    if config.dispatch_dtype != "fp8":
        return None
    return partial(_narrow, "quantize_rows" if config.fp8 == "rowwise" else "quantize_blocks")


def _narrow(quantize: str, rows: Tensor) -> Any:
    return getattr(select(rows), quantize)(rows)
