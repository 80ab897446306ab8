"""What tiny training runs log, to the bit, and the weights they save."""

import hashlib
import shlex
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from checkout import RUN, Checkout, DidNotRun, each
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

DENSE = shlex.split(
    """
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 2
    --seq-length 32 --max-position-embeddings 32 --position-embedding-type rope --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights
    --micro-batch-size 2 --global-batch-size 8 --attention-dropout 0 --hidden-dropout 0
    --mock-data --tokenizer-type NullTokenizer --vocab-size 128 --lr 3e-3 --min-lr 1e-4
    --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0 --seed 7 --num-workers 0
    --log-interval 1 --tensorboard-log-interval 1 --eval-iters 1 --eval-interval 1000
    --ckpt-format torch_dist --use-distributed-optimizer --train-iters 3
    --save-interval 3
    """
)
EXPERTS = shlex.split(
    """
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48 --moe-aux-loss-coeff 1e-2
    --moe-z-loss-coeff 1e-3 --moe-token-dispatcher-type alltoall
    """
)
MODEL = [*DENSE, *EXPERTS]
EP2 = "--expert-model-parallel-size 2"
EP4 = "--expert-model-parallel-size 4"
TP2 = f"{EP2} --tensor-model-parallel-size 2"
TIMED = ("time", "throughput", "memory", "mem-")  # in the tags of what no checkout decides


COMMON = "common_state/shard_0_1"  # of a checkpoint: arguments, iteration, the optimizer's groups
LONG = 2000  # characters of a value that is not hashed


@dataclass(frozen=True)
class Run:
    """A run: how many ranks, its flags, and whose checkpoint it goes on from."""

    ranks: int
    flags: str
    resumes: str | None = None
    bias: bool = False  # in all linear layers


RUNS = {
    "ep1": Run(1, ""),
    "ep2": Run(2, f"{EP2} --save-interval 2"),
    "ep2-resumed-by-one": Run(1, "--ckpt-step 2", resumes="ep2"),
    "tp2-ep2": Run(4, TP2 + " --expert-tensor-parallel-size 2"),
    "tp2-ep2-sequence-parallel": Run(
        4, f"{TP2} --sequence-parallel --expert-tensor-parallel-size 1"
    ),
    "pp2": Run(
        2, "--pipeline-model-parallel-size 2 --moe-shared-expert-intermediate-size 32 --bf16"
    ),
    "chunked": Run(4, f"{EP4} --ep-overlap chunked --ep-overlap-chunks 2"),
    "two-batch": Run(2, f"{EP2} --bf16 --ep-overlap two_batch --ep-dispatch-dedup on"),
    "fp8-rowwise": Run(
        2, f"{EP2} --bf16 --ep-fp8 rowwise --ep-dispatch-dtype fp8 --ep-dispatch-dedup on"
    ),
    "capacity": Run(
        2, f"{EP2} --ep-capacity-factor 1.0 --ep-drop-policy probs --ep-save recompute"
    ),
    "pyramid": Run(
        2,
        f"{EP2} --num-experts 8 --moe-layer-freq [1,1] --ep-experts-per-layer 4,8 --ep-topk 1 "
        "--ep-shared-expert learned --moe-shared-expert-intermediate-size 48 "
        "--ep-dense-activation geglu --ep-expert-activation relu --ep-normalize none "
        "--ep-capacity-factor 1.0 --ep-min-capacity 2 --ep-drop-policy position "
        "--ep-aux-loss-counts top1 --dist-ckpt-optim-fully-reshardable",
    ),
    "sigmoid-groups": Run(
        2,
        f"{EP2} --ep-score-function sigmoid --ep-num-groups 2 --ep-group-topk 1 "
        "--ep-expert-bias on --ep-dispatcher hierarchical --ep-ranks-per-node 1 --ep-gemm loop "
        "--ep-aux-loss-scope sequence",
    ),
    "drawn": Run(
        2,
        f"{EP2} --ep-noise rsample --ep-jitter-eps 0.01 --ep-second-expert random "
        "--ep-drop-policy random --ep-capacity-factor 1.0 --ep-group-tokens 16 "
        "--ep-aux-loss-scope group",
    ),
    "fp8-blockwise": Run(
        2,
        f"{EP2} --hidden-size 128 --moe-ffn-hidden-size 128 --ep-fp8 blockwise "
        "--ep-fp8-wgrad bf16 --ep-save fp8",
    ),
    "expert-choice": Run(
        2,
        f"{EP2} --ep-router expert_choice --ep-force-expert-choice on --ep-capacity-factor 1.0 "
        "--ep-overlap shared_expert --moe-shared-expert-intermediate-size 32 "
        "--moe-aux-loss-coeff 0 --moe-z-loss-coeff 0",
    ),
    "biases": Run(2, f"{EP2} --ep-expert-activation gelu", bias=True),
    "virtual-stages-recompute": Run(
        4,
        f"{EP2} --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 "
        "--num-layers 4 --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1",
    ),
}
OLDER = {"ep1": Run(1, ""), "chunked": RUNS["chunked"]}  # on releases before 0.19


