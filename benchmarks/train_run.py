"""One run of train_ep.py: its command line, and what its log says."""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NamedTuple

import torch
from train_sides import (
    BALANCED,
    FUSED,
    PLAIN,
    ROOT,
    RUN,
    SIDES,
    UNFUSED_TOTALS,
    VARIABLES,
    own_flags,
)

from ep_plugin.errors import ConfigError
from ep_plugin.moe.parallel import ParallelConfig

DEFAULT_MICRO_BATCH = 8

SCRIPT = str(ROOT / "recipes" / "pretrain_gpt.py")

GPT_20M = """
--num-layers 4 --hidden-size 384 --ffn-hidden-size 1024 --num-attention-heads 6 --seq-length 512
--max-position-embeddings 512 --position-embedding-type rope --swiglu --disable-bias-linear
--untie-embeddings-and-output-weights --normalization RMSNorm --attention-dropout 0
--hidden-dropout 0 --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 384
--moe-aux-loss-coeff 1e-2
"""

ATTENTION = re.compile(r"Selected backend = (\w+)")

ERROR = re.compile(r"\b\w*(?:Error|Exception)\b|error:|not supported", re.ASCII)

ITERATION = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+).*?lm loss: (\S+)")


class Run(NamedTuple):
    """What one run's log says."""

    steady: list[float]  # milliseconds of iterations after the first tenth
    first: float  # loss: of equal initial values
    loss: float  # mean of the last tenth
    tokens: int  # of an iteration
    attention: str  # that Transformer Engine takes


class RunError(Exception):
    """A side could not be measured; the text says why."""


class Case(NamedTuple):
    """One model in one layout."""

    layout: str
    depth: int | None  # layers; None: the model's
    micro_batch: int  # sequences

    def title(self, args: argparse.Namespace) -> str:
        """Return what a row calls the model."""
        layers = "" if self.depth is None else f", {self.depth} layers"
        many = len(args.micro_batch) > 1 or self.micro_batch != DEFAULT_MICRO_BATCH
        return f"{args.model}{layers}" + (f", micro-batch {self.micro_batch}" if many else "")

    def stem(self, args: argparse.Namespace) -> str:
        """Return the beginning of the names of its logs."""
        return f"{args.model}_{self.layout}_l{self.depth or 0}_m{self.micro_batch}"


def has_engine() -> bool:
    """Whether Transformer Engine is here, and a GPU for it."""
    return find_spec("transformer_engine") is not None and torch.cuda.is_available()


def model_flags(name: str, num_layers: int | None, sequence: int | None) -> list[str]:
    """Return Megatron's flags of a model, with as many layers as asked for."""
    if name == "gpt-20m":
        flags = shlex.split(GPT_20M)
    else:
        command = [sys.executable, "-m", "ep_plugin.cli", "presets", name, "--json"]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        flags = json.loads(printed)["arguments"]
    changes = {"--num-layers": num_layers, "--seq-length": sequence}
    if num_layers is not None and "--moe-layer-freq" in flags:
        changes["--moe-layer-freq"] = 1
    if sequence is not None:
        changes["--max-position-embeddings"] = sequence
    for flag, value in changes.items():
        if value is not None:
            flags[flags.index(flag) + 1] = str(value)
    return flags


def parallel_of(layout: str, ranks: int) -> ParallelConfig:
    """Return a layout such as tp=2,ep=4; raises ConfigError where it is none."""
    parts = [part.partition("=") for part in layout.split(",")]
    if not all(key in ("tp", "pp", "ep", "etp") and size.isdecimal() for key, _, size in parts):
        raise ConfigError(f"--layouts takes tp, pp, ep, etp, as tp=2,ep=4; got {layout!r}")
    sizes = {key: int(size) for key, _, size in parts}
    return ParallelConfig(world_size=ranks, **{"etp": 1, **sizes})


def layout_flags(parallel: ParallelConfig) -> list[str]:
    """Return the flags of a layout."""
    flags = [
        *("--tensor-model-parallel-size", str(parallel.tp)),
        *("--pipeline-model-parallel-size", str(parallel.pp)),
        *("--expert-model-parallel-size", str(parallel.ep)),
        *("--expert-tensor-parallel-size", str(parallel.expert_tp)),
    ]
    return [*flags, "--sequence-parallel"] if parallel.tp > 1 else flags


