"""Draw the picture of the quickstart.

python docs/pictures/draw.py RUN_FOLDER    from what recipes/quickstart.sh left there
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent


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
    quickstart(Path(sys.argv[1]))
