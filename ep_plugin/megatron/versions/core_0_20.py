"""megatron-core 0.20, in development: what differs from 0.19 of what the plugin relies on.

The wrapper of Megatron-FSDP is two classes, and multi-token prediction asks whether its layers are
for inference. Nothing else is renamed, gone or new.
"""

from ep_plugin.megatron.seams.touchpoints import Touchpoint
from ep_plugin.megatron.versions import core_0_19
from ep_plugin.megatron.versions._common import MEGATRON_FSDP, WRAPPERS
from ep_plugin.megatron.versions.core_0_19 import (
    COMBINED_1F1B,
    EMERGING_OPTIMIZERS,
    HYBRID,
    UNMARKED_MTP,
    losses,
    muon,
)

__all__ = [
    "COMBINED_1F1B",
    "EMERGING_OPTIMIZERS",
    "EXPERIMENTAL",
    "HYBRID",
    "SHARDERS",
    "TOUCHPOINTS",
    "UNMARKED_MTP",
    "losses",
    "muon",
]

EXPERIMENTAL = "d98e8a64"  # Megatron-LM's commit, of 2026-08-22, that this was read and tested at
_MTP = "megatron.core.transformer.multi_token_prediction"
_FSDP = tuple(f"{MEGATRON_FSDP}{version}.__init__" for version in ("V1", "V2"))
SHARDERS = (*WRAPPERS, *_FSDP)

TOUCHPOINTS = (
    *(row for row in core_0_19.TOUCHPOINTS if row.path != core_0_19.SHARDERS[-1]),
    *(Touchpoint(path, ("module",)) for path in _FSDP),
    Touchpoint(f"{_MTP}:is_inference_column_parallel_linear", ("module",)),
)
