"""Has every parameter its moments?

State kept by parameter (`fully_reshardable`, `fully_sharded_model_space`, and without the
distributed optimizer) is checked parameter by parameter. State kept by buckets of a layout
(`dp_reshardable`) does not say whose it is: every bucket must have the same states of the same
size, and all of them together at least one master value for each of the model's. Values between
parameters are never written, so nan in a bucket means nothing.
"""

from collections import defaultdict
from math import prod

from ep_plugin.checkpoint.audit.facts import Facts
from ep_plugin.checkpoint.audit.stored_names import parse
from ep_plugin.checkpoint.audit.verdict import Finding
from ep_plugin.checkpoint.tensors import Stored

MOMENTS = {"adam": {"exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}
MASTERS = {"param", "fp32_param"}
# Tensors of a model that no optimizer moves.
BUFFERS = ("expert_bias", "local_tokens_per_expert", "inv_freq", "_extra_state")


def check(stored: Stored, facts: dict[str, Facts]) -> tuple[str, list[Finding]]:
    """Return how the optimizer's state is kept, and what is missing of it."""
    names = {key: parse(key) for key in stored.tensors}
    parameters = {
        key: info.shape
        for key, info in stored.tensors.items()
        if names[key].state is None and not key.endswith(BUFFERS)
    }
    if any(name.bucket is not None for name in names.values()):
        return "dp_reshardable", _check_buckets(stored, sum(map(prod, parameters.values())))
    states: dict[str, dict[str, str]] = defaultdict(dict)  # parameter -> state -> key
    for key, name in names.items():
        if name.state is not None:
            states[name.parameter][name.state] = key
    if not states and "optimizer" not in stored.common:
        return "none", []
    wanted = _wanted(stored, states)
    findings = []
    if states and "optimizer" not in stored.common:
        text = "its settings are missing (param_groups, with the step), and its states are there"
        findings.append(Finding("error", "optimizer", "", text))
    for key, shape in parameters.items():
        if lost := wanted - states[key].keys():
            text = f"the optimizer lacks its {', '.join(sorted(lost))}"
            findings.append(Finding("error", "optimizer", key, text))
        for state, at in states[key].items():
            found = stored.tensors[at].shape
            if found != shape:
                text = f"its {state} has shape {list(found)}, not {list(shape)}"
                findings.append(Finding("error", "shape", key, text))
    for key in sorted(states.keys() - parameters.keys()):
        if states[key]:
            text = "the optimizer has state of it, and the model does not have it"
            findings.append(Finding("error", "optimizer", key, text))
    metadata = stored.common.get("content_metadata") or {}
    return str(metadata.get("distrib_optim_sharding_type", "by parameter")), findings


def _wanted(stored: Stored, states: dict[str, dict[str, str]]) -> set[str]:
    """Return the states each parameter must have: its moments, and masters where there are any.

    SGD has a moment only with momentum; other optimizers may keep other state of each parameter.
    """
    seen = {state for of_one in states.values() for state in of_one}
    kind = str(getattr(stored.common.get("args"), "optimizer", "adam"))
    moments = MOMENTS.get(kind, set())
    return (moments if kind == "adam" else seen & moments) | (seen & MASTERS)


def _check_buckets(stored: Stored, num_values: int) -> list[Finding]:
    buckets: dict[str, dict[str, int]] = defaultdict(dict)
    for key, info in stored.tensors.items():
        name = parse(key)
        if name.bucket is not None and name.state is not None:
            buckets[key.removesuffix(f".{name.state}")][name.state] = prod(info.shape)
    seen = {state for bucket in buckets.values() for state in bucket}
    kind = str(getattr(stored.common.get("args"), "optimizer", "adam"))
    wanted = seen | (MOMENTS[kind] if kind == "adam" else set())
    findings = []
    for bucket, states in buckets.items():
        if lost := wanted - states.keys():
            text = f"lacks {', '.join(sorted(lost))}"
            findings.append(Finding("error", "optimizer", bucket, text))
        if len(set(states.values())) > 1:
            findings.append(
                Finding(
                    "error",
                    "shape",
                    bucket,
                    f"states differ in size: {dict(sorted(states.items()))}",
                )
            )
    kept = sum(states.get("param", 0) for states in buckets.values())
    if "param" in seen and kept < num_values:
        text = f"buckets hold {kept} master values, and the model has {num_values}"
        findings.append(Finding("error", "optimizer", "", text))
    return findings
