"""(c) What a capacity drops in training, and what that costs.

All scripts share recipes/evidence/_sweep.py.
"""

import itertools
import sys

from _model import E8, Variant, top1
from _sweep import main, of_losses
from _verdict import Less

FACTORS = (2.0, 1.25, 1.0, 0.75)
DROP = "--ep-drop-policy position --ep-capacity-factor"
VARIANTS = (
    E8,
    *(Variant(f"capacity-{f}", f"{top1(8)} {DROP} {f}") for f in FACTORS),
)
LABELS = {"top1-e8": "no capacity", **{f"capacity-{f}": f"factor {f}" for f in FACTORS}}
SAYS = "What a capacity drops costs loss: the less room, the higher the loss."
CHECKS = (
    *(Less(more, less) for more, less in itertools.pairwise(LABELS)),
    Less("top1-e8", "capacity-0.75"),
)
CLAIM = of_losses("c", "capacity", "Capacity and drops", SAYS, VARIANTS, LABELS, CHECKS)

if __name__ == "__main__":
    sys.exit(main([CLAIM], "capacity.py"))
