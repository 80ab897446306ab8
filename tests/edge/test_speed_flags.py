"""Megatron's flags that change speed alone: ours stand for them, a line says so, or a refusal."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from command_line import Accepted, read
from loop import MOE, OURS, launch

from ep_plugin.errors import BackendUnavailable, ConfigError
from ep_plugin.megatron.arguments import speed
from ep_plugin.megatron.edge_settings import EdgeSettings

pytestmark = [pytest.mark.megatron, pytest.mark.newest]
FLEX = "--moe-token-dispatcher-type flex"
SHARED = "--moe-shared-expert-intermediate-size 32"
MEANT = {  # typed -> dispatcher, schedule
    FLEX: ("deepep", "auto"),
    f"{FLEX} --moe-enable-deepep": ("deepep", "auto"),
    f"{FLEX} --moe-flex-dispatcher-backend hybridep": ("auto", "auto"),
    f"{FLEX} --moe-flex-dispatcher-backend ncclep": ("auto", "auto"),
    f"{FLEX} --expert-model-parallel-size 1": ("auto", "auto"),  # one rank has all experts
    f"{FLEX} --ep-dispatcher auto": ("auto", "auto"),  # ours, typed, win
    f"{FLEX} --ep-dispatcher alltoall": ("alltoall", "auto"),
    f"{SHARED} --moe-shared-expert-overlap": ("auto", "shared_expert"),
    f"{SHARED} --moe-shared-expert-overlap --ep-overlap serial": ("auto", "serial"),
}


@pytest.mark.parametrize("flags", MEANT)
def test_ours_stand_for_them(flags: str) -> None:
    found = read(*flags.split())
    assert isinstance(found, Accepted), found
    assert (found.config.dispatcher, found.config.overlap) == MEANT[flags]


@pytest.mark.parametrize(
    "flags",
    [
        "--moe-expert-capacity-factor 1 --moe-pad-expert-input-to-capacity",
        "--ep-capacity-factor 1 --moe-pad-expert-input-to-capacity",
        "--moe-permute-fusion",
        "--moe-grouped-gemm",
        "--moe-router-padding-for-quantization",
        "--moe-router-padding-for-fp8",
        "--moe-router-fusion",
    ],
)
def test_what_is_about_the_inside_of_megatron_s_layer_changes_nothing(flags: str) -> None:
    *others, flag = flags.split()
    with_it, without = read(*flags.split()), read(*others)
    assert isinstance(with_it, Accepted), with_it
    assert isinstance(without, Accepted)
    assert with_it.config == without.config
    assert any(line.startswith(f"{flag}: ") for line in with_it.said)
    assert not without.said


ALLGATHER = "--moe-token-dispatcher-type allgather"
ALLTOALL = "--moe-token-dispatcher-type alltoall"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (ALLGATHER, f"{ALLGATHER}: changes speed alone; tokens travel by --ep-dispatcher auto"),
        (
            f"{ALLGATHER} --ep-dispatcher symm_mem",
            f"{ALLGATHER}: changes speed alone; tokens travel by --ep-dispatcher symm_mem",
        ),
        (
            f"{ALLTOALL} --ep-dispatcher deepep",
            f"{ALLTOALL}: changes speed alone; tokens travel by --ep-dispatcher deepep",
        ),
        (ALLTOALL, None),
        (f"{ALLTOALL} --ep-dispatcher alltoall", None),
        ("--ep-dispatcher alltoall", None),  # Megatron's default, which nobody typed
    ],
)
def test_a_dispatcher_of_megatron_s_that_is_not_ours_is_said(typed: str, said: str | None) -> None:
    found = read(*typed.split())
    assert isinstance(found, Accepted), found
    assert found.said == (() if said is None else (said,))


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ("--moe-router-score-function sigmoid", "before_drop"),
        ("--ep-score-function sigmoid --ep-topk 1", "none"),
        ("--moe-router-score-function sigmoid --ep-normalize none", None),
        ("", None),
    ],
)
def test_softmax_beside_sigmoid_is_said(beside: str, said: str | None) -> None:
    """Many command lines have it, and in Megatron too it changes nothing."""
    found, without = read("--moe-router-pre-softmax", *beside.split()), read(*beside.split())
    assert isinstance(found, Accepted), found
    assert isinstance(without, Accepted), without
    assert len(found.said) == (said is not None)
    for line in found.said:
        assert line.startswith("--moe-router-pre-softmax: without effect beside --moe-router-score")
        assert line.endswith(f"weights run by --ep-normalize {said}")
        assert found.config == without.config


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ({"moe_token_dispatcher_type": "flex"}, "--moe-token-dispatcher-type flex (deepep): "),
        ({"moe_enable_deepep": True}, "--moe-enable-deepep: "),
    ],
)
def test_the_flag_that_was_typed_is_named(typed: dict[str, Any], said: str) -> None:
    plain = {"moe_token_dispatcher_type": "alltoall", "moe_enable_deepep": False}
    args = SimpleNamespace(
        num_experts=4, ep_dispatcher="alltoall", moe_shared_expert_overlap=False, **plain | typed
    )
    lines = speed.take_speed(args, {"--ep-dispatcher": "alltoall"})
    assert [line for line in lines if line.startswith(said)] == lines


def test_a_backend_of_a_configuration_in_python_is_refused_by_name() -> None:
    config = SimpleNamespace(
        moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="hybrid-ep"
    )
    with pytest.raises(ConfigError, match="must be one of deepep, hybridep, ncclep; got 'hybrid"):
        speed.dispatcher(config, EdgeSettings())


def test_deepep_that_is_not_here_is_refused_with_a_way_out() -> None:
    args = SimpleNamespace(
        num_experts=4,
        moe_token_dispatcher_type="flex",
        moe_enable_deepep=False,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,
    )
    with (
        patch.object(speed, "resolve", side_effect=BackendUnavailable("no")),
        pytest.raises(ConfigError, match=r"^--moe-token-dispatcher-type flex \(deepep\) needs .*"),
    ):
        speed.take_speed(args, {})


@pytest.mark.parametrize(
    ("theirs", "dispatcher", "overlap"),
    [
        ({"moe_token_dispatcher_type": "flex"}, "deepep", "auto"),
        ({"moe_shared_expert_overlap": True, **dict.fromkeys(
            ["moe_shared_expert_intermediate_size"], 8)}, "auto", "shared_expert"),
    ],
)  # fmt: skip
def test_a_configuration_without_a_command_line_means_the_same(
    theirs: dict[str, Any], dispatcher: str, overlap: str
) -> None:
    config, ours = SimpleNamespace(**theirs), EdgeSettings()
    assert (speed.dispatcher(config, ours), speed.overlap(config, ours)) == (dispatcher, overlap)
    own = EdgeSettings(dispatcher="alltoall", overlap="serial")
    assert (speed.dispatcher(config, own), speed.overlap(config, own)) == ("alltoall", "serial")


def test_a_run_says_each_once() -> None:
    flags = (
        *("--train-iters", "2", *MOE, "--expert-model-parallel-size", "2", *FLEX.split()),
        *("--moe-flex-dispatcher-backend", "hybridep", *SHARED.split()),
        *("--moe-shared-expert-overlap", "--moe-grouped-gemm", "--moe-router-force-load-balancing"),
    )
    done = launch(2, OURS, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    for line in (
        "--moe-token-dispatcher-type flex (hybridep): changes speed alone; tokens travel by "
        "--ep-dispatcher auto",
        "--moe-shared-expert-overlap: changes speed alone; layers run by --ep-overlap shared_exper",
        "--moe-grouped-gemm: without effect in our MoE layers",
    ):
        assert done.stdout.count(line) == 1, done.stdout[-3000:]
