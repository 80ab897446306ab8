"""No option is silent: it acts, or is refused with a way out, or is idle by layout alone.

Driven by the table of flags. A row without an observer fails; a configuration that merely stores
the value is no observer.
"""

import os
import re
from dataclasses import fields
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from command_line import Accepted, completed, read
from flag_values import CASES, SAMPLES, given
from silence import Case, observe, observe_all
from spawn import run_ranks

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.in_flags import THEIRS, in_flags
from ep_plugin.megatron.arguments.table import BY_NAME, HOMES, TABLE, Argument
from ep_plugin.megatron.distill import seam as distillation
from ep_plugin.megatron.distill.teacher_layout import layout_of
from ep_plugin.megatron.edge_settings import EdgeSettings
from ep_plugin.megatron.seams import audit_save, check_save, watch_ranks
from ep_plugin.megatron.settings import ranks_per_node
from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.routing_config import RoutingConfig
from ep_plugin.moe.rules import FACTS, IDLE_AT_ONE_RANK, NEEDS
from ep_plugin.registry import available

pytestmark = [pytest.mark.megatron, pytest.mark.newest]
# What else is typed beside what the refusals say, so that a difference can be seen.
BESIDE: dict[tuple[str, Any], str] = {
    ("preset", "mixtral-8x7b"): "--moe-layer-freq 1",
    ("aux_loss_scope", "group"): (
        "--ep-group-tokens 8 --ep-aux-loss-coeff 0.5 --ep-capacity-factor 1 --ep-drop-policy probs"
    ),
    ("second_expert", "random"): "--ep-second-threshold 1",
    ("second_expert", "threshold"): "--ep-second-threshold 0.4",
}
# Rows that must act in company too: row, value, what else is typed, on how many ranks.
TOGETHER: tuple[tuple[str, Any, str, int], ...] = (
    ("comm_sms", 8, "--ep-dispatcher symm_mem --ep-overlap chunked", 2),
    ("save", "recompute", "--ep-overlap chunked", 2),
    ("save", "fp8", "--ep-fp8 rowwise", 1),
    ("check_splits", "off", "--ep-dispatcher hierarchical", 2),
    ("dispatch_dedup", True, "--ep-overlap chunked", 2),
    ("dispatch_dtype", "fp8", "--ep-dispatcher hierarchical --ep-fp8 rowwise", 2),
    ("gemm", "te", "--ep-fp8 rowwise --ep-fp8-wgrad bf16", 1),
    ("gemm", "te", "--ep-overlap chunked --ep-fp8 blockwise --ep-fp8-wgrad bf16", 2),
    ("deterministic", True, "--ep-save recompute", 1),
    ("min_capacity", 12, "--ep-router expert_choice --ep-force-expert-choice on "
     "--ep-capacity-factor 1", 1),
    ("group_tokens", 8, "--ep-router expert_choice --ep-force-expert-choice on "
     "--ep-capacity-factor 1", 1),
    ("router_dtype", "fp64", "--ep-router expert_choice --ep-force-expert-choice on "
     "--ep-capacity-factor 1", 1),
    ("normalize", "after_drop", "--ep-second-expert threshold --ep-second-threshold 0.4", 1),
)  # fmt: skip
# Values that `auto` stands for on CPUs: the name of a layout is the number of its ranks.
AS_AUTO = {
    ("dispatcher", "local"): 1,
    **dict.fromkeys(
        (("dispatcher", "alltoall"), ("overlap", "serial"), ("dispatch_dedup", False)), 2
    ),
}
OBSERVERS = {  # row -> what must differ
    **dict.fromkeys(("preset", "optimizer_format"), "args"),
    "audit_save": "audited",
    "check_save": "checked",
    "watch_ranks": "watched",
    **dict.fromkeys(("teacher", "teacher_layout", "distill_temperature"), "taught"),
    **dict.fromkeys(("distill_weight", "distill_stop"), "taught"),
    "force_expert_choice": "accepted",
    **dict.fromkeys(("router", "topk", "score_function", "normalize", "router_dtype"), "routing"),
    **dict.fromkeys(("jitter_eps", "noise", "second_expert", "second_threshold"), "routing"),
    **dict.fromkeys(("num_groups", "group_topk", "group_score_topk", "router_bias"), "routing"),
    **dict.fromkeys(("expert_bias", "bias_update_rate", "drop_policy", "group_tokens"), "routing"),
    **dict.fromkeys(("capacity_factor", "min_capacity", "capacity_rounding"), "routing"),
    **dict.fromkeys(("eval_capacity_factor", "capacity_counts_topk"), "routing"),
    **dict.fromkeys(("quantile_balancing", "quantile_ema", "force_load_balancing"), "routing"),
    "scaling_factor": "output",
    "further_losses": "gradients",
    **dict.fromkeys(("aux_loss_coeff", "aux_loss_counts", "aux_loss_scope"), "gradients"),
    **dict.fromkeys(("aux_loss_layers", "z_loss_coeff", "fp8_wgrad"), "gradients"),
    **dict.fromkeys(("dense_activation", "expert_activation", "fp8", "shared_expert"), "output"),
    **dict.fromkeys(("save", "rank_capacity"), "kept"),
    **dict.fromkeys(("gemm", "deterministic"), "products"),
    **dict.fromkeys(("dispatcher", "dispatch_dedup", "dispatch_dtype"), "exchanges"),
    **dict.fromkeys(("overlap", "ranks_per_node"), "exchanges"),
    "check_splits": "checks",
    "comm_sms": "sms",
    "overlap_chunks": "chunks",
    "experts_per_layer": "built",
}
OF_VALUES = {("overlap", "two_batch"): "args"}  # Megatron runs its schedule for two micro-batches


