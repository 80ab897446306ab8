"""`plan` of a HybridModel beside Megatron's own: the parameters of every rank of models that are
built without storage, and the work that Megatron counts for its throughput.

A checkpoint's parameters are in `test_hybrid.py`, the command in `tests/commands`.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from loop import NEWEST

from ep_plugin.commands import plan
from ep_plugin.commands.plan.hybrid_flags import SIZES, read_sizes
from ep_plugin.commands.plan.hybrid_layout import check_layout
from ep_plugin.commands.plan.hybrid_plan import HybridModel, kinds, stage_held
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.moe.parallel import ParallelConfig

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(not NEWEST, reason="shapes of one release"),
    pytest.mark.skipif(
        not cpu_mode.wanted(), reason="a GPU is here and EP_PLUGIN_DEVICE is not cpu"
    ),
]
CASES = 14
RUN = (
    *("--micro-batch-size", "1", "--lr", "1e-3", "--tokenizer-type", "NullTokenizer"),
    *("--moe-aux-loss-coeff", "1e-2", "--transformer-impl", "local"),
)


@dataclass(frozen=True)
class Case:
    """A model and its layout: words that Megatron and `plan` read alike, and those of each."""

    model: tuple[str, ...]
    tp: int
    pp: int
    ep: int
    etp: int

    @property
    def gpus(self) -> int:
        return self.pp * self.tp * self.ep * self.etp

    @property
    def megatron(self) -> tuple[str, ...]:
        sizes = {"tensor-model": self.tp, "pipeline-model": self.pp}
        sizes |= {"expert-model": self.ep, "expert-tensor": self.etp} if self.experts else {}
        flags = [w for name, n in sizes.items() for w in (f"--{name}-parallel-size", str(n))]
        more = ("--sequence-parallel",) if self.tp > 1 else ()
        return (*self.model, *RUN, *flags, *more, "--max-position-embeddings", "64")

    @property
    def experts(self) -> bool:
        return any(word.startswith("--num-experts") for word in self.model)

    @property
    def plan(self) -> tuple[str, ...]:
        flags = ("--gpus", self.gpus, "--tp", self.tp, "--pp", self.pp, "--etp", self.etp)
        ep = ("--ep", self.ep) if self.experts else ()
        return (*self.model, *map(str, (*flags, *ep)))


def drawn(draw: random.Random) -> Case:
    """Return a case with every layer, in any order."""
    attention = draw.choice("**+")
    symbols = [attention, "M", "G", "-", "E", *draw.choices(f"{attention}MG-E", k=3)]
    draw.shuffle(symbols)
    tp, ep, etp = draw.choice((1, 2)), draw.choice((1, 2)), draw.choice((1, 2))
    pp, virtual = draw.choice(((1, 1), (2, 1), (2, 2)))
    pieces = pp * virtual
    each = -(-len(symbols) // pieces)
    cut = ["".join(symbols[i * each : (i + 1) * each]) for i in range(pieces)]
    predicting = draw.choice((0, 0, 1, 2))
    pattern = "/".join(["|".join(cut), *[f"{attention}-G"] * predicting])
    rotary = predicting or draw.random() < 0.5
    flags: dict[str, Any] = {
        "hybrid-layer-pattern": pattern,
        "hidden-size": 128,
        "num-attention-heads": 4,
        "vocab-size": draw.choice((500, 1000)),
        "seq-length": 64,
        "num-experts": 4,
        "normalization": draw.choice(("LayerNorm", "RMSNorm")),
        "moe-router-topk": draw.choice((2, 3)),
        "mamba-num-groups": draw.choice((2, 4)),
    }
    flags |= {"position-embedding-type": "rope"} if rotary else {"max-position-embeddings": 64}
    maybe: dict[str, Any] = {
        **{"ffn-hidden-size": 96, "moe-ffn-hidden-size": 32, "mamba-state-dim": 16},
        **{
            "mamba-num-heads": 8,
            "linear-key-head-dim": 32,
            "linear-num-key-heads": 4,
        },
        **{"linear-value-head-dim": 64, "linear-num-value-heads": 8, "linear-conv-kernel-dim": 3},
        "moe-shared-expert-intermediate-size": 48,
        "ep-experts-per-layer": ",".join(["4"] * (symbols.count("E") - 1) + ["3"])
        if symbols.count("E") > 1
        else "4",
        **({"kv-channels": 16} if attention == "*" else {"q-lora-rank": 24, "v-head-dim": 40}),
    }
    flags |= {name: value for name, value in maybe.items() if draw.random() < 0.5}
    if "linear-num-value-heads" in flags:
        flags["linear-num-key-heads"] = 4
    words = [f"--{name}={value}" for name, value in flags.items()]  # a pattern may begin with -
    switches = ["--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"]
    if attention == "*":
        switches += ["--attention-output-gate", "--add-qkv-bias"]
        words += draw.choice(([], ["--group-query-attention", "--num-query-groups", "2"]))
    words += [switch for switch in switches if draw.random() < 0.5]
    if etp > 1 and "--disable-bias-linear" not in words:
        words.append("--disable-bias-linear")
    if "--disable-bias-linear" in words and "moe-shared-expert-intermediate-size" in flags:
        words.append("--moe-shared-expert-gate")
    return Case(tuple(words), tp, pp, ep, etp)


def test_defaults_are_megatron_s() -> None:
    from megatron.training import arguments

    theirs = arguments.add_megatron_arguments(argparse.ArgumentParser()).parse_args([])
    for row in SIZES:
        if row.flag != "--num-query-groups":  # which Megatron reads beside another flag
            assert getattr(theirs, row.flag.removeprefix("--").replace("-", "_")) == row.default


PLAIN = (
    *("--hidden-size", "128", "--num-attention-heads", "4", "--vocab-size", "500"),
    *("--seq-length", "64", "--position-embedding-type", "rope"),
)
GROUPS = ("--mamba-num-groups", "2")
BY_HAND = (
    Case(("--hybrid-layer-pattern", "*-*-", *PLAIN), 1, 2, 1, 1),
    *(
        Case(
            ("--hybrid-layer-pattern", pattern, *PLAIN, *GROUPS, "--num-experts", "4", *more),
            tp,
            2,
            2,
            1,
        )
        for pattern, more, tp in (
            ("*MG-E|*MGE-", ("--swiglu", "--moe-ffn-hidden-size", "48"), 1),
            ("*MGE|*-EMG-/*-", ("--disable-bias-linear",), 2),
        )
    ),
    Case(("--hybrid-layer-pattern", "+M|-G", *PLAIN, *GROUPS), 2, 2, 1, 1),
)


@cache
def cases() -> tuple[Case, ...]:
    draw = random.Random(5)
    return (*BY_HAND, *(drawn(draw) for _ in range(CASES)))


@cache
def built() -> list[dict[str, Any]]:
    """What Megatron has of each case, all in one process."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "helpers" / "build_hybrid.py")],
        env={**os.environ, "EP_PLUGIN_DEVICE": "cpu", "PYTHONPATH": str(ROOT)},
        input=json.dumps([[case.gpus, case.megatron] for case in cases()]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def planned(case: Case) -> tuple[argparse.Namespace, HybridModel]:
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    args = parser.parse_args(case.plan)
    pattern, sizes, experts = read_sizes(args)
    check_layout(args, pattern, sizes, max(experts))
    return args, HybridModel(pattern, sizes, experts, args.seq_length)


@pytest.mark.parametrize("number", range(len(BY_HAND) + CASES))
def test_every_rank_holds_what_megatron_builds(number: int) -> None:
    case = cases()[number]
    _, model = planned(case)
    assert isinstance(built()[number], dict), (case, built()[number])
    parallel = ParallelConfig(
        world_size=case.gpus, tp=case.tp, pp=case.pp, ep=case.ep, etp=case.etp
    )
    for stage, stored in enumerate(built()[number]["stages"]):
        found = dict(stored)
        held = {kind.symbol: kind.params for kind in stage_held(model, parallel, stage)}
        if "+" in found:  # local layers cut the maps down to a latent, Transformer Engine's do not
            sizes, cut = model.sizes, 1 - 1 / case.tp
            narrow = (sizes.q_lora_rank or 0) + sizes.kv_lora_rank + sizes.qk_pos_emb_head_dim
            layers = "".join(model.pattern.cut(case.pp)[stage])
            if stage == case.pp - 1:
                layers += model.pattern.predicting * model.pattern.depths
            found["+"] += round(layers.count("+") * sizes.hidden_size * narrow * cut)
        assert {symbol: n for symbol, n in held.items() if n} == found, case
    if case.gpus == 1:
        total = sum(kind.params for kind in kinds(model))
        assert total == sum(built()[number]["stages"][0].values())


def test_work_is_what_megatron_counts_where_it_counts() -> None:
    """It leaves out latent attention, a gate, routers, convolutions of M and joined predictions."""
    compared = Counter[str]()
    for case, found in zip(cases(), built(), strict=True):
        _, model = planned(case)
        sizes, symbols = model.sizes, model.pattern.decoder
        symbols += model.pattern.predicting * model.pattern.depths
        square = sizes.linear_key_head_dim == sizes.linear_value_head_dim
        if "+" in symbols or sizes.attention_output_gate or not (square or "G" not in symbols):
            continue
        if sizes.mamba_inner != 2 * sizes.hidden_size:  # which it takes for granted
            continue
        channels = sizes.mamba_inner + 2 * sizes.mamba_num_groups * sizes.mamba_state_dim
        gate = sizes.hidden_size * sizes.moe_shared_expert_gate
        left_out = 2 * 4 * channels * symbols.count("M") + 2 * gate * symbols.count("E")
        left_out += 2 * sizes.hidden_size * sum(model.experts)
        left_out += 4 * sizes.hidden_size**2 * model.pattern.depths
        ours = sum(kind.trained_flops for kind in kinds(model)) - 3 * left_out
        assert ours * model.length == pytest.approx(found["flops"], rel=1e-9), case
        compared.update(symbols)
    assert min(compared[symbol] for symbol in "*MG-E") >= 4
