"""Print the number of parameters of presets as Megatron builds them, without storage.

python count_parameters.py NAME ...
"""

import json
import sys
import tempfile

import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

import ep_plugin.megatron
from ep_plugin.megatron.arguments.spell import megatron_arguments
from ep_plugin.presets import load


def build(name: str) -> int:
    """Return the parameters of Megatron's GPT with the preset's arguments."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
    )
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.training import arguments
    from megatron.training.argument_utils import core_transformer_config_from_args

    flags = ["--micro-batch-size", "1", "--transformer-impl", "local", "--no-rope-fusion"]
    flags += ["--no-masked-softmax-fusion", "--no-persist-layer-norm", "--use-cpu-initialization"]
    flags += ["--no-gradient-accumulation-fusion", "--no-bias-swiglu-fusion"]
    flags += ["--moe-token-dispatcher-type", "alltoall", "--train-iters", "1"]
    sys.argv = ["count", *megatron_arguments(load(name)), *flags]
    args = arguments.parse_args()
    arguments.validate_args(args)
    config = core_transformer_config_from_args(args)
    config.perform_initialization = False
    if args.num_experts is None:
        spec = get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization="RMSNorm")
    else:
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=args.normalization
        )
        for layer in spec.layer_specs if args.multi_latent_attention else ():
            # The local attention does not take these head sizes; it has no parameters either.
            layer.submodules.self_attention.submodules.core_attention = IdentityOp
    with FakeTensorMode():
        model = GPTModel(
            config,
            spec,
            vocab_size=load(name).model.vocab,
            max_sequence_length=args.max_position_embeddings,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
        )
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    """Build every preset named on the command line."""
    names = sys.argv[1:]
    ep_plugin.megatron.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        print(json.dumps({name: build(name) for name in names}))


if __name__ == "__main__":
    main()
