"""Megatron's GPT: a dense checkpoint's names and those of the same model with MoE layers.

    dense                                      Mixture-of-Experts
    mlp.linear_fc1.weight       [2F, H]        mlp.experts.experts.linear_fc1.weight    [E, 2F, H]
    mlp.linear_fc2.weight       [H, F]         mlp.experts.experts.linear_fc2.weight    [E, H, F]
    (none)                                     mlp.router.weight                        [E, H]
    mlp.linear_fc{1,2}, a second time          mlp.shared_experts.linear_fc{1,2}        the same
    (none)                                     mlp.coefficient.{weight,bias}            [2, H], [2]

SequentialMLP and TEGroupedMLP share these names. The norm before the MLP differs: Transformer
Engine fuses it into the dense `linear_fc1` but not into the experts; the local implementation saves
it under the fused name in both.
"""

from ep_plugin.checkpoint.patterns import Rule

ROUTER = "decoder.layers.{layer}.mlp.router.{kind}"
COEFFICIENT = "decoder.layers.{layer}.mlp.coefficient.{kind}"  # of a shared expert that is weighed
# What every MoE layer must come out with.
REQUIRED = (
    "decoder.layers.{layer}.mlp.linear_fc1.weight{half}",
    "decoder.layers.{layer}.mlp.linear_fc2.weight",
)

_LAYER = "decoder.layers.{layer}."
_FC = _LAYER + "mlp.linear_fc{fc}."
_NORM = _LAYER + "mlp.linear_fc1.layer_norm_{kind}"

_KEPT = tuple(
    Rule(name, name)
    for name in (
        "embedding.{rest}",
        "output_layer.{rest}",
        "decoder.final_layernorm.{rest}",
        _LAYER + "input_layernorm.{rest}",
        _LAYER + "self_attention.{rest}",
        _LAYER + "pre_mlp_layernorm.{rest}",
    )
)
_DENSE_LAYERS = (Rule(_LAYER + "mlp.{rest}", _LAYER + "mlp.{rest}", layers="dense"),)
# Random-number state and the rerun machine belong to the run that ends here. What is kept of the
# optimizer goes the way of its parameter (`adapt/optimizer_state.py`).
_DROPPED = tuple(
    Rule(name, operation="drop")
    for name in (
        "optimizer.{rest}",
        "chained_{expert}.optimizer.{rest}",
        "rng_state/{rest}",
        "rerun_state_machine_state/{rest}",
    )
)


def rules(transformer_engine: bool, key_per_expert: bool) -> tuple[Rule, ...]:
    """Return the table of one checkpoint style.

    key_per_expert: each expert under a name of its own, as Megatron saves with
    `singleton_local_shards`, instead of along a leading axis.
    """
    experts = _LAYER + "mlp.experts.experts." + ("{expert}." if key_per_expert else "")
    moe_layers = (
        Rule(
            _NORM,
            _LAYER + "pre_mlp_layernorm.{kind}" if transformer_engine else _NORM,
            layers="moe",
        ),
        Rule(_FC + "{kind}{half}", experts + "linear_fc{fc}.{kind}{half}", "experts", "moe"),
        Rule(_FC + "_extra_state/{rest}", experts + "linear_fc{fc}._extra_state", "experts", "moe"),
    )
    return _KEPT + _DENSE_LAYERS + moe_layers + _DROPPED
