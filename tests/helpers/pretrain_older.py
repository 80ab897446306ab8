"""recipes/pretrain_gpt.py for Megatron's loop until 0.18, which is started in other words."""

import importlib.util
import inspect
import os
from pathlib import Path
from typing import Any

from core_model import fill
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.training import argument_utils, arguments, get_args, pretrain

RECIPE = Path(__file__).parents[2] / "recipes" / "pretrain_gpt.py"


def load_recipe() -> Any:
    """Return the recipe as a module; names that only its own start asks for may be missing."""
    for module, name in (
        (arguments, "parse_and_validate_args"),
        (argument_utils, "gpt_config_from_args"),
        (argument_utils, "pretrain_cfg_container_from_args"),
    ):
        if not hasattr(module, name):
            setattr(module, name, None)
    spec = importlib.util.spec_from_file_location("recipe", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    of_cp_rank = recipe.get_batch_on_this_cp_rank
    if "is_hybrid_cp" not in inspect.signature(of_cp_rank).parameters:  # 0.17
        recipe.get_batch_on_this_cp_rank = lambda batch, **_: of_cp_rank(batch)
    return recipe


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> Any:
    """Return one pipeline stage of a GPT."""
    args = get_args()
    config = config or arguments.core_transformer_config_from_args(args)
    if args.num_experts:
        spec = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=False,
            normalization=args.normalization,
            vp_stage=vp_stage,
        )
    else:
        spec = get_gpt_layer_local_spec(normalization=args.normalization)
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        vp_stage=vp_stage,
    )
    if "EP_TEST_SAME_WEIGHTS" in os.environ:  # at every layout
        fill(model)
    return model


if __name__ == "__main__":
    recipe = load_recipe()
    given: dict[str, Any] = {}
    if "cfg_container" in inspect.signature(pretrain).parameters:  # 0.18
        given["cfg_container"] = argument_utils.pretrain_cfg_container_from_args(
            arguments.parse_and_validate_args()
        )
    pretrain(
        train_valid_test_dataset_provider=recipe.datasets_provider,
        model_provider=model_provider,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=recipe.forward_step,
        **given,
    )
