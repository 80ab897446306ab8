"""Megatron's shared expert from the spec of an MoE layer, however a release writes that spec."""

import copy
import inspect
from functools import partial
from typing import Any

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from ep_plugin.errors import ConfigError


def build_shared_expert(config: Any, submodules: Any, pg_collection: Any, name: str | None) -> Any:
    """Return Megatron's shared expert; with biases, which that refuses, Megatron's dense block.

    Raises ConfigError for a gate beside biases, which neither has.
    """
    spec = submodules.shared_experts
    if isinstance(spec, ModuleSpec):
        build, parts = partial(build_module, spec), spec.submodules
    else:
        build, parts = spec, spec.keywords["submodules"]
    if not config.add_bias_linear:
        named = name is not None and "name" in inspect.signature(build).parameters
        return build(
            config=config,
            pg_collection=pg_collection,
            gate=config.moe_shared_expert_gate,
            **({"name": f"{name}.shared_experts"} if named else {}),
        )
    if config.moe_shared_expert_gate:
        raise ConfigError(
            "--moe-shared-expert-gate needs linear layers without bias; use --disable-bias-linear "
            "or --ep-shared-expert learned"
        )
    size = config.moe_shared_expert_intermediate_size
    config = copy.copy(config)
    config.ffn_hidden_size = size  # fc2 reads it there; the argument is for fc1
    return MLP(config=config, submodules=parts, ffn_hidden_size=size, tp_group=pg_collection.tp)
