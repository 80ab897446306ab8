"""A teacher beside a student: the bytes it adds to a GPU, and the work it adds to a step.

Assumptions, beside those of memory.py:

- Its weights are bf16, without gradients and optimizer.
- It is asked when the student's logits are there and nothing of the cross entropy is. Its layers
  run one after the other without sequence parallelism, and the largest is what they hold at once.
- Where its TP differs from the student's, a micro-batch's whole logits are gathered.
- The divergence holds what `megatron/distill/kl.py` says, of the student's slice of the logits.
- Work is counted in products: of matrices with tokens, and of attention's scores, half of which
  are masked. Exchanges are not counted, nor what is gathered.
"""

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ep_plugin.commands.numbers import rounded, short_count
from ep_plugin.commands.plan.layers import BACKWARD
from ep_plugin.commands.plan.memory import WEIGHT, kept_in_layer
from ep_plugin.commands.plan.teachers_model import Teacher
from ep_plugin.errors import ConfigError
from ep_plugin.moe.parallel import ParallelConfig, degree
from ep_plugin.presets import Preset, layer_params
from ep_plugin.untrusted import shown

if TYPE_CHECKING:
    from ep_plugin.megatron.distill.teacher_layout import Layout

SOFTMAX = 8  # bytes for each logit that the student's cross entropy takes later: fp32, twice


@dataclass(frozen=True)
class Taught:
    """What a teacher adds on one GPU."""

    tp: int
    ep: int
    etp: int
    dense_params: int
    expert_params: int
    weights: int  # bytes, until the stop
    activations: int  # bytes at the peak, over the student's own
    step: float  # work of a distilled step over that of one without a teacher
    run: float  # the same of all steps

    @property
    def total(self) -> int:
        return self.weights + self.activations


def taught(
    teacher: Teacher, student: Preset, parallel: ParallelConfig, args: argparse.Namespace
) -> Taught:
    """Return what the teacher adds beside a student of this layout; raises ConfigError."""
    length = args.seq_length or student.seq_length
    layout = _layout(teacher, parallel, length, args)
    params = teacher.params
    dense = params.tensor // layout.tp + params.replicated
    shares = ((size, degree(layout.ep, count) * layout.etp) for count, size in teacher.experts)
    routed = sum(size // ranks for size, ranks in shares)
    tokens = args.micro_batch * length
    forward = max(_forward(teacher.preset, parallel, layout), default=0.0) * tokens
    logits = tokens * student.model.vocab
    peak = max(forward, _logits(logits, parallel.tp, layout.tp))
    more = _work(teacher.preset, length) * max(1, parallel.tp // layout.tp)
    passes = 1 + BACKWARD + bool(args.recompute)
    step = 1 + more / (passes * _work(student, length))
    return Taught(
        *(layout.tp, layout.ep, layout.etp, dense, routed),
        weights=(dense + routed) * WEIGHT,
        activations=round(peak),
        step=step,
        run=1 + (step - 1) * args.ep_distill_stop,
    )


def table(rows: list[tuple[int, Taught]], stop: float) -> str:
    """Return a line for each --ep and its teacher."""
    lines = [
        f"{'ep':>4} {'teacher':20} {'dense':>8} {'experts':>8} {'weights GB':>11} "
        f"{'activations GB':>15} {'step':>7} {'run':>7}"
    ]
    for ep, row in rows:
        layout = f"tp={row.tp},ep={row.ep},etp={row.etp}"
        lines.append(
            f"{ep:4} {layout:20} {short_count(row.dense_params):>8} "
            f"{short_count(row.expert_params):>8} {rounded(row.weights / 1e9, 1):>11} "
            f"{rounded(row.activations / 1e9, 1):>15} {row.step:6.2f}x {row.run:6.2f}x"
        )
    lines.append(
        f"until {stop:g} of the run a teacher is in the total above, and a step computes so many "
        "times as much; its activations are those over the student's peak"
    )
    return "\n".join(lines)


def _layout(
    teacher: Teacher, parallel: ParallelConfig, length: int, args: argparse.Namespace
) -> "Layout":
    """Return the teacher's layout, as a run does."""
    from ep_plugin.megatron.distill.fits_student import check_sizes
    from ep_plugin.megatron.distill.teacher_layout import layout_of

    run = argparse.Namespace(
        **{name: getattr(args, name) for name in ("ep_teacher", "ep_teacher_layout")},
        tensor_model_parallel_size=parallel.tp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        world_size=parallel.world_size,
        seq_length=length,
    )
    try:
        layout = layout_of(run)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--tensor-model-parallel-size", "--tp")) from error
    except ValueError as error:
        raise ConfigError(
            f"--ep-teacher-layout must be parallel sizes; got {shown(args.ep_teacher_layout)}; use "
            "--ep-teacher-layout tp=2,ep=2"
        ) from error
    check_sizes(teacher.args, layout, run)
    return layout


def _logits(logits: int, student_tp: int, teacher_tp: int) -> float:
    """Return the bytes that logits and the divergence take over what the cross entropy will."""
    from ep_plugin.megatron.distill.kl import AT_PEAK, KEPT

    ours = logits / student_tp
    gathered = 0.0
    if student_tp != teacher_tp:  # its own slice, and where it has several all slices twice
        gathered = 2.0 * logits / teacher_tp + (4.0 * logits if teacher_tp > 1 else 0.0)
    return max(gathered, (2 + AT_PEAK) * ours, (SOFTMAX + KEPT) * ours) - SOFTMAX * ours


def _forward(preset: Preset, parallel: ParallelConfig, layout: "Layout") -> list[float]:
    """Return the bytes for each token of a micro-batch that each layer holds in its forward."""
    own = ParallelConfig(world_size=parallel.world_size, tp=layout.tp, ep=layout.ep, etp=layout.etp)
    whole = 2.0 * 4 * preset.model.hidden * (1 - 1 / layout.tp)  # inputs and norms of both blocks
    return [
        kept_in_layer(preset, own, experts, dedup=False) / layout.tp + whole
        for experts in preset.model.experts
    ]


def _work(preset: Preset, length: int) -> float:
    """Return the products of one token's forward."""
    model = preset.model
    layers = [layer_params(model, experts, preset.routing.topk) for experts in model.experts]
    query = value = model.head_dim
    if model.latent is not None:
        query, value = model.latent.nope_dim + model.latent.rope_dim, model.latent.value_dim
    scores = length / 2 * model.heads * (query + value)
    return (
        sum(layer.total for layer in layers)
        + len(layers) * scores
        + float(model.vocab * model.hidden)
    )
