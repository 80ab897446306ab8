"""Print what Megatron and the plugin make of command lines: their own parser and all their checks.

Reads a JSON list of [number of ranks, flags] from stdin; prints one JSON list, last line: for each
a dictionary of what was understood, or the sentence of the refusal. Nothing is built or launched.
"""

import json
import os
import sys
from typing import Any

import ep_plugin.megatron


def read(ranks: int, flags: list[str]) -> dict[str, Any]:
    """Return what `flags` mean on `ranks` ranks, as rank 0 of a run would see it."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.training import arguments
    from megatron.training.argument_utils import core_transformer_config_from_args

    from ep_plugin.megatron.arguments import settings_from_args
    from ep_plugin.megatron.settings import moe_config, moe_pattern

    os.environ["WORLD_SIZE"] = str(ranks)
    sys.argv = ["pretrain", *flags]
    args = arguments.parse_args()
    arguments.validate_args(args)
    config = core_transformer_config_from_args(args)
    block = moe_config(config, settings_from_args(args))
    stages = range(args.pipeline_model_parallel_size)
    split = config.pipeline_model_parallel_layout  # Megatron's own, where one is given
    layers = [
        split.layout[stage][0].count(LayerType.decoder)
        if split is not None
        else get_num_layers_to_build(config, pp_rank=stage)
        for stage in stages
    ]
    return {
        "layers": layers,
        "pattern": moe_pattern(config),
        "num_experts": block.num_experts,
        "topk": block.routing.topk,
        "hidden": block.hidden_size,
        "bias": block.bias,
        "overlap": block.overlap,
        "dispatch_dedup": block.dispatch_dedup,
        "tp": args.tensor_model_parallel_size,
        "pp": args.pipeline_model_parallel_size,
        "cp": args.context_parallel_size,
        "ep": args.expert_model_parallel_size,
        "etp": args.expert_tensor_parallel_size,
        "micro_batch": args.micro_batch_size,
        "global_batch": args.global_batch_size,
        "rampup": args.rampup_batch_size,
        "seq_length": args.seq_length,
        "lr": args.lr,
        "save": args.save,
        "load": args.load,
        "saves_optimizer": not args.no_save_optim,
        "data_path": args.data_path,
        "tokenizer": args.tokenizer_model,
        "recompute": args.recompute_granularity,
    }


def main() -> None:
    """Read every command line of stdin."""
    ep_plugin.megatron.install()
    found: list[dict[str, Any] | str] = []
    for ranks, flags in json.load(sys.stdin):
        try:
            found.append(read(ranks, flags))
        except (AssertionError, ValueError, SystemExit) as error:
            found.append(f"{type(error).__name__}: {error}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
