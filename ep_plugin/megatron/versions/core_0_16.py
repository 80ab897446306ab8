"""megatron-core 0.16: what the plugin relies on."""

from ep_plugin.megatron.seams.touchpoints import Touchpoint
from ep_plugin.megatron.versions import _losses_by_name as losses
from ep_plugin.megatron.versions import _muon_by_freezing as muon
from ep_plugin.megatron.versions._common import COMMON, MOE

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
EMERGING_OPTIMIZERS = ((0, 1), (0, 2))  # from, and below
HYBRID = False  # its MambaModel is not served
UNMARKED_MTP = None  # its MTP layers are numbered behind the decoder's

TOUCHPOINTS = (
    *COMMON,
    *losses.TOUCHPOINTS,
    *muon.TOUCHPOINTS,
    Touchpoint(
        f"{MOE}.moe_layer:MoELayer.__init__",
        ("config", "submodules", "layer_number", "pg_collection"),
    ),
    Touchpoint("megatron.training.initialize:validate_args", ("args", "defaults")),
)
