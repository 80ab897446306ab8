"""megatron-core 0.17: what the plugin relies on."""

from ep_plugin.megatron.touchpoints import Touchpoint
from ep_plugin.megatron.versions import _losses_by_name as losses
from ep_plugin.megatron.versions._common import COMMON, MOE

__all__ = ["TOUCHPOINTS", "losses"]

TOUCHPOINTS = (
    *COMMON,
    *losses.TOUCHPOINTS,
    Touchpoint(
        f"{MOE}.moe_layer:MoELayer.__init__",
        ("config", "submodules", "layer_number", "pg_collection", "is_mtp_layer"),
    ),
    Touchpoint("megatron.training.initialize:validate_args", ("args", "defaults")),
)
