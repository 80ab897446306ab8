"""(d) A balancing loss, an expert bias, or neither: imbalance and loss.

All scripts share recipes/evidence/_sweep.py.
"""

import sys

from _model import TOP1, Variant
from _sweep import main, of_losses

SIGMOID = TOP1.replace("--moe-router-pre-softmax", "--moe-router-score-function sigmoid")
NONE = "--moe-aux-loss-coeff 0"
VARIANTS = (
    Variant("sigmoid-loss", f"--num-experts 8 {SIGMOID}"),
    Variant("sigmoid-bias", f"--num-experts 8 {SIGMOID} {NONE} --moe-router-enable-expert-bias"),
    Variant("sigmoid-none", f"--num-experts 8 {SIGMOID} {NONE}"),
    Variant("top1-e8", f"--num-experts 8 {TOP1}"),
    Variant("softmax-none", f"--num-experts 8 {TOP1} {NONE}"),
)
LABELS = {
    "sigmoid-loss": "sigmoid, loss 0.01",
    "sigmoid-bias": "sigmoid, expert bias",
    "sigmoid-none": "sigmoid, neither",
    "top1-e8": "softmax, loss 0.01",
    "softmax-none": "softmax, neither",
}
CLAIM = of_losses("d", "balance", __doc__.splitlines()[0][4:], VARIANTS, LABELS)

if __name__ == "__main__":
    sys.exit(main([CLAIM], "balance.py"))
