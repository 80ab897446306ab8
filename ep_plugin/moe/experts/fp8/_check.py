"""What every FP8 recipe requires of sizes and device."""

import torch

from ep_plugin.errors import ConfigError


def check_recipe(
    recipe: str, multiple: int, hidden_size: int, ffn_hidden_size: int, device: torch.device
) -> None:
    """Raise ConfigError unless both sizes are multiples of `multiple` on each rank.

    Also raise what `check_device` raises.
    """
    for name, size in (("hidden_size", hidden_size), ("ffn_hidden_size", ffn_hidden_size)):
        if size % multiple:
            raise ConfigError(
                f"<fp8> ({recipe}) needs <{name}> on each rank ({size}) to be a multiple of "
                f"{multiple}; use {-(-size // multiple) * multiple} on each rank, "
                "<fp8=blockwise>, which takes any size, or <fp8=off>"
            )
    check_device(recipe, device)


def check_device(recipe: str, device: torch.device) -> None:
    """Raise ConfigError on a GPU without e4m3 (older than compute capability 9.0).

    The CPU computes the same values in fp32.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        raise ConfigError(
            f"<fp8> ({recipe}) needs a GPU of compute capability 9.0 (H100) or newer; this is "
            f"{torch.cuda.get_device_name(device)}; use <fp8=off>"
        )
