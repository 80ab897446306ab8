"""The sides that train_ep.py compares, each with the flags and variables that are its own.

What is good for both sides is given to both: `RUN`, and on GPUs with Transformer Engine `FUSED`.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
RUN = """
--moe-token-dispatcher-type alltoall --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine
--lr-warmup-fraction 0.1 --weight-decay 0.1 --clip-grad 1.0 --num-workers 0 --bf16
--log-interval 1 --eval-iters 0 --eval-interval 100000 --use-distributed-optimizer
--tokenizer-type NullTokenizer --moe-router-dtype fp32
"""
PLAIN = """
--transformer-impl local --no-masked-softmax-fusion --no-persist-layer-norm --no-rope-fusion
"""
# Megatron refuses the cross-entropy of Transformer Engine. `auto` lets it choose its attention,
# which the row prints: with another cuDNN in the library path it takes the unfused one in silence.
FUSED = """
--transformer-impl transformer_engine --moe-grouped-gemm --cross-entropy-loss-fusion
--cross-entropy-fusion-impl native --no-check-for-nan-in-loss-and-grad --manual-gc
--manual-gc-interval 100 --overlap-grad-reduce --overlap-param-gather --attention-backend auto
"""
SWITCHES = tuple(  # of all sides, that take no value
    word
    for word in FUSED.split()
    if word.startswith(("--no-check", "--overlap", "--manual-gc"))
    and word != "--manual-gc-interval"
)
UNFUSED_TOTALS = "--no-gradient-accumulation-fusion"  # Megatron's output layer has it from apex
BALANCED = "--moe-router-force-load-balancing"
PADDED = "--moe-router-padding-for-quantization"
FORMATS = {"tensorwise": "hybrid", "delayed": "hybrid", "blockwise": "e4m3"}
# For all sides. Partial graphs together with expandable segments need no registration by NCCL;
# the last two have Transformer Engine say which attention it took.
VARIABLES = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
    "NCCL_GRAPH_REGISTER": "0",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "NVTE_FWD_LAYERNORM_SM_MARGIN": "20",
    "NVTE_BWD_LAYERNORM_SM_MARGIN": "20",
    "NVTE_DEBUG": "1",
    "NVTE_DEBUG_LEVEL": "2",
}


class Side(NamedTuple):
    """How a side is started, and the flags that are its own."""

    runner: tuple[str, ...]
    flags: str = ""
    over_ranks: str = ""  # with experts on more than one rank
    fused: str = ""  # with Transformer Engine
    fp8: str = "--ep-fp8 rowwise"
    variables: tuple[tuple[str, str], ...] = ()
    needs_engine: bool = False
    needs_ranks: bool = False  # experts on more than one

    @property
    def is_peer(self) -> bool:
        return self.runner == THEIRS

    @property
    def in_graph(self) -> bool:
        """Whether its whole iteration is in a CUDA graph."""
        return GRAPH in f"{self.flags} {self.fused}"

    @property
    def drops(self) -> bool:
        """Whether it trains another model, whose experts drop rows."""
        return FIXED in self.fused


OURS = ("-m", "ep_plugin.run")
THEIRS = (str(ROOT / "tests" / "helpers" / "stock_run.py"),)
GRAPH = "--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad"
FUSIONS = "--moe-permute-fusion --moe-router-fusion"
PARTIAL = "--cuda-graph-impl transformer_engine --cuda-graph-modules attn moe_router moe_preprocess"
FIXED = "--moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity"
HIDDEN = "--overlap-moe-expert-parallel-comm --delay-wgrad-compute"
CUTLASS = (("NVTE_USE_CUTLASS_GROUPED_GEMM", "1"),)


def _theirs(*flags: str, cutlass: bool = False, overlap: bool = False) -> Side:
    return Side(
        THEIRS,
        over_ranks=HIDDEN if overlap else "",
        fused=" ".join((FUSIONS, *flags)),
        fp8="",
        variables=CUTLASS if cutlass else (),
        needs_engine=True,
        needs_ranks=overlap,
    )


LAYERS = "layers"  # ours, with a CUDA graph of each layer
SERIAL = "graph-serial"  # ours in one graph, where rows do not travel beside their products
OUR_WAYS = {LAYERS: "layers", SERIAL: "serial"}  # side -> what its rows' backend says beside ours
SIDES = {
    "ep_plugin": Side(OURS, over_ranks="--ep-dispatcher symm_mem"),
    "graph": Side(OURS, GRAPH, over_ranks="--ep-dispatcher symm_mem --ep-overlap chunked"),
    SERIAL: Side(OURS, GRAPH, over_ranks="--ep-dispatcher symm_mem --ep-overlap serial"),
    LAYERS: Side(
        OURS,
        "--cuda-graph-impl transformer_engine",
        over_ranks="--ep-dispatcher symm_mem",
        needs_engine=True,
    ),
    "megatron-defaults": Side(THEIRS, fp8=""),  # as its users get it: grouped GEMM alone
    "megatron": Side(THEIRS, fused=FUSIONS, fp8=""),
    "megatron-cutlass": _theirs(cutlass=True),
    "megatron-graphs": _theirs(PARTIAL),
    "megatron-overlap": _theirs(overlap=True),
    "megatron-graphs-cutlass": _theirs(PARTIAL, cutlass=True),
    "megatron-all": _theirs(PARTIAL, cutlass=True, overlap=True),
    # The whole iteration, as ours: its experts' sizes must be fixed, so rows are dropped.
    "megatron-drop_and_pad": _theirs(FIXED, GRAPH),
}


def fp8_flags(side: Side, recipe: str) -> str:
    """Return a side's flags for FP8; `recipe` is Megatron's.

    Padding is by its router, but for the side as its users get it.
    """
    if not side.is_peer:
        return side.fp8
    flags = f"--fp8-format {FORMATS[recipe]} --fp8-recipe {recipe}"
    return f"{flags} {PADDED}" if side.fused else flags


def own_flags(side: Side, over_ranks: bool, engine: bool, recipe: str | None) -> str:
    """Return the flags that a side alone gets; `recipe` is None in bf16."""
    fused = side.fused if engine else ""
    if recipe is not None and side.is_peer:  # rows that its router pads are counted by the host
        fused = fused.replace(" moe_preprocess", "")
    parts = [
        side.flags,
        side.over_ranks if over_ranks else "",
        fused,
        fp8_flags(side, recipe) if recipe is not None else "",
    ]
    return " ".join(filter(None, parts))


def why_not(side: Side, over_ranks: bool, engine: bool, recipe: str | None) -> str:
    """Return why a side cannot run here; "" where it can."""
    if (side.needs_engine or (recipe and side.is_peer)) and not engine:
        return "it needs a GPU and transformer_engine"
    if side.needs_ranks and not over_ranks:
        return "its overlap needs experts on more than one rank"
    return ""


def switches(side: Side, flags: str, without: Iterable[str] = ()) -> str:
    """Return what a row says of its side: its own flags and variables, and what all lack."""
    variables = (f"{name}={value}" for name, value in side.variables)
    lacking = (f"without {name}" for name in without)
    return " ".join(filter(None, (flags, *variables, *lacking)))


def backend(name: str, recipe: str | None, engine: bool) -> str:
    """Return a row's backend for a side."""
    if not SIDES[name].is_peer:
        return "+".join(["ep_plugin", *filter(None, [OUR_WAYS.get(name)])])
    kind = "te" if engine else "sequential experts"
    ways = [*name.split("-")[1:], *([recipe] if recipe not in (None, "tensorwise") else [])]
    return "+".join(["megatron", *map(str, ways)]) + f" ({kind})"
