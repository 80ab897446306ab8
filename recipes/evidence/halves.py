"""(a2) Loss against the number of half experts, top-2, at the active FLOPs of the dense model.

All scripts share recipes/evidence/_sweep.py; tables and plots are those of
recipes/evidence/experts.py.
"""

import sys

from _model import DENSE, HALF, Variant
from _sweep import main
from _verdict import Less, Sooner
from experts import of_numbers

EXPERTS = (4, 8, 16, 32, 64, 128)
LABELS = {"dense": "dense", **{f"top2-half-e{e}": f"{e} half experts" for e in EXPERTS}}
VARIANTS = (
    DENSE,
    *(Variant(f"top2-half-e{e}", f"--num-experts {e} --moe-router-topk 2 {HALF}") for e in EXPERTS),
)
SAYS = (
    "With two half experts a token, more experts give a lower loss at every doubling; 16 have the "
    "dense model's final loss after at most 1/1.5 of the tokens, 128 after at most half."
)
MORE = (
    Less("top2-half-e16", "dense"),
    Sooner("top2-half-e16", "dense", 1.5),
    Sooner("top2-half-e128", "dense", 2.0),
)
CLAIM = of_numbers(
    "a2", "halves", "Number of half experts, top-2", "top-2", SAYS, VARIANTS, LABELS, MORE
)

if __name__ == "__main__":
    sys.exit(main([CLAIM], "halves.py"))
