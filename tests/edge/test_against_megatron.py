"""Our block and Megatron's own: same seed, data and flags, in Megatron's training loop."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import MODEL, MOE, NEWEST, OURS, SHAPE, STOCK, launch, launch_with, train

from ep_plugin.commands.report.events import Run, read_run
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.checks import check_arguments, check_block, settings_from_args
from ep_plugin.megatron.arguments.in_flags import in_flags, refusal
from ep_plugin.megatron.arguments.parser import add_ep_arguments
from ep_plugin.megatron.arguments.theirs import check as check_theirs

pytestmark = pytest.mark.megatron
TAGS = ("lm loss", "load_balancing_loss", "z_loss", "grad-norm")
RELATIVE = 1e-5  # the project's bound for agreement over 20 iterations
SHORT = ("--global-batch-size", "4")  # two micro-batches where tp leaves one data-parallel rank


def assert_agree(
    ours: Run, theirs: Run, iterations: list[int], tags: tuple[str, ...] = TAGS
) -> None:
    """Every tag has the same values at `iterations`, to RELATIVE."""
    for tag in tags:
        pairs = zip(ours.series(tag), theirs.series(tag), strict=True)
        seen = []
        for (iteration, value), (their_iteration, expected) in pairs:
            assert iteration == their_iteration
            assert value == pytest.approx(expected, rel=RELATIVE), f"{tag} at {iteration}"
            seen.append(iteration)
        assert seen == iterations, tag


@pytest.mark.parametrize(
    ("ranks", "flags", "only_ours", "only_theirs"),
    [
        pytest.param(1, (), (), (), marks=pytest.mark.newest),
        (2, ("--expert-model-parallel-size", "2", "--use-distributed-optimizer"),
         ("--ep-overlap", "chunked"), ()),
        pytest.param(
            2, ("--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2",
                "--expert-tensor-parallel-size", "1", *SHORT),
            ("--ep-dispatcher", "hierarchical", "--ep-ranks-per-node", "1"),
            ("--sequence-parallel",),  # without it Megatron's layer refuses to train
            marks=pytest.mark.newest),
        pytest.param(
            2, ("--expert-model-parallel-size", "2"),
            ("--ep-dispatcher", "symm_mem", "--ep-comm-sms", "16"), (),
            marks=pytest.mark.newest),
        pytest.param(
            2, ("--expert-model-parallel-size", "2", "--sequence-parallel",
                "--tensor-model-parallel-size", "2", "--expert-tensor-parallel-size", "1", *SHORT),
            ("--ep-dispatcher", "symm_mem", "--ep-overlap", "chunked"), (),
            marks=pytest.mark.newest),
        (2, ("--pipeline-model-parallel-size", "2", "--moe-layer-freq", "[0,1]"), (), ()),
    ],
    ids=["ep=1", "ep=2 chunked", "tp=2 ep=2 etp=1 hierarchical, replicated tokens",
         "ep=2 symm_mem", "tp=2 ep=2 etp=1 symm_mem chunked", "pp=2 mixed layers"],
)  # fmt: skip
def test_twenty_iterations_agree(
    tmp_path: Path,
    ranks: int,
    flags: tuple[str, ...],
    only_ours: tuple[str, ...],
    only_theirs: tuple[str, ...],
) -> None:
    run = ("--train-iters", "20", *MOE, *flags)
    ours = train(ranks, OURS, tmp_path / "ours", *run, *only_ours)
    theirs = train(ranks, STOCK, tmp_path / "theirs", *run, *only_theirs)
    # Until 0.18 Megatron logs the z-loss of one rank's tokens; the gradients have all of them.
    tags = TAGS if NEWEST or ranks == 1 else tuple(tag for tag in TAGS if tag != "z_loss")
    assert_agree(ours, theirs, list(range(1, 21)), tags)
    losses = [value for _, value in ours.series("lm loss")]
    assert losses[-1] < losses[0] - 0.1  # it trains


@pytest.mark.newest
def test_a_hybrid_model_agrees_with_megatron_s_own_experts(tmp_path: Path) -> None:
    flags = ("--hybrid-layer-pattern", "*E*E", "--expert-model-parallel-size", "2")
    found = []
    for side in (OURS, STOCK):
        folder = tmp_path / str(len(found))
        run = ("--train-iters", "20", "--tensorboard-dir", str(folder), *SHAPE[2:], *MOE, *flags)
        done = launch_with(2, side, *run)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert ("hosts Megatron's MoE layers" in done.stdout) == (side is OURS)
        found.append(read_run(folder))
    ours, theirs = found
    assert_agree(ours, theirs, list(range(1, 21)))
    assert ours.series("lm loss") != theirs.series("lm loss")  # or one block ran twice


GATES = {  # ranks, the name of the balancing loss, flags
    "sigmoid with groups, bias and a loss per sequence": (
        *(2, "seq_load_balancing_loss"),
        "--num-experts 8 --moe-router-topk 4 --moe-router-score-function sigmoid "
        "--moe-router-num-groups 4 --moe-router-group-topk 2 --moe-router-topk-scaling-factor 2.5 "
        "--moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-2 "
        "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-2 "
        "--expert-model-parallel-size 2",
    ),
    "top-1 before softmax with a global loss": (
        *(2, "global_load_balancing_loss"),
        "--num-experts 4 --moe-router-topk 1 --moe-router-pre-softmax "
        "--moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 1e-2 "
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
        "--expert-tensor-parallel-size 1 " + " ".join(SHORT),
    ),
    "capacity by probability, and a gated shared expert": (
        *(2, "load_balancing_loss"),
        "--num-experts 4 --moe-router-topk 2 --moe-expert-capacity-factor 0.7 "
        "--moe-token-drop-policy probs --moe-aux-loss-coeff 1e-2 "
        "--moe-shared-expert-intermediate-size 32 --moe-shared-expert-gate "
        "--expert-model-parallel-size 2",
    ),
}


@pytest.mark.parametrize("gate", GATES)
def test_megatron_s_own_gates_agree(tmp_path: Path, gate: str) -> None:
    ranks, loss, flags = GATES[gate]
    run = (*("--train-iters", "10", "--moe-token-dispatcher-type", "alltoall"), *flags.split())
    ours = train(ranks, OURS, tmp_path / "ours", *run, "--ep-dispatch-dedup", "on")
    theirs = train(ranks, STOCK, tmp_path / "theirs", *run)
    assert_agree(ours, theirs, list(range(1, 11)), ("lm loss", loss, "grad-norm"))


def test_checkpoints_load_in_each_other(tmp_path: Path) -> None:
    """Saved by either at iteration 4, continued by the other: the uninterrupted run's figures."""
    flags = (
        *("--train-iters", "8", *MOE, "--expert-model-parallel-size", "2"),
        *("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"),
        *("--save-interval", "4"),
    )
    for saver, loader in ((OURS, STOCK), (STOCK, OURS)):
        folder = tmp_path / saver[-1].replace("/", "-")
        saved = str(folder / "checkpoint")
        whole = train(2, saver, folder / "whole", *flags, "--save", saved)
        resumed = train(2, loader, folder / "resumed", *flags, "--load", saved, "--ckpt-step", "4")
        # Megatron's log averages lm loss over all iterations since a resume; the validation that
        # follows them does not.
        for tag in ("grad-norm", "lm loss validation"):
            expected = [(i, v) for i, v in whole.series(tag) if i > 4]
            found = resumed.series(tag)
            assert [i for i, _ in found] == [i for i, _ in expected]
            assert [v for _, v in found] == pytest.approx([v for _, v in expected], rel=RELATIVE)


