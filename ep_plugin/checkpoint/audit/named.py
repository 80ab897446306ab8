"""Does anything beside the tensors name what whoever loads the checkpoint would run?"""

from collections.abc import Iterator

from ep_plugin.checkpoint.audit.verdict import Finding
from ep_plugin.checkpoint.carried import EXTRA_STATE, dangers, engine_reads
from ep_plugin.checkpoint.tensors import Damaged, Stored
from ep_plugin.untrusted import cut


def check(stored: Stored) -> list[Finding]:
    """Return what run arguments and objects name that is not Megatron's."""
    found = [Finding("error", "files", cut(where), text) for where, text in _found(stored)]
    states = list(_engine_states(stored))
    if states:
        more = f" and {len(states) - 1} more are states" if len(states) > 1 else " is a state"
        found.append(
            Finding(
                "warning",
                "files",
                cut(states[0]),
                f"{more.strip()} that only Transformer Engine reads, a pickle inside a tensor that "
                "nothing here looks into: load it only from a source that you trust, or convert "
                "it with --leave-out _extra_state",
            )
        )
    return found


def _engine_states(stored: Stored) -> Iterator[str]:
    for name in sorted(name for name in stored.objects if EXTRA_STATE in name):
        try:
            value = stored.read_object(name)
        except Damaged:
            continue  # `whole.py` says so
        if engine_reads(name, value):
            yield name


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
