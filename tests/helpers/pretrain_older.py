"""recipes/pretrain_gpt.py for Megatron's loop until 0.18, with the same weights at every layout
where EP_TEST_SAME_WEIGHTS asks for them."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from core_model import fill

RECIPE = Path(__file__).parents[2] / "recipes" / "pretrain_gpt.py"


def load_recipe() -> Any:
    """Return the recipe as a module."""
    spec = importlib.util.spec_from_file_location("recipe", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


if __name__ == "__main__":
    recipe = load_recipe()
    build = recipe.model_provider

    def model_provider(*given: Any, **named: Any) -> Any:
        """Return the recipe's model, its weights filled in."""
        model = build(*given, **named)
        if "EP_TEST_SAME_WEIGHTS" in os.environ:
            fill(model)
        return model

    recipe.model_provider = model_provider
    recipe.main()
