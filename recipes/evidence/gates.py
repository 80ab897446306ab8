"""(b) Top-1, top-2 and a residual at equal compute and equal total size.

All scripts share recipes/evidence/_sweep.py.
"""

import sys

from _model import DENSE, E8, HALF, SCALE, Variant
from _sweep import main, of_losses

ONE_OF_16 = f"--num-experts 16 --moe-router-topk 1 --moe-router-pre-softmax {SCALE} 16 {HALF}"
RESIDUAL = "--moe-shared-expert-intermediate-size {half} --ep-shared-expert learned"
VARIANTS = (
    DENSE,
    E8,
    Variant("top2-half-e16", f"--num-experts 16 --moe-router-topk 2 {HALF}"),
    Variant("residual-half-e16", f"{ONE_OF_16} {RESIDUAL}"),
)
LABELS = {
    "dense": "dense",
    "top1-e8": "top-1 of 8",
    "top2-half-e16": "top-2 of 16 half experts",
    "residual-half-e16": "half an FFN, and top-1 of 16 half experts",
}
CLAIM = of_losses("b", "gates", __doc__.splitlines()[0][4:], VARIANTS, LABELS)

if __name__ == "__main__":
    sys.exit(main([CLAIM], "gates.py"))
