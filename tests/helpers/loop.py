"""Run Megatron's own training loop on gloo ranks and read what it logged."""

import os
import shlex
from pathlib import Path

from megatron.core import __version__ as core_version
from warm import Done, run_script

from ep_plugin.commands.report.events import Run, read_run

ROOT = Path(__file__).parents[2]
OURS = ("-m", "ep_plugin.run")
STOCK = (str(ROOT / "tests" / "helpers" / "stock_run.py"),)
NEWEST = tuple(map(int, core_version.split(".")[:2])) >= (0, 19)
SCRIPT = str(ROOT / ("recipes/pretrain_gpt.py" if NEWEST else "tests/helpers/pretrain_older.py"))
SHAPE = shlex.split(
    """
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 2
    --seq-length 32 --max-position-embeddings 32 --position-embedding-type rope --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights
    """
)
RUN = shlex.split(
    """
    --micro-batch-size 2 --global-batch-size 8 --attention-dropout 0 --hidden-dropout 0
    --mock-data --tokenizer-type NullTokenizer --vocab-size 128 --lr 3e-3 --min-lr 1e-4
    --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0 --seed 7 --num-workers 0
    --log-interval 1 --tensorboard-log-interval 1 --eval-iters 1 --eval-interval 1000
    --ckpt-format torch_dist
    """
)
MODEL = [*SHAPE, *RUN]
# Layers of Megatron's own on a GPU, without what needs Transformer Engine or apex.
LOCAL = shlex.split(
    """
    --transformer-impl local --no-masked-softmax-fusion --no-persist-layer-norm --no-rope-fusion
    --no-gradient-accumulation-fusion
    """
)
MOE = shlex.split(
    """
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48 --moe-aux-loss-coeff 1e-2
    --moe-z-loss-coeff 1e-3 --moe-token-dispatcher-type alltoall
    """
)


def launch(ranks: int, runner: tuple[str, ...], *flags: str) -> Done:
    """Run the loop and return the finished run, whatever its exit code."""
    return launch_with(ranks, runner, *SHAPE, *flags)


def launch_with(ranks: int, runner: tuple[str, ...], *flags: str) -> Done:
    """Run the loop with a model of the caller's: a GPT, unless it has a pattern of layers."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if "--hybrid-layer-pattern" not in flags:
        environment.setdefault("MODEL_CLASS", "gpt")
    return run_script(ranks, [*runner, SCRIPT, *RUN, *flags], environment)


def train(ranks: int, runner: tuple[str, ...], folder: Path, *flags: str) -> Run:
    """Run the loop, which must succeed, and return its TensorBoard scalars."""
    done = launch(ranks, runner, "--tensorboard-dir", str(folder), *flags)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return read_run(folder)
