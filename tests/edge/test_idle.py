"""Flags about exchanges on one rank: legal, without effect, and named once."""

import pytest
from flag_values import parser
from loop import OURS, launch

from ep_plugin.megatron.arguments.checks import idle, take_typed
from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.rules import at_one_rank

pytestmark = [pytest.mark.megatron, pytest.mark.newest]
EXPERTS = "--num-experts 4"


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        (f"{EXPERTS} --ep-dispatch-dedup on --ep-overlap chunked --ep-topk 1", 2),
        (f"{EXPERTS} --ep-dispatcher hierarchical --ep-ranks-per-node 4", 2),
        (f"{EXPERTS} --ep-capacity-factor 1 --ep-drop-policy probs", 0),
        (f"{EXPERTS} --ep-dispatcher local --ep-overlap serial --ep-dispatch-dedup off", 0),
        (f"{EXPERTS} --ep-dispatcher users.dispatcher --ep-comm-sms 8", 0),
        (f"{EXPERTS} --ep-dispatch-dedup on --expert-model-parallel-size 2", 0),
        (f"{EXPERTS} --ep-dispatch-dedup on --tensor-model-parallel-size 2", 0),
        (f"{EXPERTS} --ep-preset mixtral-8x7b", 0),
        (f"{EXPERTS} --ep-rank-capacity 1", 1),
        (f"{EXPERTS} --ep-rank-capacity 0.5", 0),
        (f"{EXPERTS} --ep-rank-capacity 2 --expert-model-parallel-size 2", 1),
        (f"{EXPERTS} --ep-rank-capacity 1.9 --expert-model-parallel-size 2", 0),
        (f"{EXPERTS} --ep-rank-capacity 1 --tensor-model-parallel-size 2", 1),
        (f"{EXPERTS} --ep-rank-capacity 3 --expert-model-parallel-size 4", 0),
        (f"{EXPERTS} --expert-model-parallel-size 4 --ep-rank-capacity 2", 0),
        ("--ep-dispatch-dedup on", 0),
    ],
)
def test_what_is_idle_by_layout_is_named(typed: str, named: int) -> None:
    args = parser().parse_args(["--num-layers", "2", *typed.split()])
    found = idle(args, take_typed(args))
    ours = [word for word in typed.split() if word.startswith("--ep-")]
    assert sorted(found) == sorted(ours[:named])


def test_a_dispatcher_of_ours_has_no_work_on_one_rank() -> None:
    sizes = {"hidden_size": 8, "ffn_hidden_size": 8, "num_experts": 4}
    spread = MoEConfig(**sizes, dispatcher="symm_mem", comm_sms=8)
    assert at_one_rank(spread) == MoEConfig(**sizes, dispatcher="local")
    users = MoEConfig(**sizes, dispatcher="users.dispatcher", comm_sms=8)
    assert at_one_rank(users) is users


def test_a_cluster_s_command_line_runs_on_one_rank_and_says_what_is_idle() -> None:
    flags = "--ep-dispatcher symm_mem --ep-comm-sms 8 --ep-overlap chunked --ep-overlap-chunks 3"
    flags += " --ep-rank-capacity 1.25"
    done = launch(1, OURS, *EXPERTS.split(), *flags.split(), "--train-iters", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if "idle at" in line]
    assert len(lines) == 1
    named = lines[0].partition("expert-parallel size 1: ")[2]
    ours = ["--ep-dispatcher", "--ep-overlap", "--ep-comm-sms", "--ep-overlap-chunks"]
    assert named == ", ".join([*ours, "--ep-rank-capacity"])


def test_a_capacity_is_idle_where_no_layer_s_experts_are_on_more_ranks() -> None:
    """Of 4 expert-parallel ranks 2 share the experts of a layer with 2, all those of one with 4."""
    for experts, named in (("2,2", 1), ("2,4", 0)):
        typed = f"--ep-rank-capacity 2 --ep-experts-per-layer {experts}"
        flags = [*EXPERTS.split(), "--expert-model-parallel-size", "4", *typed.split()]
        args = parser().parse_args(["--num-layers", "2", *flags])
        assert len(idle(args, take_typed(args))) == named
