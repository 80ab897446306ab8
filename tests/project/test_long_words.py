"""What was typed or read is cut in a message, however long it is."""

from collections.abc import Callable
from typing import Any

import pytest

from ep_plugin import ParallelConfig
from ep_plugin.checkpoint.config_keys import Keys
from ep_plugin.checkpoint.families import _rope
from ep_plugin.checkpoint.moe_layers import parse_layers
from ep_plugin.errors import ConfigError, check_choice

LONG: Any = "x" * 5000
LISTS = {"rope_type": [1] * 5000, "type": {"a": 1}}  # neither can be in a set


@pytest.mark.parametrize(
    "refused",
    [
        lambda: ParallelConfig(world_size=1, order=LONG),
        lambda: check_choice("--mode", LONG, ("copy", "drop")),
        lambda: parse_layers(LONG, 4),
        lambda: _rope.kind(Keys(LISTS)),
        lambda: _rope.kind(Keys({"rope_type": LONG, "type": "yarn"})),
    ],
)
def test_a_long_value_is_cut(refused: Callable[[], object]) -> None:
    with pytest.raises(ConfigError) as caught:
        refused()
    assert 20 < len(str(caught.value)) < 1000
