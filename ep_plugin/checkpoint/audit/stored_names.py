"""What a stored name says: whose state it is, and which axes are layers and experts.

decoder.layers.mlp.experts.experts.linear_fc2.weight            [L, E, H, F]  layers alike
decoder.layers.3.mlp.experts.experts.linear_fc2.weight          [E, H, F]
decoder.layers.3.mlp.experts.experts.7.linear_fc1.weight_w      [F, H]  singleton_local_shards
optimizer.state.exp_avg.decoder.layers.mlp.router.weight        a moment of a parameter
"""

import re
from dataclasses import dataclass

_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([^.]+)\.(.+)")
_BUCKET = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\.(.+)\.([^.]+)")
_STACKED = re.compile(r"((?:.*\.)?layers)\.(?!\d)(.+)")
_EXPERT = re.compile(
    r"(.+)\.experts\.experts\.(?:(\d+)\.)?(linear_fc[12])\.((?:weight|bias)(?:_[wv])?)"
)


@dataclass(frozen=True)
class Name:
    """A stored name taken apart."""

    parameter: str  # without the optimizer's prefix
    state: str | None  # exp_avg, ...; None: the parameter itself
    bucket: str | None  # of a dp_reshardable optimizer: which one
    stacked: bool  # axis 0 is the layer
    block: str | None  # of an expert: "decoder.layers.mlp", with a number where not stacked
    map: str | None  # of an expert: "linear_fc1.weight", "linear_fc1.weight_w"
    expert: int | None  # of an expert with a name of its own
    expert_axis: int | None  # which axis the experts are on

    @property
    def is_weight(self) -> bool:
        """Return whether it is a matrix of experts."""
        return self.map is not None and ".weight" in self.map

    @property
    def lead(self) -> int:
        """Return how many axes stand before those of one tensor."""
        return int(self.stacked) + int(self.expert_axis is not None)

    def place(self, offsets: tuple[int, ...]) -> tuple[int | None, int | None]:
        """Return the layer and the expert that `offsets` is in; None where the name says it."""
        layer = offsets[0] if self.stacked else None
        return layer, self.expert if self.expert_axis is None else offsets[self.expert_axis]


def parse(key: str) -> Name:
    """Take a stored name apart."""
    state, parameter, bucket = None, key, None
    if match := _STATE.fullmatch(key):
        state, parameter = match.groups()
    elif match := _BUCKET.fullmatch(key):
        bucket, state = match.groups()
    stacked = _STACKED.fullmatch(parameter) is not None and bucket is None
    expert = None if bucket is not None else _EXPERT.fullmatch(parameter)
    if expert is None:
        return Name(parameter, state, bucket, stacked, None, None, None, None)
    block, number, linear, kind = expert.groups()
    return Name(
        parameter,
        state,
        bucket,
        stacked,
        block,
        f"{linear}.{kind}",
        None if number is None else int(number),
        int(stacked) if number is None else None,
    )


def with_layer(name: str, layer: int | None) -> str:
    """Put a layer's number into a stacked name."""
    return name if layer is None else re.sub(r"\blayers\.(?!\d)", f"layers.{layer}.", name, count=1)


def label(key: str, layer: int | None, expert: int | None) -> str:
    """Return a stored name with its layer's number, and which expert is meant."""
    return with_layer(key, layer) + ("" if expert is None else f", expert {expert}")