ACTS = [
    *((name, value, BESIDE.get((name, value), ""), None) for name, value in CASES),
    *TOGETHER,
]


def compared(name: str, value: Any, beside_it: str) -> tuple[Accepted, Accepted | str]:
    """Return what the row means, and the same command line without it.

    Where that is refused, since the row is one half of something, with another value of it, or the
    plain model where there is none.
    """
    beside = completed(name, value, beside=tuple(beside_it.split()))
    found, without = read(*given(name, value), *beside), read(*beside)
    assert isinstance(found, Accepted), found
    if isinstance(without, Accepted) or OBSERVERS[name] == "accepted":
        return found, without
    others = SAMPLES[name][1:] if name in SAMPLES else BY_NAME[name].legal or ()
    ways = [read(*given(name, other), *beside) for other in others if other != value]
    return found, next((way for way in ways if isinstance(way, Accepted)), read())


@pytest.mark.parametrize(("name", "value"), CASES)
def test_alone_it_acts_or_is_refused_with_a_way_out_that_works(name: str, value: Any) -> None:
    refused = read(*given(name, value))
    if isinstance(refused, str):
        assert "; use " in refused
        assert not field_names(refused.replace(f"({value})", "")), refused
    completed(name, value, beside=tuple(BESIDE.get((name, value), "").split()))


def ranks_of(name: str, value: Any, ranks: int | None) -> int:
    if ranks is not None:
        return ranks
    spread = f"moe.{name}" in IDLE_AT_ONE_RANK or name in ("dispatcher", "ranks_per_node")
    return AS_AUTO.get((name, value), 2 if spread else 1)


def case_of(found: Accepted, ranks: int) -> Case:
    shared = bool(found.args.moe_shared_expert_intermediate_size)
    return Case(found.config, ranks, ranks_per_node(found.settings) or ranks, shared)


@pytest.fixture(scope="module")
def on_two_ranks() -> dict[Case, Any]:
    """All that needs two ranks, in one pair of processes."""
    with patch.dict(os.environ, LOCAL_WORLD_SIZE="2"):
        found = [
            case_of(accepted, 2)
            for name, value, beside, ranks in ACTS
            if ranks_of(name, value, ranks) == 2 and OF_VALUES.get((name, value)) != "args"
            for accepted in compared(name, value, beside)
            if isinstance(accepted, Accepted)
        ]
        cases = list(dict.fromkeys(found))
        return dict(zip(cases, zip(*run_ranks(2, observe_all, cases), strict=True), strict=True))


