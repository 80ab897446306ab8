"""The part of `ep-plugin plan` that says what each kind of layer of a HybridModel holds and costs.

What is assumed of memory stands in memory.py, what of layers in layers.py. Stages of several
segments run Megatron's interleaved schedule, with micro-batches enough to fill it.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ep_plugin.commands.plan.hybrid_flags import read_sizes
from ep_plugin.commands.plan.hybrid_layout import check_layout
from ep_plugin.commands.plan.layers import (
    BACKWARD,
    Layer,
    Sizes,
    embedding,
    kept,
    layer,
    output,
    prediction,
)
from ep_plugin.commands.plan.memory import ADAM, GRADIENT, LOGIT, USABLE, WEIGHT
from ep_plugin.commands.plan.pattern import NAMES, Pattern
from ep_plugin.commands.plan.row_types import Held, HybridFit, Kind
from ep_plugin.commands.plan.show import hybrid_tables
from ep_plugin.moe.auto import saves_rows
from ep_plugin.moe.parallel import ParallelConfig, degree

EMBEDDING, HEAD, PREDICTION = "embedding", "output", "prediction"


@dataclass(frozen=True)
class HybridModel:
    """A HybridModel: its layers in order, with the experts of each."""

    pattern: Pattern
    sizes: Sizes
    experts: tuple[int, ...]  # of each layer of the decoder
    length: int  # tokens of a sequence

    def layer(self, symbol: str, experts: int) -> Layer:
        return layer(symbol, self.sizes, self.length, experts)


def run(args: argparse.Namespace) -> int:
    """Print the kinds of layers, and a row for each --ep; raises ConfigError."""
    pattern, sizes, experts = read_sizes(args)
    model = HybridModel(pattern, sizes, experts, args.seq_length)
    ranks = check_layout(args, model.pattern, sizes, max(experts))
    found = kinds(model, args.recompute)
    rows = [fit(model, args, ep) for ep in ranks]
    if args.json:
        total = {"params": sum(kind.params for kind in found), "padded_vocab_size": sizes.vocab}
        made = {**total, "kinds": [asdict(kind) for kind in found], "notes": notes(model)}
        print(json.dumps({"model": made, "rows": [asdict(row) for row in rows]}, indent=1))
    else:
        print("\n".join([hybrid_tables(found, rows, args), "", *notes(model)]))
    return 0


def notes(model: HybridModel) -> list[str]:
    """Return what the figures leave open, a sentence each."""
    found = ["activations are an estimate, without CUDA, NCCL and workspaces"]
    unmeasured = [symbol for symbol in "MG" if symbol in model.pattern.symbols]
    if unmeasured:
        found.append(f"those of {' and '.join(unmeasured)} have not been measured")
    if not set("*+") & set(model.pattern.symbols):
        found.append("--num-attention-heads is read for * and +, and the pattern has neither")
    if model.pattern.depths:
        found.append("prediction is counted on the last stage, where Megatron builds it")
    return found


def kinds(model: HybridModel, recompute: bool = False) -> list[Kind]:
    """Return what each kind of layer has in the whole model, embedding first."""
    pattern, sizes = model.pattern, model.sizes
    every = Counter(zip(pattern.decoder, model.experts, strict=True))
    for symbol in pattern.predicting:
        every[symbol, 0] += pattern.depths
    whole: dict[str, tuple[int, Layer]] = {}
    for (symbol, experts), count in every.items():
        one, (before, sum_) = model.layer(symbol, experts), whole.get(symbol, (0, Layer()))
        whole[symbol] = (before + count, sum_ + _times(one, count))
    head = output(sizes)
    times = 1 + pattern.depths
    rows = [(EMBEDDING, 1, embedding(sizes), 0.0)]
    rows += [(symbol, *whole[symbol], 1.0) for symbol in NAMES if symbol in whole]
    if pattern.depths:
        rows.append((PREDICTION, pattern.depths, _times(prediction(sizes), pattern.depths), 1.0))
    params = (0 if sizes.tied else head.tensor) + sizes.norm
    rows.append((HEAD, 1, Layer(tensor=params, flops=times * head.flops), 0.0))
    return [
        Kind(
            symbol,
            NAMES.get(symbol, symbol),
            count,
            one.params,
            one.flops,
            one.flops * (1 + BACKWARD + (again if recompute else 0)),
        )
        for symbol, count, one, again in rows
    ]


def _times(one: Layer, count: int) -> Layer:
    return Layer(
        one.tensor * count,
        one.whole * count,
        one.experts * count,
        one.flops * count,
    )


def fit(model: HybridModel, args: argparse.Namespace, ep: int) -> HybridFit:
    """Return the fullest stage of a layout that `check_layout` has passed."""
    parallel = ParallelConfig(
        world_size=args.gpus, tp=args.tp, pp=args.pp, cp=args.cp, ep=ep, etp=args.etp
    )
    ranks = ep * args.etp
    dedup = saves_rows(model.sizes.moe_router_topk, ranks)
    if args.dispatch_dedup is not None:
        dedup = args.dispatch_dedup == "on"
    stages = [
        stage_held(model, parallel, stage, args.micro_batch, args.recompute, dedup)
        for stage in range(args.pp)
    ]
    totals = [sum(held.total for held in stage) for stage in stages]
    stage = totals.index(max(totals))
    total = totals[stage] / 1e9
    return HybridFit(
        ep, parallel.edp, stage, tuple(stages[stage]), total, total <= USABLE * args.gpu_gb
    )


def stage_held(
    model: HybridModel,
    parallel: ParallelConfig,
    stage: int,
    micro_batch: int = 1,
    recompute: bool = False,
    dedup: bool = False,
) -> list[Held]:
    """Return what one GPU of a stage holds, kind by kind."""
    params = _stage_params(model, parallel, stage)
    tokens = micro_batch * model.length // (parallel.cp * parallel.tp)
    activations = _stage_activations(model, parallel, stage, tokens, recompute, dedup)
    found = []
    for symbol, (dense, routed) in params.items():
        here = dense + routed
        found.append(
            Held(
                symbol,
                here,
                WEIGHT * here,
                GRADIENT * here,
                ADAM * dense // (parallel.dp * parallel.cp) + ADAM * routed // parallel.edp,
                round(activations.get(symbol, 0.0)),
            )
        )
    return found


def _stages(model: HybridModel, pp: int) -> list[list[list[tuple[str, int]]]]:
    """Return of each stage its segments, of each the layers: (symbol, experts)."""
    numbers = iter(model.experts)
    cut = model.pattern.cut(pp)
    found: list[list[list[tuple[str, int]]]] = [[] for _ in cut]
    for virtual in range(max(map(len, cut))):
        for stage, segments in enumerate(cut):
            found[stage].append([(symbol, next(numbers)) for symbol in segments[virtual]])
    return found


def _stage_params(
    model: HybridModel, parallel: ParallelConfig, stage: int
) -> dict[str, tuple[int, int]]:
    """Return of each kind the parameters of one GPU: outside of experts, and in them."""
    pattern, sizes, tp = model.pattern, model.sizes, parallel.tp
    first, last = stage == 0, stage == parallel.pp - 1
    layers = [each for segment in _stages(model, parallel.pp)[stage] for each in segment]
    if last:
        layers += [(symbol, 0) for symbol in pattern.predicting * pattern.depths]
    found: dict[str, tuple[int, int]] = {}

    def add(kind: str, dense: int, routed: int = 0) -> None:
        before = found.get(kind, (0, 0))
        found[kind] = (before[0] + dense, before[1] + routed)

    if first or (last and pattern.depths):  # prediction embeds the tokens that come
        add(EMBEDDING, embedding(sizes).on_gpu(tp))
    for symbol, experts in layers:
        one = model.layer(symbol, experts)
        routed = one.experts_on_gpu(degree(parallel.ep, experts), parallel.expert_tp)
        add(symbol, one.on_gpu(tp), routed if experts else 0)
    if last:
        if pattern.depths:
            add(PREDICTION, _times(prediction(sizes), pattern.depths).on_gpu(tp))
        shared = sizes.tied and first  # a last stage of its own has a copy
        add(HEAD, sizes.norm + (0 if shared else output(sizes).on_gpu(tp)))
    return found


def _stage_activations(
    model: HybridModel,
    parallel: ParallelConfig,
    stage: int,
    tokens: int,
    recompute: bool,
    dedup: bool,
) -> dict[str, float]:
    """Return the bytes that each kind of layer keeps on one GPU at the peak."""
    pattern, sizes = model.pattern, model.sizes

    def one(symbol: str, experts: int) -> float:
        return tokens * kept(symbol, sizes, experts, parallel.ep, dedup)

    segments = _stages(model, parallel.pp)[stage]
    if stage == parallel.pp - 1:
        behind = [(symbol, 0) for symbol in pattern.predicting * pattern.depths]
        segments = [*segments[:-1], segments[-1] + behind]
    inputs = 2.0 * tokens * sizes.hidden_size
    sums = []
    for segment in segments:
        found: dict[str, float] = defaultdict(float)
        for symbol, experts in segment:
            found[symbol] += inputs if recompute else one(symbol, experts)
        sums.append(found)
    moments = (_summed(chunks, sums) for chunks in in_flight(parallel.pp, len(segments), stage))
    held = max(moments, key=lambda moment: sum(moment.values()))
    if recompute:
        again = max(((one(*each), each[0]) for part in segments for each in part), default=None)
        if again is not None:
            held[again[1]] += again[0]
    if stage == parallel.pp - 1:
        held[HEAD] = tokens * sizes.vocab * LOGIT * (1 + pattern.depths)
        if pattern.depths:  # both norms, what is joined of them, and the last norm
            held[PREDICTION] = 2.0 * tokens * sizes.hidden_size * 6 * pattern.depths
    return held


def _summed(chunks: Sequence[int], sums: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the bytes of each kind, with so many micro-batches of each virtual stage."""
    found: dict[str, float] = defaultdict(float)
    for count, part in zip(chunks, sums, strict=True):
        for kind, size in part.items():
            found[kind] += count * size
    return found


def in_flight(pp: int, virtual: int, stage: int) -> list[list[int]]:
    """Return how many micro-batches of each virtual stage are kept at once, moment by moment.

    1F1B: pp - stage. Interleaved: groups of pp micro-batches go through the virtual stages, first
    to last, and back last to first.
    """
    if virtual == 1:
        return [[pp - stage]]
    ahead = 2 * (pp - stage - 1) + (virtual - 1) * pp + 1
    chunks = [0] * virtual
    for step in range(ahead):
        chunks[step // pp % virtual] += 1
    moments = [list(chunks)]
    for step in range(pp * virtual):
        chunks[virtual - 1 - step // pp % virtual] -= 1
        chunks[(ahead + step) // pp % virtual] += 1
        moments.append(list(chunks))
    return moments
