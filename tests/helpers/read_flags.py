"""Print what Megatron and the plugin make of command lines: their own parser and all their checks.

Reads a JSON list of [number of ranks, flags, vocabulary] from stdin; prints one JSON list, last
line: for each a dictionary of what was understood, or the sentence of the refusal. With a
vocabulary, the model of the first and the last rank is built too, without storage and without
the other ranks, and its parameters are counted.
"""

import json
import os
import sys
from typing import Any

import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import ep_plugin.megatron

INIT, NEW_GROUP = dist.init_process_group, dist.new_group  # CPU mode turns every group into gloo's


def new_group(ranks: list[int] | None = None, **_: Any) -> Any:
    """Make a group of the fake backend, whatever is asked for."""
    return NEW_GROUP(ranks)


def count(args: Any, config: Any, rank: int, vocab: int) -> tuple[int, int]:
    """Return the dense and the routed parameters that rank `rank` of Megatron's GPT holds."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    INIT(backend="fake", store=FakeStore(), rank=rank, world_size=args.world_size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    model_parallel_cuda_manual_seed(1)
    config.perform_initialization = False
    config.use_cpu_initialization = True
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=args.normalization
    )
    with FakeTensorMode():
        model = GPTModel(
            config,
            spec,
            vocab_size=vocab,
            max_sequence_length=args.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
        )
    counts = [0, 0]
    for parameter in model.parameters():
        counts[not getattr(parameter, "allreduce", True)] += parameter.numel()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return counts[0], counts[1]


def read(ranks: int, flags: list[str], vocab: int | None) -> dict[str, Any]:
    """Return what `flags` mean on `ranks` ranks, as rank 0 of a run would see it."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.training import arguments
    from megatron.training.argument_utils import core_transformer_config_from_args

    from ep_plugin.megatron.arguments.checks import settings_from_args
    from ep_plugin.megatron.settings import moe_config, moe_pattern
    from ep_plugin.moe.auto import Place, settle

    os.environ["WORLD_SIZE"] = str(ranks)
    sys.argv = ["pretrain", *flags]
    args = arguments.parse_args()
    arguments.validate_args(args)
    config = core_transformer_config_from_args(args)
    block = moe_config(config, settings_from_args(args))
    etp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    block = settle(block, Place(args.expert_model_parallel_size * etp, cuda=True))
    stages = range(args.pipeline_model_parallel_size)
    split = config.pipeline_model_parallel_layout  # Megatron's own, where one is given
    layers = [
        split.layout[stage][0].count(LayerType.decoder)
        if split is not None
        else get_num_layers_to_build(config, pp_rank=stage)
        for stage in stages
    ]
    counted = [] if vocab is None else [count(args, config, r, vocab) for r in (0, ranks - 1)]
    return {
        "parameters": counted,
        "layers": layers,
        "pattern": moe_pattern(config),
        "num_experts": block.num_experts,
        "topk": block.routing.topk,
        "hidden": block.hidden_size,
        "bias": block.bias,
        "overlap": block.overlap,
        "dispatch_dedup": bool(block.dispatch_dedup),
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
    dist.new_group = new_group
    found: list[dict[str, Any] | str] = []
    for ranks, flags, vocab in json.load(sys.stdin):
        try:
            found.append(read(ranks, flags, vocab))
        except (AssertionError, ValueError, SystemExit) as error:
            found.append(f"{type(error).__name__}: {error}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
