"""(d) A balancing loss, an expert bias, or neither: imbalance and loss.

All scripts share recipes/evidence/_sweep.py.
"""

import sys

from _model import E8, SCALE, TOP1, Variant, top1
from _sweep import main, of_losses
from _verdict import Less

SIGMOID = (  # a gate is a half at the start
    f"--num-experts 8 {SCALE} 2 "
    + TOP1.replace("--moe-router-pre-softmax", "--moe-router-score-function sigmoid")
)
NONE = "--moe-aux-loss-coeff 0"
VARIANTS = (
    Variant("sigmoid-loss", SIGMOID),
    Variant("sigmoid-bias", f"{SIGMOID} {NONE} --moe-router-enable-expert-bias"),
    Variant("sigmoid-none", f"{SIGMOID} {NONE}"),
    E8,
    Variant("softmax-none", f"{top1(8)} {NONE}"),
)
LABELS = {
    "sigmoid-loss": "sigmoid, balancing loss",
    "sigmoid-bias": "sigmoid, expert bias",
    "sigmoid-none": "sigmoid, neither",
    "top1-e8": "softmax, balancing loss",
    "softmax-none": "softmax, neither",
}
SAYS = (
    "A balancing loss and an expert bias each make experts more even than neither, "
    "and a bias costs less loss than a balancing loss."
)
CHECKS = (
    Less("sigmoid-loss", "sigmoid-none", "max_over_mean"),
    Less("sigmoid-bias", "sigmoid-none", "max_over_mean"),
    Less("top1-e8", "softmax-none", "max_over_mean"),
    Less("sigmoid-bias", "sigmoid-loss"),
)
CLAIM = of_losses("d", "balance", "Balance", SAYS, VARIANTS, LABELS, CHECKS)

if __name__ == "__main__":
    sys.exit(main([CLAIM], "balance.py"))
