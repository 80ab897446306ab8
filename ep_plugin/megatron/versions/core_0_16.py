"""megatron-core 0.16: what the plugin relies on."""

from ep_plugin.megatron.seams.touchpoints import Touchpoint
from ep_plugin.megatron.versions import _losses_by_name as losses
from ep_plugin.megatron.versions import _muon_by_freezing as muon
from ep_plugin.megatron.versions._common import (
    COMMON,
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
EMERGING_OPTIMIZERS = ((0, 1), (0, 2))  # from, and below
EXPERIMENTAL = None  # a release
HYBRID = False  # its MambaModel is not served
SHARDERS = (*WRAPPERS, f"{MEGATRON_FSDP}.__init__")
UNMARKED_MTP = None  # its MTP layers are numbered behind the decoder's

TOUCHPOINTS = (
    *COMMON,
    Touchpoint(SHARDERS[-1], ("module",)),
    *losses.TOUCHPOINTS,
    *muon.TOUCHPOINTS,
    Touchpoint(
        f"{MOE}.moe_layer:MoELayer.__init__",
        ("config", "submodules", "layer_number", "pg_collection"),
    ),
    Touchpoint("megatron.training.initialize:validate_args", ("args", "defaults")),
)
