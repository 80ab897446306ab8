"""Megatron's combined 1F1B schedule drives our block: the same figures, in another order."""

from pathlib import Path

import pytest
from loop import MOE, OURS, ROOT, launch, train

from ep_plugin.commands.report.events import read_run
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.checks import settings_from_args
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.settings import overlap_schedule
from tests.edge.test_against_megatron import TAGS, check_everything, parse

pytestmark = [pytest.mark.megatron, pytest.mark.newest]  # the schedule is its own
in_cpu_mode = pytest.mark.skipif(
    not cpu_mode.wanted(), reason="a GPU is here and EP_PLUGIN_DEVICE is not cpu"
)
STEPS = (str(ROOT / "tests" / "helpers" / "steps_run.py"),)
COMBINED = "--overlap-moe-expert-parallel-comm"
TWO_RANKS = (*MOE, "--bf16", "--expert-model-parallel-size", "2")
LAYERS, MICRO_BATCHES = 2, 2  # the model's; a global batch of 8 is 2 of 2 on each of 2 ranks


@in_cpu_mode
def test_ten_iterations_have_the_bits_of_one_micro_batch_after_the_other(tmp_path: Path) -> None:
    """Router and fused experts keep tokens for the backward, and Megatron's schedule frees them."""
    kept = ("--ep-router-dtype", "model", "--ep-save", "recompute", "--ep-dispatch-dedup", "on")
    flags = (*TWO_RANKS, *kept, "--train-iters", "10")
    expected = train(2, OURS, tmp_path / "plain", *flags)
    done = launch(2, STEPS, "--tensorboard-dir", str(tmp_path / "combined"), *flags, COMBINED)
    assert done.returncode == 0, done.stderr[-4000:]
    found = read_run(tmp_path / "combined")
    for tag in TAGS:
        assert found.series(tag) == expected.series(tag)
        assert [iteration for iteration, _ in found.series(tag)] == list(range(1, 11))
    losses = [value for _, value in found.series("lm loss")]
    assert losses[-1] < losses[0] - 0.1  # it trains
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("steps:"))
    steps = line.split()[1:]
    assert steps.count("dispatch") == 10 * MICRO_BATCHES * LAYERS  # every one, but evaluation's
    first, between = slice(0, 4 * LAYERS), slice(4 * LAYERS, (4 + 6) * LAYERS)
    assert steps[first] == ["route", "dispatch", "routed_experts_compute", "combine"] * LAYERS
    assert (
        steps[between]
        == [
            *["route", "routed_experts_compute'", "dispatch", "dispatch'"],
            *["routed_experts_compute", "combine"],
        ]
        * LAYERS
    )


@in_cpu_mode
def test_a_shared_expert_differs_by_the_order_of_bf16_sums(tmp_path: Path) -> None:
    """The gradient of a layer's input is a sum of three, of which Megatron takes its last."""
    flags = (*TWO_RANKS, "--train-iters", "3", "--moe-shared-expert-intermediate-size", "32")
    expected = train(2, OURS, tmp_path / "plain", *flags)
    found = train(2, OURS, tmp_path / "combined", *flags, "--ep-overlap", "two_batch")
    for tag, relative in (("lm loss", 5e-5), ("grad-norm", 5e-4)):
        assert dict(found.series(tag)) == pytest.approx(dict(expected.series(tag)), rel=relative)
        assert len(found.series(tag)) == 3


def test_one_flag_of_ours_stands_for_megatron_s() -> None:
    args = parse(*TWO_RANKS, "--ep-overlap", "two_batch")
    settings = settings_from_args(args)
    assert args.overlap_moe_expert_parallel_comm
    assert overlap_schedule(args, settings) == "two_batch"
    check_everything(args)
    args = parse("--num-experts", "4", COMBINED)
    assert overlap_schedule(args, settings_from_args(args)) == "two_batch"
    args = parse("--num-experts", "4")
    assert overlap_schedule(args, settings_from_args(args)) == "auto"


SHARED = ("--moe-shared-expert-intermediate-size", "32")
REFUSED = {
    "two orders": ((COMBINED, "--ep-overlap", "chunked"), "leave one of them out"),
    "a residual": (
        (COMBINED, "--ep-shared-expert", "learned", *SHARED),
        "use --ep-shared-expert sum",
    ),
    "delayed": (
        (COMBINED, "--delay-wgrad-compute"),
        "--delay-wgrad-compute delays weight gradients",
    ),
    "delayed into dispatch": (
        ("--overlap-dispatch-backward-with-experts-wgrad",),
        "use --ep-overlap chunked",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_schedule_cannot_do_is_refused(case: str) -> None:
    flags, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        check_everything(parse("--num-experts", "4", *flags))
