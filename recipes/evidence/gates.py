"""(b) Top-1, top-2 and a residual at equal compute and equal total size.

All scripts share recipes/evidence/_sweep.py.
"""

import sys

from _model import DENSE, E8, HALF, SCALE, Variant
from _sweep import main, of_losses
from _verdict import Less

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
SAYS = (
    "At equal compute and equal total size, top-2 of half experts is below top-1, and a residual, "
    "which sends as much as top-1 of half experts, lies between the two."
)
CHECKS = (
    Less("top2-half-e16", "top1-e8"),
    Less("residual-half-e16", "top1-e8"),
    Less("top2-half-e16", "residual-half-e16"),
)
CLAIM = of_losses("b", "gates", "Top-1, top-2 and a residual", SAYS, VARIANTS, LABELS, CHECKS)

if __name__ == "__main__":
    sys.exit(main([CLAIM], "gates.py"))
