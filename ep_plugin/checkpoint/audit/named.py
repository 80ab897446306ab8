"""Does anything beside the tensors name what whoever loads the checkpoint would run?"""

from collections.abc import Iterator

from ep_plugin.checkpoint.audit.verdict import Finding
from ep_plugin.checkpoint.carried import dangers
from ep_plugin.checkpoint.tensors import Damaged, Stored
from ep_plugin.untrusted import cut


def check(stored: Stored) -> list[Finding]:
    """Return what run arguments and objects name that is not Megatron's."""
    return [Finding("error", "files", cut(where), text) for where, text in _found(stored)]


def _found(stored: Stored) -> Iterator[tuple[str, str]]:
    for where, said in dangers(stored.common):
        yield where, f"is {said}: whoever loads the checkpoint runs code of that name"
    for name in sorted(stored.objects):
        try:
            value = stored.read_object(name)
        except Damaged:
            continue  # `whole.py` says so
        for _, said in dangers(value):
            yield name, f"holds {said}: whoever loads the checkpoint runs code of that name"