def data_flags(data: Path | None, log: Path) -> list[str]:
    """Return the flags of real text that recipes/prepare_data.py wrote, or of mock data."""
    if data is None:
        return ["--mock-data", "--vocab-size", "8192"]
    vocabulary = json.loads((data / "manifest.json").read_text())["vocab_size"]
    return [
        *("--data-path", str(data / "corpus"), "--split", "95,5,0"),
        *("--vocab-size", str(vocabulary), "--data-cache-path", str(log.parent / "cache")),
    ]


def command_of(name: str, fp8: bool, seed: int, args: argparse.Namespace, case: Case) -> list[str]:
    """Return the command line of one run."""
    side, engine = SIDES[name], has_engine()
    model = model_flags(args.model, case.depth, args.sequence)
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(args.ranks), *side.runner, SCRIPT, *model, *shlex.split(RUN)),
        *(word for word in shlex.split(FUSED if engine else PLAIN) if word not in args.without),
        *([] if find_spec("fused_weight_gradient_mlp_cuda") else [UNFUSED_TOTALS]),
        *([BALANCED] if args.force_balance else []),
        *layout_flags(parallel_of(case.layout, args.ranks)),
        *("--micro-batch-size", str(case.micro_batch), "--global-batch-size", str(args.batch)),
        *("--train-iters", str(args.iterations), "--seed", str(seed)),
        *shlex.split(own(name, fp8, args, case)),
    ]


def own(name: str, fp8: bool, args: argparse.Namespace, case: Case) -> str:
    """Return the flags that are a side's own."""
    recipe = args.fp8_recipe if fp8 else None
    return own_flags(SIDES[name], over_ranks(case, args), has_engine(), recipe)


def over_ranks(case: Case, args: argparse.Namespace) -> bool:
    """Whether experts are on more than one rank."""
    parallel = parallel_of(case.layout, args.ranks)
    return parallel.ep * parallel.expert_tp > 1


def run(name: str, fp8: bool, seed: int, args: argparse.Namespace, case: Case) -> Run:
    """Train one side with one seed; raises RunError, with the reason, for one that fails."""
    precision = "fp8" if fp8 else "bf16"
    log = args.logs / f"{case.stem(args)}_{name}_{precision}_seed{seed}.log"
    command = command_of(name, fp8, seed, args, case) + data_flags(args.data, log)
    variables = {**VARIABLES, **dict(SIDES[name].variables)} if has_engine() else {}
    if variables and parallel_of(case.layout, args.ranks).tp > 1:
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron asks for it on Hopper
    with log.open("w") as out:
        code = start(command, out, {**os.environ, "MODEL_CLASS": "gpt", **variables}, args.minutes)
    if code is None:
        raise RunError(f"it ran past --minutes {args.minutes:g}; see {log}")
    text = log.read_text(errors="replace")
    found = [(float(ms), float(loss)) for ms, loss in ITERATION.findall(text)]
    if code != 0 or not found:
        print(f"the end of {log}:\n{text[-3000:]}", file=sys.stderr)
        raise RunError(f"it ended with {code}: {reason_in(text)}; see {log}")
    steady = [ms for ms, _ in found[len(found) // 10 :]]
    tenth = max(1, len(found) // 10)
    sequence = int(command[command.index("--seq-length") + 1])
    last = statistics.mean(loss for _, loss in found[-tenth:])
    return Run(steady, found[0][1], last, args.batch * sequence, attention_in(text))


def start(
    command: list[str], out: IO[str], variables: dict[str, str], minutes: float | None
) -> int | None:
    """Return the exit code of a run; None for one that took longer and was ended, its ranks too."""
    limit = None if minutes is None else 60 * minutes
    process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=variables)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends its ranks then; killed, it would leave them
            try:
                process.wait(45)
            except subprocess.TimeoutExpired:
                process.kill()


def reason_in(log: str) -> str:
    """Return the last line of a log that names an error."""
    lines = [line.strip() for line in log.splitlines()]
    named = [line for line in lines if ERROR.search(line)]
    return (named or lines or ["no output"])[-1][:300]


def attention_in(log: str) -> str:
    """Return the attention that Transformer Engine said it takes."""
    found = sorted(set(ATTENTION.findall(log)))
    return " ".join(found) if found else "not said"
