"""Megatron's words in ours: TransformerConfig to MoEConfig; `theirs.py` refuses the rest."""

from typing import Any

from ep_plugin.checkpoint.moe_layers import layers_of
from ep_plugin.checkpoint.normalized import normalize_of
from ep_plugin.checkpoint.scopes import SCOPES
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments import speed
from ep_plugin.megatron.arguments.captures import captures_blocks
from ep_plugin.megatron.arguments.table import feeding
from ep_plugin.megatron.arguments.theirs import check, several
from ep_plugin.megatron.edge_settings import EdgeSettings as EdgeSettings
from ep_plugin.moe.config import GATED, Activation, Fp8, MoEConfig
from ep_plugin.moe.experts import experts
from ep_plugin.moe.groups import node_size
from ep_plugin.moe.routing_config import RoutingConfig
from ep_plugin.moe.rules import own

ACTIVATIONS: dict[Activation, tuple[Any, bool]] = {  # -> (activation_func, gated_linear_unit)
    name: (function, name in GATED) for name, function in experts.ACTIVATIONS.items()
}
FP8_RECIPES: dict[str, Fp8] = {  # Megatron's -> ours, finer where there is no equal
    "delayed": "rowwise",
    "tensorwise": "rowwise",
    "blockwise": "blockwise",
}


def routing_config(config: Any, settings: EdgeSettings) -> RoutingConfig:
    """Return the routing that a TransformerConfig, or Megatron's arguments, and our flags ask for.

    Raises ConfigError for settings that contradict each other.
    """
    softmax = config.moe_router_score_function == "softmax"
    if softmax and config.moe_router_num_groups and not config.moe_router_pre_softmax:
        raise ConfigError(
            f"<num_groups> ({config.moe_router_num_groups}) with softmax would rank groups by sums "
            "of raw logits, as Megatron does; use --moe-router-pre-softmax"
        )
    scaling = config.moe_router_topk_scaling_factor
    values = {
        "topk": config.moe_router_topk,
        "score_function": config.moe_router_score_function,
        "normalize": normalize_of(config),
        "scaling_factor": 1.0 if scaling is None else scaling,
        "router_dtype": config.moe_router_dtype or "fp32",
        "router_bias": config.add_bias_linear,
        "jitter_eps": config.moe_input_jitter_eps or 0.0,
        "num_groups": config.moe_router_num_groups,
        "group_topk": config.moe_router_group_topk,
        "expert_bias": config.moe_router_enable_expert_bias,
        "bias_update_rate": config.moe_router_bias_update_rate,
        "force_load_balancing": config.moe_router_force_load_balancing,
        **_balancing(config),
        "z_loss_coeff": config.moe_z_loss_coeff or 0.0,
        **_capacity(config, settings),
    }
    return RoutingConfig(**(values | settings.routing))


def _balancing(config: Any) -> dict[str, Any]:
    """Return what Megatron's types of balancing and their coefficients ask for.

    Megatron takes a type without a coefficient, and then has no loss.
    """
    types, coefficients = several(config.moe_router_load_balancing_type), config.moe_aux_loss_coeff
    if types == ["quantile_balancing"]:
        ema = config.moe_router_quantile_balancing_ema
        beside = {"aux_loss_coeff": float(several(coefficients)[0])}  # which is refused
        return {"quantile_balancing": True, "quantile_ema": ema, **beside}
    scopes = {value: scope for scope, value in SCOPES.items() if scope != "group"}
    pairs = [
        (scopes[balancing], float(coefficient))
        for balancing, coefficient in zip(types, several(coefficients), strict=True)
        if balancing != "none" and coefficient
    ]
    if not pairs:
        return {}
    (scope, coefficient), *further = pairs
    return {
        "aux_loss_scope": scope,
        "aux_loss_coeff": coefficient,
        "further_losses": tuple(further),
    }


def _capacity(config: Any, settings: EdgeSettings) -> dict[str, Any]:
    """Return what Megatron's own capacity flags ask for, in training.

    A capacity has the drop policy of Megatron's flag, by whichever name it was given.
    """
    ours, factor = settings.routing, config.moe_expert_capacity_factor
    if factor is not None and factor < 0:  # Megatron reads a negative one as none
        factor = None
    given = ours.get("capacity_factor", factor)
    if factor is not None and given != factor:
        raise ConfigError(
            f"--ep-capacity-factor ({given}) and --moe-expert-capacity-factor ({factor}) "
            "contradict each other; give one of them"
        )
    if given is None and ours.get("eval_capacity_factor") is None:
        return {}
    policy = "none" if settings.router == "expert_choice" else config.moe_token_drop_policy
    return {"capacity_factor": given, "drop_policy": policy}


