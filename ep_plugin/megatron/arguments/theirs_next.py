"""Settings that only a Megatron in development has: rows as in `theirs_table.py`, without a page.

A release that has them moves their rows there.
"""

from ep_plugin.megatron.arguments.theirs_table import Theirs, refused

_NO_EFFECT = {  # why -> settings
    "the experts' products always are grouped, and their parameters are our own": """
        moe_use_grouped_tensor""",
    "belongs to --enable-mhc-connections, which is refused": """
        mhc_num_residual_streams mhc_sinkhorn_iterations mhc_init_gating_factor
        mhc_recompute_layer_num""",
    "belongs to --batch-invariant-mode, which is refused": "batch_invariant_backend",
    "belongs to --expert-tensor-parallel-num-weight-shards, which is refused": """
        gtp_expert_remat_nccl_ub""",
    "is about Megatron's own projections of experts": "gtp_remat_opt_in_modules",
}
_OUTSIDE = {  # what they are about -> settings
    "multi-token prediction": "mtp_hsm",
    "gated delta products": """
        gdp_num_householder gdp_cutedsl_kernel gdp_num_chunk_states_to_recompute""",
}
_WIRE = "is how Megatron's own dispatcher sends tokens; leave it out"

NEXT = (
    refused("enable_mhc_connections", "is not tested around our block; leave it out"),
    refused("moe_dispatch_fwd_dtype", _WIRE, off=(None, "bf16")),
    refused("moe_combine_bwd_dtype", _WIRE, off=(None, "bf16")),
    *(
        Theirs(field, "no effect", why=why)
        for why, fields in _NO_EFFECT.items()
        for field in fields.split()
    ),
    *(
        Theirs(field, "outside", why=f"is about {what}")
        for what, fields in _OUTSIDE.items()
        for field in fields.split()
    ),
)
