"""megatron-core 0.18: what the plugin relies on."""

from ep_plugin.megatron.seams.touchpoints import Touchpoint
from ep_plugin.megatron.versions import _losses_tracker as losses
from ep_plugin.megatron.versions._common import ARGUMENTS, COMMON, MOE

__all__ = ["COMBINED_1F1B", "TOUCHPOINTS", "UNMARKED_MTP", "losses"]

COMBINED_1F1B = False  # its schedule for two micro-batches is not tested with our layer
UNMARKED_MTP = False  # it tells each block

TOUCHPOINTS = (
    *COMMON,
    *losses.TOUCHPOINTS,
    Touchpoint(
        f"{MOE}.moe_layer:MoELayer.__init__",
        ("config", "submodules", "layer_number", "pg_collection", "is_mtp_layer", "name"),
    ),
    Touchpoint(f"{ARGUMENTS}:parse_and_validate_args", ("extra_args_provider", "args_defaults")),
)
