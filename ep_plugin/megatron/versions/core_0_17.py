"""megatron-core 0.17: what the plugin relies on."""

from ep_plugin.megatron.seams.touchpoints import Touchpoint
from ep_plugin.megatron.versions import _losses_by_name as losses
from ep_plugin.megatron.versions._common import COMMON, MOE, MTP_LAYER

__all__ = ["COMBINED_1F1B", "TOUCHPOINTS", "UNMARKED_MTP", "losses"]

COMBINED_1F1B = False  # its schedule for two micro-batches is not tested with our layer
UNMARKED_MTP = True  # its MTP layers are numbered from 1, and it tells its own block alone

TOUCHPOINTS = (
    *COMMON,
    *losses.TOUCHPOINTS,
    Touchpoint(
        f"{MOE}.moe_layer:MoELayer.__init__",
        ("config", "submodules", "layer_number", "pg_collection", "is_mtp_layer"),
    ),
    Touchpoint(f"{MTP_LAYER}.__init__"),
    Touchpoint("megatron.training.initialize:validate_args", ("args", "defaults")),
)
