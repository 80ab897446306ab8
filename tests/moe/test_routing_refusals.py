"""Routing settings that are refused, and that the alternatives the messages name are legal."""

import math
import re
from dataclasses import fields
from typing import Any

import pytest

from ep_plugin import ConfigError, MoEConfig, MoELayer, RoutingConfig


def configure(settings: dict[str, Any]) -> MoEConfig:
    """A layer of 8 experts with `settings`, of the layer or its routing."""
    layer = {"hidden_size": 8, "ffn_hidden_size": 8, "num_experts": 8}
    names = {field.name for field in fields(MoEConfig)}
    layer |= {name: value for name, value in settings.items() if name in names}
    rest = {name: value for name, value in settings.items() if name not in names}
    return MoEConfig(**layer, routing=RoutingConfig(**rest))  # type: ignore[arg-type]


TOP1_RAW = {"topk": 1, "normalize": "none"}
UNGROUPED = {"num_groups": None, "group_topk": None}
# Settings that are refused, and the alternative that the message must name.
CONTRADICTIONS = [
    ({"topk": 1}, {"normalize": "none"}),
    ({"topk": 1, "normalize": "after_drop"}, {"normalize": "none"}),
    ({"capacity_factor": 1.25}, {"drop_policy": "probs"}),
    ({"eval_capacity_factor": 2.0}, {"drop_policy": "probs"}),
    ({"drop_policy": "random"}, {"capacity_factor": 1.25}),
    ({"topk": 3, "second_expert": "sampling"}, {"second_expert": "all"}),
    ({**TOP1_RAW, "second_expert": "random"}, {"second_expert": "all"}),
    ({"aux_loss_scope": "group"}, {"aux_loss_scope": "micro_batch"}),
    ({"noise": "rsample", "expert_bias": True}, {"noise": "none"}),
    ({"noise": "rsample", "num_groups": 4, "group_topk": 2}, {"noise": "none"}),
    ({"topk": 9}, {"topk": 8}),
    ({"topk": 2, "num_experts": 1}, {"topk": 1, "normalize": "none"}),
    ({"num_groups": 3, "group_topk": 1}, UNGROUPED),
    ({"num_groups": 3, "group_topk": 3, "topk": 3}, UNGROUPED),
    ({"num_groups": 4, "group_topk": 5}, UNGROUPED),
    ({"num_groups": 4, "group_topk": 2, "topk": 3}, {"group_score_topk": 1}),
    ({"num_groups": 4, "group_topk": 3, "topk": 2}, {"group_score_topk": 1}),
    ({"num_groups": 4, "group_topk": 2, "topk": 6}, UNGROUPED),
    ({"num_groups": 8, "group_topk": 1, "topk": 2}, UNGROUPED),
    ({"group_score_topk": 1}, {"group_score_topk": None}),
    ({"num_groups": 4, "group_topk": 2, "group_score_topk": 3}, {"group_score_topk": 2}),
    ({"hidden_size": 0}, {"hidden_size": 1024}),
    ({"num_experts": 2.5}, {"num_experts": 8}),
    ({"num_moe_layers": -1}, {"num_moe_layers": 1}),
    ({"comm_sms": 0}, {"comm_sms": 32}),
    ({"router": "expert_choice"}, {"router": "topk"}),
    ({"router": "expert_choice"}, {"force_expert_choice": True, "capacity_factor": 2.0}),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "alternative"), CONTRADICTIONS)
