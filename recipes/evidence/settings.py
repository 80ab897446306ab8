"""(s) Settings of router and training, side by side on a tenth of the tokens.

Run it first: what is best here is what the other claims should train with (Size.router of
recipes/evidence/_model.py). All scripts share recipes/evidence/_sweep.py.
"""

import sys

from _model import HALF, SCALE, TOP1, TOP2, Variant, top1
from _sweep import main, of_losses
from _verdict import Less

PART = 0.1
SIGMOID = TOP1.replace("--moe-router-pre-softmax", "--moe-router-score-function sigmoid")
NONE = "--moe-aux-loss-coeff 0"
LITTLE = "--moe-aux-loss-coeff 1e-3"
SLOW = "--lr 5e-4 --min-lr 2.5e-5"
TOP2_HALF = TOP2.replace("{ffn}", "{half}")
FLAGS = {
    "dense": "",
    "scaled": top1(8),
    "bare": f"--num-experts 8 {TOP1}",
    "scaled-aux3": f"{top1(8)} {LITTLE}",
    "scaled-fast": f"{top1(8)} --lr 2e-3 --min-lr 1e-4",
    "scaled-warm": f"{top1(8)} --lr-warmup-iters {{fifth}}",
    "scaled-narrow": f"{top1(8)} --init-method-std 0.01",
    "scaled-64": top1(64),
    "sigmoid": f"--num-experts 8 {SCALE} 2 {SIGMOID}",
    "sigmoid-64": f"--num-experts 64 {SCALE} 2 {SIGMOID}",
    "bias": f"--num-experts 8 {SCALE} 2 {SIGMOID} {NONE} --moe-router-enable-expert-bias",
    "dense-slow": SLOW,
    "slow-aux3": f"{top1(8)} {LITTLE} {SLOW}",
    "sigmoid-aux3": f"--num-experts 8 {SCALE} 2 {SIGMOID} {LITTLE}",
    "top2-e8": f"--num-experts 8 {TOP2_HALF}",
    "top2-e16": f"--num-experts 16 --moe-router-topk 2 {HALF}",
    "top2-e16-slow": f"--num-experts 16 --moe-router-topk 2 {HALF} {SLOW}",
    "top2-e64": f"--num-experts 64 --moe-router-topk 2 {HALF}",
}
VARIANTS = tuple(  # not with what was chosen by them
    Variant(f"set-{name}", flags.replace("{router}", ""), share=PART)
    for name, flags in FLAGS.items()
)
SAID = {
    "dense": "dense",
    "scaled": "8 experts, gate times 8",
    "bare": "bare gate",
    "scaled-aux3": "times 8, balancing loss 0.001",
    "scaled-fast": "times 8, twice the learning rate",
    "scaled-warm": "times 8, warmup of a fifth",
    "scaled-narrow": "times 8, half the initial std",
    "scaled-64": "64 experts, gate times 64",
    "sigmoid": "8 experts, sigmoid times 2",
    "sigmoid-64": "64 experts, sigmoid times 2",
    "bias": "sigmoid times 2, expert bias alone",
    "dense-slow": "dense, half the learning rate",
    "slow-aux3": "times 8, balancing loss 0.001, half the learning rate",
    "sigmoid-aux3": "sigmoid times 2, balancing loss 0.001",
    "top2-e8": "top-2 of 8 half experts",
    "top2-e16": "top-2 of 16 half experts",
    "top2-e16-slow": "top-2 of 16 half experts, half the learning rate",
    "top2-e64": "top-2 of 64 half experts",
}
LABELS = {f"set-{name}": said for name, said in SAID.items()}
SAYS = "A gate that is 1 at the start gives a lower loss than a bare probability."
CHECKS = (Less("set-scaled", "set-bare"), Less("set-sigmoid", "set-bare"))
CLAIM = of_losses("s", "settings", "Settings", SAYS, VARIANTS, LABELS, CHECKS)

if __name__ == "__main__":
    sys.exit(main([CLAIM], "settings.py"))