@cache
def on_one_rank(case: Case) -> Any:
    return observe(case)


def seen_by(observer: str, found: Accepted | str, ranks: int, pairs: dict[Case, Any]) -> Any:
    """Return what the observer sees of a command line."""
    if observer == "accepted":
        return isinstance(found, Accepted)
    assert isinstance(found, Accepted), found
    if observer == "args":
        ours = [row.dest for row in TABLE if row.twin is None]
        return {key: value for key, value in vars(found.args).items() if key not in ours}
    if observer == "audited":
        return audited(found.args)
    if observer == "checked":
        return checked(found.args)
    if observer == "watched":
        return watched(found.args)
    if observer == "taught":
        return taught(found.args)
    case = case_of(found, ranks)
    both = pairs[case] if ranks == 2 else (on_one_rank(case),)
    return [of_rank[observer] for of_rank in both]


def audited(args: Any) -> list[str]:
    """Return the folders that are read after a save."""
    read_back: list[str] = []
    training = SimpleNamespace(get_args=lambda: args)
    with (
        patch.object(audit_save.importlib, "import_module", lambda name: training),
        patch.object(audit_save, "_audit_all", lambda pending: read_back.extend(pending)),
    ):
        patches = Mock()
        audit_save.changes(patches)
        [(_, with_save, _), _] = [call.args for call in patches.wrap.call_args_list]
        with_save(lambda iteration: None, 3)
    return read_back


def checked(args: Any) -> list[Any]:
    """Return the models that are searched for nan before a save."""
    searched: list[Any] = []
    training = SimpleNamespace(get_args=lambda: args, unwrap_model=lambda model: model)
    with (
        patch.object(check_save.importlib, "import_module", lambda name: training),
        patch.object(check_save, "find", lambda model, *rest: searched.append(model)),
    ):
        patches, args.save = Mock(), "/nowhere"
        check_save.changes(patches)
        _, with_check, _ = patches.wrap.call_args_list[0].args
        with_check(lambda *saved: None, 3, "a model", "its optimizer")
    return searched


def watched(args: Any) -> list[int]:
    """Return after how many seconds ranks are told to wait, of each start."""
    started: list[int] = []
    training = SimpleNamespace(get_args=lambda: args)
    with (
        patch.object(watch_ranks.importlib, "import_module", lambda name: training),
        patch.object(watch_ranks.watch, "start", lambda seconds, slow: started.append(seconds)),
    ):
        patches = Mock()
        watch_ranks.changes(patches)
        _, with_watch, _ = patches.wrap.call_args_list[0].args
        with_watch(lambda: None)
    return started


def taught(args: Any) -> list[Any]:
    """Return the gradient of a student's loss, whether it is taught half way, and the layout."""
    if args.ep_teacher is None:
        return []
    state, given_args = distillation.Distillation(), SimpleNamespace(**vars(args))
    given_args.train_samples, given_args.consumed_train_samples, given_args.world_size = 10, 5, 4
    state.teacher = SimpleNamespace(logits=lambda *given, width: torch.arange(6.0).view(3, 1, 2))
    state.plan = SimpleNamespace(vocabulary=2)
    logits = torch.arange(0.0, -6.0, -1).view(3, 1, 2).requires_grad_()
    state.inputs = dict.fromkeys(("input_ids", "position_ids", "attention_mask"))
    state.inputs["labels"] = logits
    names = {"megatron.training": SimpleNamespace(get_args=lambda: given_args)}
    group = SimpleNamespace(size=lambda: 1)
    groups = SimpleNamespace(get_tensor_model_parallel_group=lambda: group)
    with patch.object(distillation, "import_module", lambda name: names.get(name, groups)):
        loss = state.loss(lambda model, labels, logits: logits.sum(-1).T, None, logits, logits)
    loss.sum().backward()
    assert logits.grad is not None
    return [logits.grad.tolist(), distillation.is_on(given_args), layout_of(given_args)]