def test_every_expert_is_in_the_log(tmp_path: Path) -> None:
    """Shares of each layer's rows sum to 1, at every logging interval."""
    flags = ("--train-iters", "2", *MOE, "--expert-model-parallel-size", "2")
    shares = train(2, OURS, tmp_path, *flags).shares()
    assert sorted(shares) == [1, 2]
    for experts in shares.values():
        assert sorted(experts) == [0, 1, 2, 3]
        for step in range(2):
            assert sum(series[step][1] for series in experts.values()) == pytest.approx(1)


MISTAKES = {
    "experts over ranks": (
        ("--num-experts", "3", "--expert-model-parallel-size", "2"),
        "--num-experts (3) must be divisible by --expert-model-parallel-size (2); use "
        "--expert-model-parallel-size 1",
    ),
    "ranks": (
        ("--num-experts", "4", "--expert-model-parallel-size", "4"),
        "ep*etp*pp (4*1*1) must divide the number of ranks (2); use --expert-model-parallel-size "
        "2 with --expert-tensor-parallel-size 1",
    ),
    "top-k": (
        ("--num-experts", "4", "--moe-router-topk", "5"),
        "--moe-router-topk (5) must be at most --num-experts (4); use --moe-router-topk 4",
    ),
    "pattern": (
        ("--num-experts", "4", "--moe-layer-freq", "[0,1,1]"),
        "--moe-layer-freq must have one entry per layer, --num-layers (2); got 3 entries",
    ),
    "flag value": (
        ("--num-experts", "4", "--ep-dispatcher", "fastest"),
        "must be one of auto, alltoall, deepep, hierarchical, local, symm_mem; got 'fastest'",
    ),
    "ranks of a node": (
        (
            *("--num-experts", "4", "--ep-dispatcher", "hierarchical"),
            *("--ep-ranks-per-node", "0"),
        ),
        "--ep-ranks-per-node must be at least 1; got 0; use the number of GPUs of a node",
    ),
    "unsupported setting": (
        ("--num-experts", "4", "--moe-router-force-biased", "0.5"),
        "--moe-router-force-biased (0.5) adds random numbers to logits",
    ),
    "two capacities": (
        (
            *("--num-experts", "4", "--moe-expert-capacity-factor", "1.0"),
            *("--ep-capacity-factor", "2"),
        ),
        "--ep-capacity-factor (2.0) and --moe-expert-capacity-factor (1.0) contradict each other",
    ),
    "normalised and pre-softmax": (
        ("--num-experts", "4", "--ep-normalize", "before_drop", "--moe-router-pre-softmax"),
        "--ep-normalize (before_drop) and --moe-router-pre-softmax contradict each other",
    ),
    "groups of raw logits": (
        ("--num-experts", "4", "--ep-num-groups", "2", "--ep-group-topk", "1"),
        "--ep-num-groups (2) with softmax would rank groups by sums of raw logits",
    ),
    "expert choice": (
        (
            *("--num-experts", "4", "--ep-router", "expert_choice"),
            *("--ep-capacity-factor", "2", "--ep-drop-policy", "probs"),
        ),
        "a causal model would see its future; use --ep-router topk, or --ep-force-expert-choice on",
    ),
    "a pyramid that is too short": (
        (
            *("--num-experts", "4", "--moe-layer-freq", "[1,1]"),
            *("--ep-experts-per-layer", "4"),
        ),
        "with --num-experts (4) the largest; got (4,); use --ep-experts-per-layer 4*2",
    ),
    "a pyramid of several copies, in a format without them": (
        (
            *("--num-experts", "4", "--moe-layer-freq", "[1,1]", "--ckpt-format", "torch"),
            *("--ep-experts-per-layer", "3,4", "--expert-model-parallel-size", "2"),
        ),
        "several ranks hold them; use --ckpt-format torch_dist",
    ),
    "a residual of nothing": (
        ("--num-experts", "4", "--ep-shared-expert", "learned"),
        "--moe-shared-expert-intermediate-size 2048",
    ),
}


