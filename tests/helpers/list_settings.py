"""Print what settings this release has, and whether a plain MoE model's pass the plugin's check.

One JSON object, last line: fields of TransformerConfig, flags with their names and argument groups,
and the sentence of a refusal, or null, for a plain configuration and for plain arguments.
"""

import argparse
import dataclasses
import json
import re
from typing import Any

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.theirs import check
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.seams import touchpoints

# Flags that are no fields, and about MoE, recomputing, FP8 and FP4, CUDA graphs, overlap, offload
# or the activation; reinforcement learning and text generation have argument groups of their own.
NAMED = re.compile(
    "moe|expert|upcycl|recompute|offload|fp8|fp4|precision_config|kitchen|quant|cuda_graph|overlap"
    "|wgrad|tp_comm|swiglu|relu|gelu|geglu|checkpoint_activations"
)
ELSEWHERE = ("rl", "inference")  # beside our own groups


def to_decide(found: dict[str, Any]) -> set[str]:
    """Return the settings of a release, as printed here, that a row must say something about."""
    flags = {
        name
        for name, (_, group) in found["flags"].items()
        if NAMED.search(name) and group not in ELSEWHERE and not group.startswith("ep_plugin: ")
    }
    return {*found["fields"], *flags}


def refusal(settings: Any) -> str | None:
    """Return what `check` says."""
    try:
        check(settings)
    except ConfigError as error:
        return str(error)
    return None


def main() -> None:
    """List this release's settings."""
    if cpu_mode.wanted():
        cpu_mode.enable()
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    fields = [f.name for kind in (TransformerConfig, MLATransformerConfig) for f in _fields(kind)]
    plain = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_moe_experts=4,
        add_bias_linear=False,
        expert_tensor_parallel_size=1,
    )
    found: dict[str, Any] = {"fields": fields, "config": refusal(plain), "flags": {}, "args": None}
    if touchpoints.has_training():
        from megatron.training.arguments import add_megatron_arguments

        from ep_plugin.megatron.arguments.parser import add_ep_arguments

        parser = add_ep_arguments(add_megatron_arguments(argparse.ArgumentParser()))
        groups = {a.dest: g.title for g in parser._action_groups for a in g._group_actions}
        for action in parser._actions:
            names = found["flags"].setdefault(action.dest, ([], groups[action.dest]))[0]
            names += [name for name in action.option_strings if not name.startswith("--ep-")]
        found["args"] = refusal(parser.parse_args(["--num-experts", "4"]))
    print(json.dumps(found))


def _fields(kind: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(kind)


if __name__ == "__main__":
    main()
