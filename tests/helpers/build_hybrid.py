"""Count the parameters of Megatron's HybridModels, built without storage and without other ranks.

Reads a JSON list of [number of ranks, Megatron's flags] from stdin; prints one JSON list, last
line: for each a dictionary, whose "stages" has for each pipeline stage symbol -> parameters of one
rank, and "flops" what Megatron counts for the training step of one sequence. Layers of the pattern
are counted under their symbol, multi-token prediction's own parts as "prediction", what stands
before and behind as "embedding" and "output".

`M` and `G` are Megatron's classes with local maps in place of Transformer Engine's, whose norm then
stands before them; their packages are asked for nothing but a norm.
"""

import json
import os
import sys
from collections import Counter
from contextlib import nullcontext
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from read_flags import INIT, new_group
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import ep_plugin.megatron
from ep_plugin.megatron.arguments import layer_pattern
from ep_plugin.megatron.cpu.local_layers import local_stack


class GatedNorm(nn.Module):
    """In place of mamba-ssm's norm: one weight for each value of this rank."""

    def __init__(self, size: int, device: Any, dtype: torch.dtype, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))


def whole_stack(config: Any) -> Any:
    """Return the local layers, and Mamba, gated delta net and prediction of local parts."""
    mixer = import_module("megatron.core.ssm.mamba_mixer")
    mamba = import_module("megatron.core.ssm.mamba_layer")
    delta = import_module("megatron.core.ssm.gated_delta_net")
    common = import_module("megatron.core.ssm.gated_delta_net.common")
    layers = import_module("megatron.core.tensor_parallel.layers")
    transformer = import_module("megatron.core.transformer.transformer_layer")
    predict = import_module("megatron.core.transformer.multi_token_prediction")
    spec = import_module("megatron.core.transformer.spec_utils").ModuleSpec
    norm = import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm
    import_module("megatron.core.ssm.mamba_context_parallel").HAVE_EINOPS = True
    mixer.HAVE_MAMBA_SSM = mixer.HAVE_EINOPS = common.HAVE_FLA = True
    import_module("megatron.core.ssm.gated_delta_net.gdn").chunk_gated_delta_rule = nullcontext
    mixer.ExtendedRMSNorm = GatedNorm
    mixer.get_cuda_rng_tracker = lambda: SimpleNamespace(fork=nullcontext)  # no random numbers
    maps = {"in_proj": layers.ColumnParallelLinear, "out_proj": layers.RowParallelLinear}
    stack = local_stack(config)
    stack.submodules.mamba_layer = spec(
        module=mamba.MambaLayer,
        submodules=mamba.MambaLayerSubmodules(
            norm=norm,
            mixer=spec(module=mixer.MambaMixer, submodules=mixer.MambaMixerSubmodules(**maps)),
        ),
    )
    stack.submodules.gdn_layer = spec(
        module=transformer.TransformerLayer,
        submodules=transformer.TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=spec(
                module=delta.GatedDeltaNet,
                submodules=delta.GatedDeltaNetSubmodules(out_norm=norm, **maps),
            ),
        ),
    )
    one = predict.MultiTokenPredictionLayerSubmodules(
        enorm=norm, hnorm=norm, eh_proj=layers.ColumnParallelLinear, layer_norm=norm
    )
    stack.submodules.mtp_block_spec = spec(
        module=predict.MultiTokenPredictionBlock,
        submodules=predict.MultiTokenPredictionBlockSubmodules(
            layer_specs=[spec(module=predict.MultiTokenPredictionLayer, submodules=one)]
        ),
    )
    return stack


def count(args: Any, config: Any, rank: int) -> dict[str, int]:
    """Return the parameters of one rank's part of the model, by kind."""
    from megatron.core import parallel_state
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    INIT(backend="fake", store=FakeStore(), rank=rank, world_size=args.world_size)
    virtual = args.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    model_parallel_cuda_manual_seed(1)
    config.perform_initialization = False
    config.use_cpu_initialization = True
    found: Counter[str] = Counter()
    for chunk in range(virtual or 1):
        stage = chunk if virtual else None
        where = {"ignore_virtual": stage is None, "vp_stage": stage}
        with FakeTensorMode():
            model = HybridModel(
                config,
                whole_stack(config),
                vocab_size=args.padded_vocab_size,
                max_sequence_length=args.max_position_embeddings,
                hybrid_layer_pattern=args.hybrid_layer_pattern,
                pre_process=parallel_state.is_pipeline_first_stage(**where),
                post_process=parallel_state.is_pipeline_last_stage(**where),
                share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
                position_embedding_type=args.position_embedding_type,
                vp_stage=stage,
            )
        for name, parameter in model.named_parameters():
            found[_kind(name, model)] += parameter.numel()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return dict(found)


def _kind(name: str, model: Any) -> str:
    first, *rest = name.split(".")
    if first == "embedding":
        return "embedding"
    if first == "mtp":
        inside = rest.index("mtp_model_layer") if "mtp_model_layer" in rest else -1
        return model.mtp_pattern[int(rest[inside + 2])] if inside >= 0 else "prediction"
    if first == "decoder" and rest[0] == "layers":
        return str(model.decoder.layer_type_list[int(rest[1])])
    return "output"


def read(ranks: int, flags: list[str]) -> dict[str, Any]:
    """Return what one rank of each pipeline stage holds, and the work of a sequence."""
    from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding
    from megatron.training import arguments
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.training import num_floating_point_operations

    os.environ["WORLD_SIZE"] = str(ranks)
    sys.argv = ["pretrain", *flags]
    args = arguments.parse_args()
    arguments.validate_args(args)
    args.padded_vocab_size = vocab_size_with_padding(args.vocab_size, args, False)
    config = core_transformer_config_from_args(args)
    each = ranks // args.pipeline_model_parallel_size
    stages = [count(args, config, rank) for rank in range(0, ranks, each)]
    return {"stages": stages, "flops": num_floating_point_operations(args, 1)}


def main() -> None:
    """Build the model of every command line of stdin."""
    ep_plugin.megatron.install()
    dist.new_group = new_group
    layer_pattern._check_on_the_cpu = lambda pattern: None  # nothing is computed
    found: list[Any] = []
    for ranks, flags in json.load(sys.stdin):
        try:
            found.append(read(ranks, flags))
        except (AssertionError, ValueError, SystemExit) as error:
            found.append(f"{type(error).__name__}: {error}")
            if dist.is_initialized():
                dist.destroy_process_group()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
