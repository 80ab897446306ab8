"""(f) The router in fp32 beside a router in bf16, in a bf16 model.

All scripts share recipes/evidence/_sweep.py.
"""

import sys

from _model import Variant, top1
from _sweep import main, of_losses
from _verdict import Less

MODEL = top1(8).replace("--moe-router-dtype fp32", "--ep-router-dtype model")
VARIANTS = (
    Variant("router-fp32", f"--bf16 {top1(8)}"),
    Variant("router-bf16", f"--bf16 {MODEL}"),
)
LABELS = {"router-fp32": "router in fp32", "router-bf16": "router in bf16"}
SAYS = "A router in fp32 has a lower loss than one in bf16."
CHECKS = (Less("router-fp32", "router-bf16"),)
CLAIM = of_losses("f", "router_dtype", "Dtype of the router", SAYS, VARIANTS, LABELS, CHECKS)

if __name__ == "__main__":
    sys.exit(main([CLAIM], "router_dtype.py"))
