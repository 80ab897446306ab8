"""(i) More experts in late layers beside more in early ones, equal in sum.

All scripts share recipes/evidence/_sweep.py.
"""

import sys

from _model import E8, SCALE, TOP1, Variant
from _sweep import main, of_losses
from _verdict import Less

FEW_MANY = "--moe-layer-freq [1]*{depth} --ep-experts-per-layer 4*{layers},12*{layers}"
MANY_FEW = "--moe-layer-freq [1]*{depth} --ep-experts-per-layer 12*{layers},4*{layers}"
TWELVE = f"--num-experts 12 {SCALE} 8 {TOP1}"
VARIANTS = (
    E8,
    Variant("late", f"{TWELVE} {FEW_MANY}"),
    Variant("early", f"{TWELVE} {MANY_FEW}"),
)
LABELS = {"top1-e8": "8 in each layer", "late": "4, then 12", "early": "12, then 4"}
SAYS = (
    "Of the same number of experts, more in late layers give a lower loss than more in early ones."
)
CHECKS = (Less("late", "early"), Less("late", "top1-e8"))
CLAIM = of_losses("i", "placement", "Where experts lie", SAYS, VARIANTS, LABELS, CHECKS)

if __name__ == "__main__":
    sys.exit(main([CLAIM], "placement.py"))