def moe_config(config: Any, settings: EdgeSettings, layer_number: int | None = None) -> MoEConfig:
    """Return our configuration of one block for a TransformerConfig, or for validated arguments.

    `layer_number` counts from 1, MTP layers behind the decoder's; it is needed when layers differ
    in experts. Raises ConfigError for settings that have no counterpart.
    """
    check(config, settings)
    pattern = moe_pattern(config)
    num_experts = getattr(config, "num_moe_experts", None) or config.num_experts
    if settings.experts_per_layer is not None and layer_number is not None:
        place = sum(pattern[: layer_number - 1])
        # A layer of multi-token prediction is made as the decoder's last.
        num_experts = (*settings.experts_per_layer, settings.experts_per_layer[-1])[place]
    values = {
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.moe_ffn_hidden_size or config.ffn_hidden_size,
        "num_experts": num_experts,
        "activation": settings.expert_activation or _activation(config, settings),
        "bias": config.add_bias_linear,
        "routing": routing_config(config, settings),
        "fp8": fp8_recipe(config, settings),
        "deterministic": config.deterministic_mode,
        "num_moe_layers": max(sum(pattern), 1),
        "router": settings.router,
        "dispatcher": speed.dispatcher(config, settings),
        "gemm": settings.gemm,
        "overlap": overlap_schedule(config, settings),
        "in_graph": captures_blocks(config),
        "tokens": settings.tokens,
    }
    given = {row.name: getattr(settings, row.name) for row in feeding("moe")}
    return MoEConfig(**(values | {name: v for name, v in given.items() if v is not None}))


def ranks_per_node(settings: EdgeSettings) -> int | None:
    """Return how many ranks share a node, for a dispatcher that asks; None for the others.

    Raises ConfigError when it is not known.
    """
    if own(settings.dispatcher):  # which may read it, where it is given
        return None if settings.ranks_per_node is None else node_size(settings.ranks_per_node)
    if settings.dispatcher != "hierarchical":
        return None
    found = node_size(settings.ranks_per_node)
    if found is None:
        raise ConfigError(
            "--ep-dispatcher hierarchical needs to know which ranks share a node, and torchrun "
            "has set no LOCAL_WORLD_SIZE; use --ep-ranks-per-node 8"
        )
    return found


def overlap_schedule(config: Any, settings: EdgeSettings) -> str:
    """Return `two_batch` where Megatron's combined 1F1B schedule runs, else what our flag says.

    Raises ConfigError for what cannot run under that schedule.
    """
    asked = speed.overlap(config, settings)
    if not config.overlap_moe_expert_parallel_comm:
        return asked
    if asked not in ("auto", "two_batch"):
        raise ConfigError(
            f"--ep-overlap ({asked}) and --overlap-moe-expert-parallel-comm are two "
            "orders of the same exchanges; leave one of them out"
        )
    if settings.shared_expert == "learned":
        raise ConfigError(
            "--ep-shared-expert learned reads a layer's input after its combine, and under "
            "--overlap-moe-expert-parallel-comm that is gone; use --ep-shared-expert sum"
        )
    return "two_batch"


def fp8_recipe(config: Any, settings: EdgeSettings) -> Fp8:
    """Return the recipe of `--ep-fp8`, else the one that Megatron's `--fp8-recipe` stands for.

    Raises ConfigError for a recipe of Megatron's that has no counterpart.
    """
    if settings.fp8 is not None or config.fp8 is None:
        return settings.fp8 or "off"
    if config.fp8_recipe not in FP8_RECIPES:
        raise ConfigError(
            f"--fp8-recipe ({config.fp8_recipe}) has no counterpart for the experts; use "
            "--ep-fp8 rowwise, blockwise or off"
        )
    return FP8_RECIPES[config.fp8_recipe]


def moe_pattern(config: Any) -> list[int]:
    """Return 1 for each MoE layer of the model and 0 for each dense one, first to last."""
    return [int(is_moe) for is_moe in layers_of(config)]


def _activation(config: Any, settings: EdgeSettings) -> Activation:
    if not hasattr(config, "activation_func"):  # arguments
        return settings.dense_activation or ("swiglu" if config.swiglu else "gelu")
    wanted = (config.activation_func, config.gated_linear_unit)
    for name, pair in ACTIVATIONS.items():
        if pair == wanted:
            return name
    function = getattr(config.activation_func, "__name__", str(config.activation_func))
    raise ConfigError(
        f"activation {function} with gated_linear_unit = {config.gated_linear_unit} is not one the "
        f"experts have; use --ep-expert-activation {', '.join(ACTIVATIONS)}"
    )
