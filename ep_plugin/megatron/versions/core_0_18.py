"""megatron-core 0.18: what the plugin relies on."""

from ep_plugin.megatron.seams.touchpoints import Touchpoint
from ep_plugin.megatron.versions import _losses_tracker as losses
from ep_plugin.megatron.versions import _muon_by_key as muon
from ep_plugin.megatron.versions._common import (
    ARGUMENTS,
    COMMON,
    HYBRID_MODEL,
    MEGATRON_FSDP,
    MOE,
    WRAPPERS,
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

COMBINED_1F1B = False  # its schedule for two micro-batches is not tested with our layer
EMERGING_OPTIMIZERS = ((0, 2), None)  # from, and below
EXPERIMENTAL = None  # a release
HYBRID = True  # models/hybrid is served
SHARDERS = (*WRAPPERS, f"{MEGATRON_FSDP}.__init__")
UNMARKED_MTP = None  # it tells each block

TOUCHPOINTS = (
    *COMMON,
    Touchpoint(SHARDERS[-1], ("module",)),
    *losses.TOUCHPOINTS,
    *muon.TOUCHPOINTS,
    Touchpoint(
        f"{MOE}.moe_layer:MoELayer.__init__",
        ("config", "submodules", "layer_number", "pg_collection", "is_mtp_layer", "name"),
    ),
    *HYBRID_MODEL,
    Touchpoint(f"{ARGUMENTS}:parse_and_validate_args", ("extra_args_provider", "args_defaults")),
)