def test_contradictions_are_refused_with_a_way_out(
    settings: dict[str, Any], alternative: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as raised:
        configure(settings)
    message = str(raised.value)
    named = [name for name, value in settings.items() if f"{name} ({value})" in message]
    assert named or all(name in message for name in settings)
    for name, value in alternative.items():
        assert re.search(rf"{name}={value!r}(?![\w.])", message)
    configure(settings | alternative)


# Settings of which the first is out of range, the rule that the message states, the alternative.
OUT_OF_RANGE: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"topk": 0}, "must be an integer of at least 1", {"topk": 2}),
    ({"topk": 1.5}, "must be an integer of at least 1", {"topk": 2}),
    ({"num_groups": 0, "group_topk": 1}, "must be an integer of at least 1", UNGROUPED),
    ({"group_topk": 0, "num_groups": 4}, "must be an integer of at least 1", UNGROUPED),
    ({"group_tokens": 0}, "must be an integer of at least 1", {"group_tokens": None}),
    ({"min_capacity": -1}, "must be an integer of at least 0", {"min_capacity": 0}),
    ({"scaling_factor": -1.0}, "must be positive and finite", {"scaling_factor": 1.0}),
    ({"scaling_factor": math.inf}, "must be positive and finite", {"scaling_factor": 1.0}),
    ({"capacity_factor": 0.0, "drop_policy": "probs"}, "must be positive and finite",
     {"capacity_factor": 1.0}),
    ({"eval_capacity_factor": math.nan, "drop_policy": "probs"}, "must be positive and finite",
     {"eval_capacity_factor": 1.0}),
    ({"aux_loss_coeff": -0.1}, "must be finite and not negative", {"aux_loss_coeff": 0.0}),
    ({"aux_loss_coeff": math.nan}, "must be finite and not negative", {"aux_loss_coeff": 0.0}),
    ({"z_loss_coeff": math.inf}, "must be finite and not negative", {"z_loss_coeff": 0.0}),
    ({"bias_update_rate": -1.0, "expert_bias": True},
     "must be finite and not negative", {"bias_update_rate": 0.0}),
    ({"jitter_eps": 1.5}, "must be in [0, 1)", {"jitter_eps": 0.0}),
    ({"second_threshold": 0.0}, "must be in (0, 1]", {"second_threshold": 0.2}),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "rule", "legal"), OUT_OF_RANGE)
def test_values_out_of_range_are_refused(
    settings: dict[str, Any], rule: str, legal: dict[str, Any]
) -> None:
    name, value = next(iter(settings.items()))
    with pytest.raises(ConfigError) as raised:
        configure(settings)
    message = str(raised.value)
    assert message.startswith(f"{name} {rule}; got {value}; ")
    assert all(f"{key}={choice!r}" in message for key, choice in legal.items())
    configure(settings | legal)


CHOICES = {
    "score_function": ("softmax", "sigmoid"),
    "normalize": ("before_drop", "after_drop", "none"),
    "router_dtype": ("fp32", "fp64", "model"),
    "noise": ("none", "rsample"),
    "second_expert": ("all", "sampling", "random", "threshold"),
    "capacity_rounding": ("floor", "round", "ceil", "floor_x4"),
    "drop_policy": ("none", "position", "rank_position", "probs", "random", "bpr"),
    "aux_loss_counts": ("topk", "top1"),
    "aux_loss_scope": ("micro_batch", "sequence", "global", "group"),
    "aux_loss_layers": ("sum", "mean"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_names_of_no_choice_are_refused(name: str) -> None:
    legal = ", ".join(CHOICES[name])
    with pytest.raises(ConfigError, match=f"{name} must be one of {legal}; got 'tanh'"):
        configure({name: "tanh"})
    for value in CHOICES[name]:
        partners: dict[str, Any] = {"aux_loss_coeff": 0.1} if name.startswith("aux_loss") else {}
        if value == "group":
            partners["group_tokens"] = 4
        drops = name == "drop_policy" and value != "none"
        if drops or value == "after_drop" or name == "capacity_rounding":
            partners |= {"capacity_factor": 1.0, "drop_policy": "probs"}
        configure(partners | {name: value})


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"num_groups": 4}, {"group_topk": 1}),
        ({"num_groups": 4, "topk": 4}, {"group_topk": 2}),
        ({"group_topk": 2}, {"num_groups": 4}),
        ({"group_score_topk": 1}, {"num_groups": 2, "group_topk": 1}),
    ],
)
def test_half_a_choice_of_groups_is_refused(given: dict[str, int], missing: dict[str, int]) -> None:
    with pytest.raises(ConfigError) as raised:
        configure(given)
    message = str(raised.value)
    assert message.startswith(f"{next(iter(given))} (")
    assert all(f"{name}={value}" in message for name, value in missing.items())
    configure(given | missing)


