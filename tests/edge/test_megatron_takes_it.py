"""What we accept Megatron's own configuration takes, and what it would not is one sentence of ours.

Megatron's own words are an exception from inside its configuration, about flags that nobody typed.
"""

import itertools
import json
import os
import random
import shlex
import subprocess
import sys

import pytest
from command_line import Accepted, read
from flag_values import PLAIN
from loop import NEWEST, ROOT

pytestmark = [pytest.mark.megatron, pytest.mark.newest]
if not NEWEST:
    pytest.skip("the flags of Megatron 0.19", allow_module_level=True)
TWO_BATCH = "--bf16 --ep-overlap two_batch"
# A line that is refused, and what its refusal says to type in place of it.
REFUSED = {
    "--ep-expert-bias on": "--ep-expert-bias on --moe-router-score-function sigmoid",
    "--moe-router-enable-expert-bias --ep-bias-update-rate 0.5": "--ep-bias-update-rate 0.5 "
    "--moe-router-enable-expert-bias --moe-router-score-function sigmoid",
    "--moe-router-topk 1 --moe-aux-loss-coeff 0.01": "--moe-router-topk 1 "
    "--moe-aux-loss-coeff 0.01 --ep-normalize none",
    "--ep-topk 1 --moe-z-loss-coeff 0.01": "--ep-topk 1 --moe-z-loss-coeff 0.01 "
    "--ep-normalize none",
    "--ep-overlap two_batch": TWO_BATCH,
    "--overlap-moe-expert-parallel-comm --bf16": "--overlap-moe-expert-parallel-comm --bf16 "
    "--moe-token-dispatcher-type alltoall",
    f"{TWO_BATCH} --recompute-granularity full": f"{TWO_BATCH} --recompute-granularity selective",
    f"{TWO_BATCH} --recompute-granularity selective --recompute-modules moe": "--ep-overlap "
    "chunked --recompute-granularity selective --recompute-modules moe",
    "--ep-fp8 rowwise --no-fp8-wgrad": "--ep-fp8 rowwise --no-fp8-wgrad --ep-fp8-wgrad bf16",
    "--ep-fp8 blockwise --fp8-param-gather": "--ep-fp8 off --fp8-param-gather",
    "--ep-fp8 rowwise --first-last-layers-bf16": "--ep-fp8 off --first-last-layers-bf16",
    "--moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 0.01 0.02 "
    "--ep-further-losses global:0.1": "--moe-router-load-balancing-type aux_loss seq_aux_loss "
    "--moe-aux-loss-coeff 0.01 0.02",
    "--ep-quantile-balancing on --moe-expert-capacity-factor 1.25": "--ep-quantile-balancing on "
    "--ep-capacity-factor 1.25",
    "--moe-layer-freq [0]*2": "--moe-layer-freq 1",
    "--moe-layer-freq 0": "--moe-layer-freq 1",
    "--recompute-modules moe": "--recompute-granularity selective --recompute-modules moe",
    "--recompute-modules moe_act": "--recompute-granularity selective --recompute-modules moe_act "
    "--moe-grouped-gemm",
    "--moe-flex-dispatcher-backend hybridep": "--moe-flex-dispatcher-backend hybridep "
    "--moe-token-dispatcher-type flex",
    "--moe-flex-dispatcher-backend ncclep --moe-token-dispatcher-type alltoall": ""
    "--moe-flex-dispatcher-backend ncclep --moe-token-dispatcher-type flex",
    "--moe-flex-dispatcher-backend deepep": "--moe-flex-dispatcher-backend deepep "
    "--moe-token-dispatcher-type flex",
    "--moe-enable-deepep --moe-flex-dispatcher-backend hybridep": "--moe-token-dispatcher-type "
    "flex --moe-flex-dispatcher-backend hybridep",
    "--offload-modules core_attn attn_proj": "--offload-modules core_attn attn_proj "
    "--fine-grained-activation-offloading",
    "--moe-shared-expert-gate --disable-bias-linear": "--moe-shared-expert-gate "
    "--disable-bias-linear --moe-shared-expert-intermediate-size 2048",
    "--moe-router-topk-scaling-factor 0": "--moe-router-topk-scaling-factor 1",
    "--save D --use-distributed-optimizer --no-save-optim --ep-optimizer-format dp_reshardable": ""
    "--save D --use-distributed-optimizer --no-save-optim",
}
ROUTING = (
    ("", "--moe-router-score-function sigmoid"),
    ("", "--ep-expert-bias on"),
    ("", "--moe-router-topk 1", "--moe-router-topk 3"),
    ("", "--ep-normalize none", "--moe-router-pre-softmax"),
    ("", "--moe-aux-loss-coeff 0.01", "--ep-quantile-balancing on --ep-capacity-factor 1.25"),
)
QUIET = (  # what is said, and would end in Megatron's configuration
    "--moe-deepep-num-sms 8 --moe-hybridep-num-sms 9",
    "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend ncclep",
    "--moe-router-pre-softmax --moe-router-score-function sigmoid",
)
OVERLAP = (
    (TWO_BATCH, "--bf16 --overlap-moe-expert-parallel-comm"),
    ("", "--moe-token-dispatcher-type alltoall"),
    ("", "--recompute-granularity selective --recompute-modules core_attn"),
)


@pytest.mark.parametrize("line", REFUSED)
def test_a_line_is_refused_with_a_way_out(line: str) -> None:
    found = read(*shlex.split(line))
    assert isinstance(found, str)
    assert any(word in found for word in line.split() if word.startswith("--"))
    assert "; use " in found or "; leave " in found
    assert isinstance(read(*shlex.split(REFUSED[line])), Accepted)


def test_what_is_accepted_is_taken() -> None:
    """Lines at random, read and checked whole by a process of its own, over two ranks."""
    draw = random.Random(0)
    ways = [" ".join(words) for parts in (ROUTING, OVERLAP) for words in itertools.product(*parts)]
    lines = [*draw.sample(ways[:-8], 16), *ways[-8:], *QUIET]
    accepted = [
        shlex.split(line) for line in lines if isinstance(read(*shlex.split(line)), Accepted)
    ]
    assert 8 < len(accepted) < len(lines)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "helpers" / "read_flags.py")],
        input=json.dumps([[2, [*PLAIN, "--train-iters", "4", *words], None] for words in accepted]),
        capture_output=True,
        text=True,
        env={**os.environ, "EP_PLUGIN_DEVICE": "cpu", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    said = [
        (words, one) for words, one in zip(accepted, found, strict=True) if isinstance(one, str)
    ]
    assert said == []


def test_on_one_rank_two_micro_batches_at_once_are_idle() -> None:
    """Megatron's schedule for them is not asked for, which would end the run."""
    found = read("--ep-overlap", "two_batch", "--expert-model-parallel-size", "1")
    assert isinstance(found, Accepted)
    assert not found.args.overlap_moe_expert_parallel_comm


def test_without_saved_optimizer_states_nothing_is_said_of_their_format() -> None:
    from ep_plugin.megatron.arguments.resume import choose_format

    line = "--save D --save-interval 2 --use-distributed-optimizer"
    for more, said in (((), True), (("--no-save-optim",), False)):
        found = read(*line.split(), *more)
        assert isinstance(found, Accepted)
        found.args.dist_ckpt_optim_fully_reshardable = False
        assert (choose_format(found.args) is not None) == said
