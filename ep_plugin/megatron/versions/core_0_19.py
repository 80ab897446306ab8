"""megatron-core 0.19: what the plugin relies on."""

from ep_plugin.megatron.touchpoints import Touchpoint
from ep_plugin.megatron.versions import _losses_tracker as losses
from ep_plugin.megatron.versions._common import ARGUMENTS, COMMON, MOE

__all__ = ["TOUCHPOINTS", "losses"]

TOUCHPOINTS = (
    *COMMON,
    *losses.TOUCHPOINTS,
    Touchpoint(
        f"{MOE}.moe_layer:MoELayer.__init__",
        ("config", "submodules", "layer_number", "pg_collection", "is_mtp_layer", "name"),
    ),
    Touchpoint(f"{ARGUMENTS}:parse_and_validate_args", ("extra_args_provider", "args_defaults")),
)
