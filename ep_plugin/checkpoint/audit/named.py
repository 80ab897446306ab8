"""Does anything beside the tensors name what whoever loads the checkpoint would run?"""

from typing import Any

from ep_plugin.checkpoint.audit.verdict import Finding
from ep_plugin.checkpoint.carried import dangers, engine_reads
from ep_plugin.checkpoint.tensors import Stored
from ep_plugin.untrusted import cut


class Named:
    """Collects what run arguments and objects name that is not Megatron's; each is read once."""

    def __init__(self, stored: Stored) -> None:
        self._found = [
            (where, f"is {said}: whoever loads the checkpoint runs code of that name")
            for where, said in dangers(stored.common)
        ]
        self._states: list[str] = []

    def look(self, name: str, value: Any) -> None:
        """Look at one object."""
        self._found += [
            (name, f"holds {said}: whoever loads the checkpoint runs code of that name")
            for _, said in dangers(value)
        ]
        if engine_reads(name, value):
            self._states.append(name)

    def findings(self) -> list[Finding]:
        found = [Finding("error", "files", cut(where), text) for where, text in self._found]
        if not self._states:
            return found
        count = len(self._states) - 1
        words = f"and {count} more are states" if count else "is a state"
        text = (
            f"{words} that only Transformer Engine reads, a pickle inside a tensor that "
            "nothing here looks into: load it only from a source that you trust, or convert "
            "it with --leave-out _extra_state"
        )
        return [*found, Finding("warning", "files", cut(self._states[0]), text)]
