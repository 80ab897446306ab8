"""Sparse upcycling (arXiv:2212.05055): every expert begins as the dense FFN.

An MoE layer computes y = sum over the chosen experts i of p_i * FFN_i(x). With FFN_i = FFN for all
i, y = (sum of p_i) * FFN(x): the dense output whatever the router says, once the sum of the gates
is known (`upcycling.py`).
"""

from ep_plugin.checkpoint.adapt.ffn import Mode
from ep_plugin.checkpoint.adapt.upcycling import Upcycling


def build(_: Upcycling) -> Mode:
    """Return the mode; it has no settings."""
    return Mode()
