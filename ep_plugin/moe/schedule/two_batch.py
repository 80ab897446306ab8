"""Two micro-batches at once: one is computed while the tokens of the other travel.

    network   dispatch A | dispatch B         |           | combine A | combine B
    compute   shared A   | route B, shared B  | experts A | experts B |

`two_batch` runs a layer on both. Where more can be done while tokens travel, such as the attention
of the other micro-batch, put it between its three steps: `depart`, `work`, `arrive`.

Autograd runs what is ready in the reverse order of the forward. The backward of an exchange, too,
is started in one place and waited for in another. So the backward overlaps as the forward does, B
before A:

    network   gradients B | gradients A |           | token gradients B | token gradients A
    compute                             | experts B | experts A         |

Outputs and gradients have the bits of two separate calls of the layer whose losses are added.
Megatron's own schedule overlaps the forward of one micro-batch with the backward of another, and
runs a layer's steps through `ep_plugin/megatron/block/combined.py`.

One call of the layer is one micro-batch. So as an option (`overlap = two_batch`) this is the order
of `serial`; to overlap inside one call, use `chunked`.

Host syncs: those of the dispatcher, when a dispatch is started.
"""

from dataclasses import dataclass

from torch import Tensor

from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.interfaces import Block, Dispatched, Pending, RoutedBlock, Schedule


@dataclass(frozen=True)
class UnderWay[Result]:
    """One micro-batch whose tokens are on their way."""

    hidden: Tensor  # [S, B, H] or [T, H]
    shared: Tensor | None  # the shared expert's output, in the shape of `hidden`
    pending: Pending[Result]


def depart(
    layer: RoutedBlock, hidden: Tensor, padding_mask: Tensor | None = None
) -> UnderWay[Dispatched]:
    """Route `hidden` and start its dispatch; the shared expert runs while tokens travel."""
    routing = layer.route(hidden, padding_mask)
    hidden = layer.onward(hidden, routing)
    tokens = hidden.reshape(-1, hidden.shape[-1])  # [T, H]
    pending = layer.dispatcher.start_dispatch(tokens, routing)
    shared = None if layer.shared_expert is None else layer.shared_expert(hidden)
    return UnderWay(hidden, shared, pending)


def work(layer: RoutedBlock, batch: UnderWay[Dispatched]) -> UnderWay[Tensor]:
    """Wait for the tokens of `batch`, run the experts on them and start the combine."""
    inbox = batch.pending.wait()
    pending = layer.dispatcher.start_combine(layer.compute(inbox), inbox)
    return UnderWay(batch.hidden, batch.shared, pending)


def arrive(layer: RoutedBlock, batch: UnderWay[Tensor]) -> Tensor:
    """Wait for the combine of `batch`; return the layer's output, in the shape of `hidden`."""
    return layer.merge(batch.pending.wait(), batch.shared, batch.hidden)


def two_batch(
    layer: RoutedBlock,
    first: Tensor,
    second: Tensor,
    padding_masks: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """Return the outputs of `layer`, an MoELayer, for two micro-batches, [S, B, H] or [T, H] each.

    Every rank of the expert group must call it. `padding_masks` are those of the layer's forward,
    one for each micro-batch.
    """
    departed = depart(layer, first, padding_masks[0]), depart(layer, second, padding_masks[1])
    computed = work(layer, departed[0]), work(layer, departed[1])
    return arrive(layer, computed[0]), arrive(layer, computed[1])


def build(config: MoEConfig, block: Block) -> Schedule:
    """Return the schedule of one call; it works for every block."""
    return type(block).in_order