@pytest.mark.parametrize(("name", "value", "beside", "on"), ACTS)
def test_it_acts(
    name: str, value: Any, beside: str, on: int | None, on_two_ranks: dict[Case, Any]
) -> None:
    observer, ranks = OF_VALUES.get((name, value), OBSERVERS[name]), ranks_of(name, value, on)
    with patch.dict(os.environ, LOCAL_WORLD_SIZE="2"):
        found, without = compared(name, value, beside)
        now, before = (seen_by(observer, way, ranks, on_two_ranks) for way in (found, without))
    if (name, value) in AS_AUTO:
        assert now == before
    else:
        assert now != before, f"{name} = {value}: {observer} is the same without it"


def test_a_dispatcher_of_the_user_s_own_is_told_the_ranks_of_a_node() -> None:
    own = EdgeSettings(dispatcher="users.dispatcher", ranks_per_node=4)
    assert ranks_per_node(own) == 4
    assert ranks_per_node(EdgeSettings(dispatcher="users.dispatcher")) is None


DEFAULTS = [row for row in TABLE if row.needs and row.default not in (None, False)]


@pytest.mark.parametrize("row", DEFAULTS, ids=lambda row: row.flag)
def test_a_default_that_is_typed_is_as_if_it_were_not_given(row: Argument) -> None:
    """Whatever it belongs to is not there: nothing is saved, there is no teacher."""
    found, plain = read(*given(row.name, row.default)), read()
    assert isinstance(found, Accepted), found
    assert isinstance(plain, Accepted)
    assert (vars(found.args), found.said) == (vars(plain.args), plain.said)


def test_what_is_observed_is_the_same_twice() -> None:
    plain = read()
    assert isinstance(plain, Accepted)
    case = case_of(plain, 1)
    assert observe(case) == observe(case)


def test_every_row_has_an_observer() -> None:
    assert set(OBSERVERS) == set(BY_NAME)


def feeds() -> list[str]:
    return [row.feeds for row in TABLE if row.feeds is not None]


def test_every_field_has_one_row() -> None:
    kinds = {row.name for row in TABLE if row.kind is not None}
    routing = {f"routing.{f.name}" for f in fields(RoutingConfig)}
    assert sorted(x for x in feeds() if x.startswith("routing.")) == sorted(routing)
    # `activation` is `edge.expert_activation`, `bias` is Megatron's: no --disable-bias-linear.
    elsewhere = FACTS | kinds | set(THEIRS) | {"bias"}
    block = {f"moe.{f.name}" for f in fields(MoEConfig) if f.name not in elsewhere}
    assert sorted(x for x in feeds() if x.startswith("moe.")) == sorted(block)
    read = ("routing", "metrics", "tokens")  # from several arguments
    edge = sorted(f.name for f in fields(EdgeSettings) if f.name not in read)
    assert edge == sorted(x.partition(".")[2] for x in feeds() if not x.startswith("routing."))


def test_rules_and_rows_name_fields_there_are() -> None:
    for name in {*feeds(), *NEEDS, *IDLE_AT_ONE_RANK}:
        part, _, field = name.partition(".")
        assert field in {f.name for f in fields(HOMES[part])}, name


def field_names(sentence: str) -> list[str]:
    """Return the names of fields that a sentence in flags still has; legal values may be alike."""
    names = {f.name for home in HOMES.values() for f in fields(home)} | {"ranks_per_node"}
    legal = {value for row in TABLE for value in row.legal or ()}
    legal |= {name for row in TABLE if row.kind is not None for name in available(row.kind)}
    words = re.findall(r"(?<![-\w])\w+", sentence)
    return [w for w in words if "_" in w and w in names - legal] + re.findall(r"\w+=", sentence)


ANY = MoEConfig(hidden_size=8, ffn_hidden_size=8, num_experts=8)
SENTENCES = [
    *((name, need.sentence.format(**vars(ANY))) for name, needs in NEEDS.items() for need in needs),
    *((row.flag, need.sentence) for row in TABLE for need in row.needs),
]


@pytest.mark.parametrize(("name", "sentence"), SENTENCES)
def test_sentences_name_flags_and_what_to_use(name: str, sentence: str) -> None:
    spelled = ConfigError(sentence).spelled(in_flags(()))
    assert "; use " in spelled or "leave one out" in spelled
    assert not field_names(spelled), spelled
    assert "<" not in spelled
