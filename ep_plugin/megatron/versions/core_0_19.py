"""megatron-core 0.19: what the plugin relies on."""

from ep_plugin.megatron.seams.touchpoints import Touchpoint
from ep_plugin.megatron.versions import _losses_tracker as losses
from ep_plugin.megatron.versions import _muon_by_key as muon
from ep_plugin.megatron.versions._common import (
    ARGUMENTS,
    COMMON,
    GPT,
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

COMBINED_1F1B = True  # its own schedule for two micro-batches drives our layer
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
    Touchpoint("megatron.training.argument_utils:gpt_config_from_args", ("args",)),
    # the layer's steps, as the combined 1F1B schedule calls them
    Touchpoint(f"{GPT}.fine_grained_callables:build_transformer_layer_callables", ("layer",)),
    Touchpoint(f"{MOE}.moe_layer:MoELayer.shared_experts_compute", ("hidden_states",)),
    Touchpoint(f"{MOE}.moe_layer:MoELayer.route", ("hidden_states", "padding_mask")),
    Touchpoint(f"{MOE}.moe_layer:MoELayer.preprocess", ("hidden_states", "probs", "routing_map")),
    Touchpoint(f"{MOE}.moe_layer:MoELayer.dispatch", ("hidden_states", "probs")),
    Touchpoint(f"{MOE}.moe_layer:MoELayer.routed_experts_compute", ("hidden_states", "probs")),
    Touchpoint(f"{MOE}.moe_layer:MoELayer.combine", ("output",)),
    Touchpoint(f"{MOE}.moe_layer:MoELayer.postprocess", ("output", "shared_expert_output")),
)
