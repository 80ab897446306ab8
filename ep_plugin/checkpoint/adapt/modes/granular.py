"""Fine-grained upcycling (arXiv:2410.07524): each dense FFN is cut into g experts along F.

Expert i holds shard i mod g of the channels, so experts g*n .. g*n + g - 1 are one whole FFN, a
virtual group. A dense FFN is the sum of its shards, y = sum over j of FFN_j(x), because a channel's
activation needs no other channel. With the rows of the router equal inside a virtual group
(`--router-init virtual-group`) its g experts have equal logits, so top-k with k a multiple of g
takes whole groups and gives the g experts of a group the same weight p:

    sum over groups n of p_n * (sum over j of FFN_j(x)) = (sum over n of p_n) * y = (G / g) * y

where G is the sum of all k gates. Hence the gain g / G on the experts' outputs; the bias of fc2 is
in every expert whole, so its own gain is 1 / G. Where the gain goes stands in `upcycling.py`.

With another router the chosen shards are no whole FFN. The same gain is then right on average over
shards, and wrong for each token.
"""

from ep_plugin.checkpoint.adapt.ffn import Mode
from ep_plugin.checkpoint.adapt.upcycling import Upcycling


def build(settings: Upcycling) -> Mode:
    """Return the mode with the granularity of `settings`."""
    deviation = None
    if settings.router_init == "normal":
        deviation = (
            "with --router-init normal a token's experts are shards of several copies, no whole "
            "FFN; virtual-group keeps the output"
        )
    if settings.router_init == "zero" and settings.topk % settings.granularity:
        deviation = "the topk experts of a zero router are no whole number of FFNs"
    return Mode(granularity=settings.granularity, deviation=deviation)
