"""A pretrain script for Megatron's loop until 0.18, over the model and loss of core_model.py."""

import inspect
from typing import Any

import torch
from core_model import LENGTH, VOCAB, build, fill, forward_step
from megatron.core.enums import ModelType
from megatron.training import arguments, get_args, pretrain
from torch import Tensor


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random sequences, the same wherever they are read."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(VOCAB, (LENGTH + 1,), generator=generator)
        return {"tokens": tokens[:-1], "labels": tokens[1:], "mask": torch.ones(LENGTH)}


def datasets(num_samples: list[int]) -> list[Tokens]:
    """Return the training, validation and test sets."""
    return [Tokens(max(number, 8)) for number in num_samples]


datasets.is_distributed = True  # type: ignore[attr-defined]  # Megatron asks: every rank builds


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> Any:
    """Return the model with the same initial values at every layout."""
    config = config or arguments.core_transformer_config_from_args(get_args())
    model = build(config, vp_stage)
    fill(model)
    return model


if __name__ == "__main__":
    given: dict[str, Any] = {}
    if "cfg_container" in inspect.signature(pretrain).parameters:  # 0.18
        from megatron.training.argument_utils import pretrain_cfg_container_from_args

        given["cfg_container"] = pretrain_cfg_container_from_args(
            arguments.parse_and_validate_args()
        )
    pretrain(
        train_valid_test_dataset_provider=datasets,
        model_provider=model_provider,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
        **given,
    )
