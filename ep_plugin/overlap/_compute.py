"""The experts between dispatch and combine, where other ranks wait for what they make."""

from torch import Tensor

from ep_plugin.contracts import Block, Dispatched


def compute(block: Block, inbox: Dispatched) -> Tensor:
    """Return what the experts make of `inbox`; when they fail, other ranks are told."""
    try:
        outbox: Tensor = block.experts(inbox)
    except Exception:
        agreement = getattr(block.dispatcher, "agreement", None)
        if agreement is not None:
            agreement.fail()
        raise
    return outbox