def parse(*flags: str) -> Any:
    """Parse flags as a script with the plugin would, up to the plugin's own checks."""
    from megatron.training import arguments

    parser = add_ep_arguments(arguments.add_megatron_arguments(argparse.ArgumentParser()))
    args = parser.parse_args([*MODEL, *flags])
    args.world_size = 2
    return args


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence(mistake: str) -> None:
    flags, message = MISTAKES[mistake]
    args = parse(*flags)
    with pytest.raises(ConfigError) as raised:
        check_everything(args)
    assert message in raised.value.spelled(in_flags(flags))


CHUNKED = ("--num-experts", "4", "--expert-model-parallel-size", "2", "--ep-overlap", "chunked")
LATE = {  # what used to be found while a layer was built
    "biases": ((), "--ep-overlap (chunked) needs experts without bias"),
    "replicas": (
        ("--disable-bias-linear", "--tensor-model-parallel-size", "2"),
        "the 2 ranks of tp that hold the same tokens",
    ),
    "chunks": (
        ("--disable-bias-linear", "--ep-overlap-chunks", "2"),
        "--ep-overlap-chunks (2) must be at most the other ranks of ep*etp (1); use "
        "--ep-overlap-chunks 1",
    ),
    "fp8": (
        ("--disable-bias-linear", "--ep-fp8", "rowwise", "--moe-ffn-hidden-size", "72"),
        "--ep-fp8 (rowwise) needs",
    ),
}


@pytest.mark.parametrize("mistake", LATE)
def test_what_a_block_cannot_be_is_found_before_it_is_built(mistake: str) -> None:
    flags, message = LATE[mistake]
    args = parse(*CHUNKED, *flags)
    args.params_dtype = torch.float32
    args.add_bias_linear = "--disable-bias-linear" not in flags
    args.ffn_hidden_size = args.ffn_hidden_size or 4 * args.hidden_size
    if args.expert_tensor_parallel_size is None and args.tensor_model_parallel_size > 1:
        args.expert_tensor_parallel_size = 1
    with pytest.raises(ConfigError) as raised:
        check_block(args, settings_from_args(args))
    assert message in str(refusal(raised.value, flags))


def check_everything(args: Any) -> None:
    check_arguments(args, settings_from_args(args))
    check_theirs(args)


def test_a_mistake_stops_every_rank_with_code_2_and_writes_nothing(tmp_path: Path) -> None:
    flags, message = MISTAKES["experts over ranks"]
    saved = tmp_path / "saved"
    done = launch(2, OURS, "--train-iters", "1", "--save", str(saved), *flags)
    lines = [line for line in done.stderr.splitlines() if line.startswith("ep_plugin: error:")]
    assert len(lines) == 1, done.stderr[-2000:]
    assert message in lines[0]
    assert done.returncode == 2
    assert not saved.exists()


def test_a_global_loss_is_as_strong_on_two_batches_as_on_one(tmp_path: Path) -> None:
    """Megatron divides it by the data-parallel ranks once more: twice ours at two ranks agrees."""
    run = (*("--train-iters", "4"), *MOE, "--moe-router-load-balancing-type", "global_aux_loss")
    run = (*run, "--expert-model-parallel-size", "2")
    ours = train(2, OURS, tmp_path / "ours", *run, "--moe-aux-loss-coeff", "0.5")
    theirs = train(2, STOCK, tmp_path / "theirs", *run, "--moe-aux-loss-coeff", "1.0")
    assert_agree(ours, theirs, list(range(1, 5)), ("lm loss", "grad-norm"))
