"""A small checkpoint of two MoE layers, written without Megatron, that a test may spoil first."""

import io
import itertools
import json
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ep_plugin.checkpoint.formats.dist_writer import units, write_metadata
from ep_plugin.checkpoint.formats.megatron_dist import COMMON_STATE, CONFIG, TRACKER
from ep_plugin.checkpoint.tensors import NewObject, NewTensor, Region, TensorInfo
from ep_plugin.checkpoint.writer import Journal, write_units

L, E, H, F = 2, 4, 8, 6
ITERATION = 30
FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"  # [L, E, 2F, H], halves apart
FC2 = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
ROUTER = "decoder.layers.mlp.router.weight"
NORM = "decoder.final_layernorm.weight"
TABLE = "embedding.word_embeddings.weight"
SHAPES = {FC1: (L, E, 2 * F, H), FC2: (L, E, H, F), ROUTER: (L, E, H), NORM: (H,), TABLE: (4, H)}
STATES = ("", *(f"optimizer.state.{state}." for state in ("param", "exp_avg", "exp_avg_sq")))


@dataclass
class Content:
    """A checkpoint before it is written: what a test may spoil."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    regions: dict[str, list[Region]] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)

    def add(self, key: str, values: Tensor, cuts: int = 0) -> None:
        """Add a tensor, each index of its first `cuts` axes a region of its own."""
        self.shapes[key], self.dtypes[key] = tuple(values.shape), values.dtype
        self.regions[key] = []
        for place in itertools.product(*map(range, values.shape[:cuts])):
            offsets = (*place, *(0 for _ in values.shape[cuts:]))
            self.regions[key].append(
                Region(offsets, values[place].view((1,) * cuts + values.shape[cuts:]))
            )

    def move(self, key: str, name: str) -> None:
        for part in (self.shapes, self.dtypes, self.regions):
            if key in part:
                part[name] = part.pop(key)  # type: ignore[attr-defined]

    def drop(self, key: str) -> None:
        del self.shapes[key], self.dtypes[key], self.regions[key]


def healthy() -> Content:
    generator = torch.Generator().manual_seed(1)
    args = Namespace(num_experts=E, num_layers=L, moe_layer_freq=1, optimizer="adam")
    content = Content(common={"args": args, "iteration": ITERATION, "optimizer": {}})
    for key, shape in SHAPES.items():
        values = torch.randn(shape, generator=generator)
        for state in STATES:
            content.add(
                state + key, values.square() if "sq" in state else values, min(2, len(shape) - 1)
            )
    return content


def write(content: Content, root: Path) -> Path:
    folder = root / f"iter_{ITERATION:07d}"
    folder.mkdir(parents=True)
    common = io.BytesIO()
    torch.save([content.common], common)
    entries: list[NewTensor | NewObject] = [
        NewTensor(key, TensorInfo(content.shapes[key], content.dtypes[key]), regions.__iter__)
        for key, regions in content.regions.items()
    ]
    files = units([*entries, NewObject(COMMON_STATE, common.getvalue())])
    written = write_units(files, folder, Journal(), 1, lambda _: None)
    contents = [record["content"] for record in written]
    write_metadata(folder, list(zip([file.name for file in files], contents, strict=True)))
    (folder / "metadata.json").write_text(json.dumps(CONFIG))
    (root / TRACKER).write_text(str(ITERATION))
    return root
