"""Draw the pictures of the README.

python docs/pictures/draw.py layer                  from benchmarks/results/layer_h100.json
python docs/pictures/draw.py quickstart RUN_FOLDER  from what recipes/quickstart.sh left there
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results" / "layer_h100.json"
SHAPES = {
    "dsv3": "DeepSeek-V3",
    "q3-235b": "Qwen3-235B-A22B",
    "q3-30b-ep8": "Qwen3-30B-A3B, EP 8",
    "q3-30b": "Qwen3-30B-A3B",
    "mixtral": "Mixtral 8x7B",
}
BARS = (  # label, colour, whose, precision, in a CUDA graph
    ("Megatron bf16", "#9ca3af", "megatron", "bf16", False),
    ("Megatron FP8, the better recipe", "#6b7280", "megatron", "fp8", False),
    ("ep_plugin bf16, CUDA graph", "#5fa8a0", "ep_plugin", "bf16", True),
    ("ep_plugin FP8 rowwise, CUDA graph", "#0f766e", "ep_plugin+rowwise", "fp8", True),
)


def milliseconds(rows: list[dict[str, Any]], shape: str, who: str, how: str, graph: bool) -> float:
    """Return the time of a layer, forward and backward; the best of the backends called so."""
    return min(
        row["ms"]
        for row in rows
        if (row["shape"], row["precision"], row["graph"]) == (shape, how, graph)
        and row["routing"] == "balanced"
        and (row["backend"] == who or (who == "megatron" and row["backend"].startswith(who)))
    )


def layer() -> None:
    """One layer on one H100, beside Megatron's."""
    rows = json.loads(RESULTS.read_text())
    figure, axes = plt.subplots(1, len(SHAPES), figsize=(11, 2.8), layout="constrained")
    for axis, (shape, title) in zip(axes, SHAPES.items(), strict=True):
        for place, (label, colour, who, how, graph) in enumerate(BARS):
            value = milliseconds(rows, shape, who, how, graph)
            bar = axis.bar(place, value, color=colour, label=label)
            axis.bar_label(bar, fmt="%.1f", fontsize=8)
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("ms, forward and backward")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(HERE / "layer.png", dpi=90)


def quickstart(run: Path) -> None:
    """The figures of a run's report, one under the other."""
    images = [plt.imread(run / name) for name in ("loss.png", "experts.png")]
    height = sum(image.shape[0] / image.shape[1] for image in images)
    figure, axes = plt.subplots(2, 1, figsize=(7, 7 * height + 0.5), layout="constrained")
    for axis, image in zip(axes, images, strict=True):
        axis.imshow(image)
        axis.set_axis_off()
    figure.savefig(HERE / "quickstart.png", dpi=100)


if __name__ == "__main__":
    if sys.argv[1] == "layer":
        layer()
    else:
        quickstart(Path(sys.argv[2]))
