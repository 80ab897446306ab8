"""Do the parts of each tensor cover it exactly once, and do they hold what they should?"""

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from ep_plugin.checkpoint.audit.facts import Facts, Place
from ep_plugin.checkpoint.audit.stored_names import label, parse
from ep_plugin.checkpoint.audit.verdict import Finding
from ep_plugin.checkpoint.complete import incomplete, not_there
from ep_plugin.checkpoint.tensors import Stored, TensorInfo
from ep_plugin.checkpoint.whole import misplaced, problems


def check(
    stored: Stored, facts: dict[str, Facts], look: Callable[[str, Any], None]
) -> tuple[set[tuple[str, Place]], list[Finding]]:
    """Return what is wrong with single tensors: holes, overlaps, unreadable parts, values.

    With it goes which tensors are not whole, by layer and expert. `look` is shown each object.
    """
    findings = [Finding("error", "files", name, text) for name, text in problems(stored, look)]
    broken = set()
    for key, info in stored.tensors.items():
        name = parse(key)
        for message, places in misplaced(info.shape, stored.chunks[key], name.lead, name.place):
            for place, count in places.items():
                text = f"{count} elements {message}"
                findings.append(Finding("error", "coverage", label(key, *place), text))
                broken.add((key, place))
        for place, count in facts[key].nonfinite.items():
            findings.append(
                Finding("error", "values", label(key, *place), f"{count} values are nan or inf")
            )
        for message in facts[key].unreadable:
            findings.append(Finding("error", "files", key, message))
        for dtype in sorted(facts[key].dtypes - {str(info.dtype)}):
            message = f"a part of it is {dtype}, where .metadata says {info.dtype}"
            findings.append(Finding("error", "dtype", key, message))
    return broken, [*findings, *_unlike_other_layers(stored), *_missing(stored)]


def _missing(stored: Stored) -> list[Finding]:
    """Return which parameters are missing, or have another shape than belongs to the others."""
    tensors: dict[str, TensorInfo] = {}
    found: list[tuple[str, str]] = []
    for key, info in stored.tensors.items():
        name = parse(key)
        if name.state is None and name.bucket is None:
            for layer in range(info.shape[0]) if name.stacked else (None,):
                one = label(key, layer, None)
                if one in tensors:
                    found.append((one, "is there twice, on its own and with that of all layers"))
                shape = info.shape if layer is None else info.shape[1:]
                tensors[one] = TensorInfo(shape, info.dtype)
    found += incomplete(tensors, stored.common["args"])
    named = {name for name, _ in found}
    found += [one for one in not_there(tensors, stored.common["args"]) if one[0] not in named]
    return [Finding("error", "coverage", name, text) for name, text in found]


def _unlike_other_layers(stored: Stored) -> list[Finding]:
    """Return which tensors have another dtype than the same of most other layers and experts."""
    same: dict[str, dict[str, str]] = defaultdict(dict)  # without numbers -> stored name -> dtype
    for key, info in stored.tensors.items():
        dtype = str(info.dtype).removeprefix("torch.")
        same[re.sub(r"\.\d+\.", ".#.", key)][key] = dtype
    findings = []
    for found in same.values():
        dtypes = list(found.values())
        usual = max(dict.fromkeys(dtypes), key=dtypes.count)
        findings += [
            Finding("error", "dtype", key, f"is {dtype}, where the same of others is {usual}")
            for key, dtype in found.items()
            if dtype != usual
        ]
    return findings