def collect(checkout: Checkout, script: Path, runs: dict[str, Run]) -> dict[str, str]:
    """Train; return RUN/scalar/TAG/ITERATION -> hex and RUN/ITERATION/NAME -> SHA-256."""
    return each(runs, lambda name: train(checkout, script, name, runs[name]))


def train(checkout: Checkout, script: Path, name: str, run: Run) -> dict[str, str]:
    """Make one run; raises DidNotRun when it ends with an error or leaves nothing to compare."""
    folder = checkout.folder / "trained" / name
    load = () if run.resumes is None else ("--load", f"trained/{run.resumes}/saved")
    places = ("--save", f"trained/{name}/saved", "--tensorboard-dir", f"trained/{name}/board")
    model = [word for word in MODEL if not (run.bias and word == "--disable-bias-linear")]
    flags = (*model, *places, *load, *run.flags.split())
    checkout.run(*RUN, str(script), *flags, ranks=run.ranks).check()
    logged, kept = scalars(folder / "board"), saved(folder / "saved")
    if not any("grad-norm" in key for key in logged) or not kept:
        raise DidNotRun("it logged no grad-norm, or saved nothing")
    return logged | kept


def scalars(folder: Path) -> dict[str, str]:
    """Return every logged scalar but times, as hexadecimal floats."""
    events = EventAccumulator(str(next(folder.glob("events*"))), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not any(word in tag for word in TIMED)]
    return {
        f"scalar/{tag}/{event.step}": float(event.value).hex()
        for tag in tags
        for event in events.Scalars(tag)
    }


def saved(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each tensor of every checkpoint, its objects, and the run's arguments.

    Other objects than those are states of generators and of modules that have none.
    """
    found: dict[str, str] = {}
    for place in sorted(folder.glob("iter_*")):
        for name, value in content(place).items():
            found[f"{place.name}/{name}"] = fingerprint(value)
    return found


def content(place: Path) -> dict[str, Any]:
    """Return every tensor and object of a torch_dist checkpoint, its common state by key."""
    reader = dcp.FileSystemReader(place)
    state: dict[str, Any] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        tensor = isinstance(entry, TensorStorageMetadata)
        state[name] = torch.empty(entry.size, dtype=entry.properties.dtype) if tensor else None
    with warnings.catch_warnings(action="ignore"):  # that no process group is there
        dcp.load(state, storage_reader=reader, no_dist=True)
    if (place / "common.pt").exists():  # until 0.18
        common = torch.load(place / "common.pt", weights_only=False)
    else:
        common = state.pop(COMMON)[0]
    arguments = {f"args/{name}": value for name, value in vars(common.pop("args")).items()}
    return {**state, **common, **arguments}


def fingerprint(value: Any) -> str:
    """Return a text that tells two values apart; of tensors their bytes."""
    if not isinstance(value, torch.Tensor):
        text = repr(value)
        return text if len(text) < LONG else hashlib.sha256(text.encode()).hexdigest()
    data = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{value.dtype} {list(value.shape)} {hashlib.sha256(data).hexdigest()}"


def collect_older(checkout: Checkout, runs: dict[str, Run]) -> dict[str, str]:
    """Train on a release whose loop is started in other words, by the checkout's own script."""
    (script,) = (checkout.root / "tests").rglob("pretrain_older.py")
    return collect(checkout, script, runs)
