"""What the argument parser makes of generated command lines, refusals and their words too."""

import json
import random
from pathlib import Path

from checkout import Checkout, DidNotRun
from training import DENSE, MODEL

BASE = [*MODEL, "--expert-model-parallel-size", "2"]
RICHER = (  # what many flags need beside them
    "--ep-capacity-factor 1.5 --ep-drop-policy probs --moe-shared-expert-intermediate-size 48 "
    "--moe-layer-freq [1,1]",
    "--bf16 --ep-fp8 rowwise --ep-dispatch-dtype fp8 --ep-overlap chunked",
    "--ep-score-function sigmoid --ep-num-groups 2 --ep-group-topk 1 --ep-group-tokens 64",
)


def table(text: str) -> list[list[str]]:
    """Return [flag, value] for each value behind each line's flag; [flag] where there is none."""
    rows = [line.split() for line in text.strip().splitlines()]
    return [pair for row in rows for pair in ([[row[0], value] for value in row[1:]] or [row])]


LEGAL = table(
    """
    --ep-preset mixtral-8x7b deepseek-v3 switch-base-128 glam-64b-64e
    --ep-router topk expert_choice
    --ep-dispatcher auto local alltoall hierarchical symm_mem deepep
    --ep-gemm auto loop torch_grouped te deepgemm
    --ep-overlap serial shared_expert chunked two_batch
    --ep-topk 1 2 4
    --ep-score-function softmax sigmoid
    --ep-normalize before_drop after_drop none
    --ep-scaling-factor 2.5
    --ep-router-dtype fp32 fp64 model
    --ep-router-bias on off
    --ep-jitter-eps 0.01
    --ep-noise none rsample
    --ep-second-expert all sampling random threshold
    --ep-second-threshold 0.5
    --ep-num-groups 2
    --ep-group-topk 1
    --ep-group-score-topk 1
    --ep-expert-bias on off
    --ep-bias-update-rate 0.5
    --ep-capacity-factor 1.5
    --ep-eval-capacity-factor 2
    --ep-min-capacity 4
    --ep-capacity-rounding floor round ceil floor_x4
    --ep-capacity-counts-topk on off
    --ep-drop-policy none position rank_position probs random bpr
    --ep-group-tokens 64
    --ep-aux-loss-coeff 0.5
    --ep-aux-loss-counts topk top1
    --ep-aux-loss-scope micro_batch sequence global group
    --ep-aux-loss-layers sum mean
    --ep-z-loss-coeff 0.5
    --ep-force-expert-choice on off
    --ep-dense-activation swiglu geglu geglu_tanh gelu relu
    --ep-expert-activation swiglu geglu geglu_tanh gelu relu
    --ep-fp8 off rowwise blockwise
    --ep-fp8-wgrad fp8 bf16
    --ep-save bf16 fp8 recompute
    --ep-deterministic on off
    --ep-dispatch-dtype bf16 fp8
    --ep-dispatch-dedup on off
    --ep-check-splits first always off
    --ep-comm-sms 16
    --ep-rank-capacity 1.25
    --ep-ranks-per-node 2 3
    --ep-overlap-chunks 2
    --ep-shared-expert sum learned
    --ep-experts-per-layer 2,4 4*2
    --ep-optimizer-format fully_reshardable dp_reshardable
    --ep-check-save on off
    --ep-audit-save
    --ep-parity-dump somewhere
    """
)
WRONG = table(
    """
    --ep-preset nobody
    --ep-router best
    --ep-dispatcher pigeon
    --ep-gemm nobody.here
    --ep-overlap none
    --ep-topk 9 two
    --ep-score-function tanh
    --ep-scaling-factor 0
    --ep-router-bias yes
    --ep-jitter-eps -1
    --ep-second-threshold -1
    --ep-num-groups 3
    --ep-group-topk 5
    --ep-group-score-topk 0
    --ep-capacity-factor -1
    --ep-min-capacity -4
    --ep-group-tokens 0
    --ep-fp8 e5m2
    --ep-comm-sms 0
    --ep-rank-capacity 0
    --ep-overlap-chunks 0
    --ep-experts-per-layer 4*3 8*2 4*
    """
)
THEIRS = {"--ep-overlap-early-attn-memory-release"}  # Megatron's own, of the same beginning
PAIRS, SEED = 100, 1


def lines() -> list[list[str]]:
    """Return the command lines: each value alone, and pairs of legal ones on richer models."""
    richer = [text.split() for text in RICHER]
    draw = random.Random(SEED)
    pairs = [[*draw.choice(richer), *draw.choice(LEGAL), *draw.choice(LEGAL)] for _ in range(PAIRS)]
    alone = [[*BASE, *words] for words in ([], *LEGAL, *WRONG, *richer, *pairs)]
    return [*alone, [*DENSE, "--ep-topk", "1"]]


def collect(checkout: Checkout) -> dict[str, str]:
    """Parse every line in one process; return LINE/ARGUMENT -> value."""
    asked, answered = checkout.folder / "lines.json", checkout.folder / "answers.json"
    asked.write_text(json.dumps(lines()))
    script = Path(__file__).with_name("parse_lines.py")
    checkout.run(
        *(str(script), str(asked), str(answered)), RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2"
    ).check()
    answer = json.loads(answered.read_text())
    if unknown := set(answer["flags"]) - {row[0] for row in LEGAL} - THEIRS:
        raise DidNotRun(f"LEGAL in {__file__} has no values for {', '.join(sorted(unknown))}")
    found = {"flags": " ".join(answer["flags"])}
    for number, (line, answers) in enumerate(zip(lines(), answer["answers"], strict=True)):
        own = " ".join(line[len(BASE) :]) or "(nothing more)"
        found |= {f"{number} {own}/{key}": value for key, value in answers.items()}
    return found
