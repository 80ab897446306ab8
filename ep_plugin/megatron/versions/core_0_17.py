"""megatron-core 0.17: what the plugin relies on."""

from ep_plugin.megatron.seams.touchpoints import Touchpoint
from ep_plugin.megatron.versions import _losses_by_name as losses
from ep_plugin.megatron.versions import _muon_by_freezing as muon
from ep_plugin.megatron.versions._common import COMMON, MOE, MTP_LAYER

__all__ = [
    "COMBINED_1F1B",
    "EMERGING_OPTIMIZERS",
    "HYBRID",
    "TOUCHPOINTS",
    "UNMARKED_MTP",
    "losses",
    "muon",
]

COMBINED_1F1B = False  # its schedule for two micro-batches is not tested with our layer
EMERGING_OPTIMIZERS = ((0, 1), None)  # from, and below
HYBRID = False  # its MambaModel is not served
# Its MTP layers are numbered from 1, and it tells its own block alone that it is in one.
UNMARKED_MTP = f"{MTP_LAYER}.__init__"

TOUCHPOINTS = (
    *COMMON,
    *losses.TOUCHPOINTS,
    *muon.TOUCHPOINTS,
    Touchpoint(
        f"{MOE}.moe_layer:MoELayer.__init__",
        ("config", "submodules", "layer_number", "pg_collection", "is_mtp_layer"),
    ),
    Touchpoint(UNMARKED_MTP),
    Touchpoint("megatron.training.initialize:validate_args", ("args", "defaults")),
)