def test_expert_choice_is_refused_unless_forced() -> None:
    config = {"hidden_size": 8, "ffn_hidden_size": 8, "num_experts": 8, "router": "expert_choice"}
    with pytest.raises(ConfigError, match="a causal model would see its future; use router='topk'"):
        MoEConfig(**config)  # type: ignore[arg-type]
    forced = RoutingConfig(force_expert_choice=True)
    config["routing"] = forced  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="needs capacity_factor"):
        MoELayer(MoEConfig(**config))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "setting",
    [
        {"z_loss_coeff": 1e-3},
        {"score_function": "sigmoid"},
        {"scaling_factor": 2.5},
        {"expert_bias": True},
        {"num_groups": 4, "group_topk": 2},
        {"second_expert": "random"},
        {"noise": "rsample"},
        {"aux_loss_coeff": 0.01},
    ],
)
def test_expert_choice_refuses_what_it_has_no_use_for(setting: dict[str, object]) -> None:
    given = {"router": "expert_choice", "capacity_factor": 1.0, "force_expert_choice": True}
    MoELayer(configure(given))
    name, value = next(iter(setting.items()))
    with pytest.raises(ConfigError, match=rf"expert_choice.*{name} \({value}\).*use {name}="):
        MoELayer(configure(given | setting))


UNFOUNDED = [  # settings that would do nothing, and what the message says to add
    ({"normalize": "after_drop"}, {"capacity_factor": 1.25, "drop_policy": "probs"}),
    ({"second_threshold": 0.5}, {"second_expert": "threshold"}),
    ({"bias_update_rate": 0.5}, {"expert_bias": True}),
    ({"min_capacity": 4}, {"capacity_factor": 1.25, "drop_policy": "probs"}),
    ({"capacity_rounding": "floor"}, {"capacity_factor": 1.25, "drop_policy": "probs"}),
    ({"capacity_counts_topk": False}, {"capacity_factor": 1.25, "drop_policy": "probs"}),
    ({"group_tokens": 4}, {"capacity_factor": 1.25, "drop_policy": "probs"}),
    ({"aux_loss_counts": "top1"}, {"aux_loss_coeff": 0.01}),
    ({"aux_loss_scope": "global"}, {"aux_loss_coeff": 0.01}),
    ({"aux_loss_layers": "mean"}, {"aux_loss_coeff": 0.01}),
    ({"fp8_wgrad": "bf16"}, {"fp8": "rowwise"}),
    ({"save": "recompute", "bias": True}, {"bias": False}),
    ({"dispatch_dedup": True, "dispatcher": "symm_mem"}, {"dispatcher": "alltoall"}),
    ({"check_splits": "off", "dispatcher": "deepep"}, {"dispatcher": "alltoall"}),
    ({"comm_sms": 16}, {"dispatcher": "symm_mem"}),
    ({"rank_capacity": 1.25, "bias": True}, {"bias": False}),
    ({"gemm": "loop", "fp8": "rowwise"}, {"gemm": "auto"}),
    ({"force_expert_choice": True, "capacity_factor": 1.0}, {"router": "expert_choice"}),
]


@pytest.mark.parametrize(("settings", "missing"), UNFOUNDED)
def test_a_setting_that_would_do_nothing_is_refused(
    settings: dict[str, Any], missing: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as raised:
        configure(settings)
    message = str(raised.value)
    assert message.startswith(f"{next(iter(settings))} (")
    assert all(f"{name}={value!r}" in message for name, value in missing.items())
    configure(settings | missing)


def test_a_module_of_the_user_s_own_may_read_any_setting() -> None:
    configure({"router": "users.router", "min_capacity": 4})
    configure({"dispatcher": "users.dispatcher", "comm_sms": 16, "dispatch_dedup": True})
