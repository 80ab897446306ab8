"""Over which tokens a load-balancing loss counts, in Megatron's words. No torch."""

SCOPES = {  # of RoutingConfig -> Megatron's type of the loss
    "micro_batch": "aux_loss",
    "group": "aux_loss",
    "sequence": "seq_aux_loss",
    "global": "global_aux_loss",
}
