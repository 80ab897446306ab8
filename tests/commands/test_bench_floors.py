"""Floors: each term worked out by hand, and held against the tensors that a layer really makes."""

from collections import Counter
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ep_plugin.commands.bench import floors
from ep_plugin.commands.bench.accumulate import total_of, train_step
from ep_plugin.commands.bench.case import Case, make_case
from ep_plugin.commands.bench.floors import (
    BYTES,
    GRADIENTS,
    H100,
    PRECISIONS,
    Gradients,
    Precision,
    Rates,
    Work,
    floor_ms,
    product_term,
    terms,
)
from ep_plugin.commands.bench.ours import as_contender, make_layer
from ep_plugin.commands.bench.shapes import SHAPES, Shape
from ep_plugin.moe.experts.fp8.rowwise import Rowwise, prepare
from ep_plugin.moe.experts.fused import Bf16, FusedExperts, Keep
from ep_plugin.moe.experts.gemm.torch_grouped import TorchGroupedGemm
from ep_plugin.moe.groups import ExpertGroups
from ep_plugin.moe.kernels.types import TILE
from ep_plugin.moe.rows import ExpertRows, count_choices, expert_rows

CPU = torch.device("cpu")
TINY = SHAPES["tiny"]
EVEN = Shape("even", tokens=256, topk=2, hidden=64, ffn=96, experts=4)
ROWS = EVEN.rows


def by_hand(shape: Shape, precision: Precision, added: bool) -> float:
    """Milliseconds on the assumed H100, from sizes alone."""
    t, m, h, f, e = (
        np.float64(n)
        for n in (shape.tokens, shape.tokens * shape.topk, shape.hidden, shape.ffn, shape.experts)
    )
    copy, fast = 3.0e12, 790e12 if precision == "bf16" else 1234e12
    per_parameter = 8 if added else 2  # fp32 read and written; bf16 written
    v = 2 if precision == "bf16" else 1  # bytes of an operand's value
    layouts = 1 if precision == "bf16" else 2  # in which an operand of two products is written
    products = 0.0
    for a, b in ((h, 2 * f), (f, h)):
        for moved in (
            m * a * v + e * a * b * v + m * b * 2,
            m * b * v + e * a * b * v + m * a * 2,
            m * (a + b) * v + e * a * b * per_parameter,
        ):
            products += max(2 * m * a * b / fast, moved / copy)
    between = 2 * t * h + v * m * h  # tokens to rows
    between += 2 * 2 * f * m + v * m * f  # activation
    between += 2 * (2 * m * h + 2 * t * h)  # rows to tokens, both ways
    between += 2 * t * h + layouts * v * m * h  # gradients to rows
    between += 2 * m * f + 2 * m * 2 * f + layouts * v * m * 2 * f + v * m * f  # its derivative
    if precision == "fp8":
        between += t * h + t * h + m * h  # tokens are kept; transposed for fc1's gradient
        between += (2 + 1 + 1) * e * 3 * h * f / 8  # weights in two layouts, every eighth step
    logits, router = 4 * t * e, e * h
    gate = [
        2 * t * h + 2 * router + logits,
        logits + 2 * router + 4 * t * h,
        logits + 2 * t * h + per_parameter * router,
    ]
    routing = sum(max(2 * t * h * e / 790e12, moved / copy) for moved in gate)
    return float(1e3 * (products + between / copy + routing + 3 * logits / copy))


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["dsv3", "q3-30b", "mixtral-256", "gpt-oss-120b"])
def test_floors_are_those_worked_out_by_hand(name: str, precision: Precision, added: bool) -> None:
    work = Work(SHAPES[name], precision, "added" if added else "anew")
    assert floor_ms(work, H100) == pytest.approx(by_hand(SHAPES[name], precision, added), rel=1e-9)


def test_the_documents_have_these_floors() -> None:
    text = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    section = text.partition("<!-- rows: floors -->")[2].partition("<!-- end of rows -->")[0]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if " / " in line]
    found = {name: pairs for name, *pairs in cells[1:]}
    assert found == {
        name: [
            " / ".join(f"{floor_ms(Work(shape, p, g), H100):.2f}" for p in PRECISIONS)
            for g in GRADIENTS
        ]
        for name, shape in SHAPES.items()
        if name != "tiny"
    }
    layer = text.partition("## One layer on one GPU")[2].partition("Kept for")[0]
    layer = layer.partition("NVIDIA H100 80GB HBM3")[2].partition("NVIDIA H200")[0]
    assert "| dsv3 |" in layer  # rows without rates of their own, which stand on those assumed
    for name, anew in ((name, pairs[0].split(" / ")) for name, pairs in found.items()):
        row = next((line for line in layer.splitlines() if line.startswith(f"| {name} |")), None)
        if row is not None:
            assert row.endswith(f"| {float(anew[0]):.1f} / {float(anew[1]):.1f} |")


@given(
    st.builds(
        Shape,
        st.just("drawn"),
        st.integers(1, 9000),
        st.integers(1, 8),
        st.integers(1, 4096),
        st.integers(1, 4096),
        st.integers(8, 256),
    ),
    st.sampled_from(PRECISIONS),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(shape: Shape, precision: Precision) -> None:
    anew, added = (floor_ms(Work(shape, precision, g), H100) for g in GRADIENTS)
    assert anew == pytest.approx(by_hand(shape, precision, False), rel=1e-9)
    assert added == pytest.approx(by_hand(shape, precision, True), rel=1e-9)
    fast = Rates(2 * H100.bandwidth, 2 * H100.bf16, 2 * H100.fp8, "")
    assert floor_ms(Work(shape, precision, "anew"), fast) == pytest.approx(anew / 2)
    more = floor_ms(Work(shape, precision, "anew", weights=1.0), H100)
    assert more > anew if precision == "fp8" else more == anew
    assert floor_ms(Work(shape, precision, "anew", ranks=2), H100) > anew  # a wider gate


@dataclass
class Recorder:
    """Kernels that note what they are given and return, by their step in `STEPS`."""

    ops: Any
    seen: list[tuple[str, list[Tensor], list[Tensor]]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.ops, name)
        if not callable(function):
            return function

        def call(*args: Any) -> Any:
            made = function(*args)
            self.seen.append((name, tensors(args), tensors(made)))
            return made

        return call


def tensors(value: Any) -> list[Tensor]:
    """Every tensor of bf16, e4m3 or fp32 totals; no scales, row numbers, probabilities."""
    if isinstance(value, Tensor):
        least = 3 if value.dtype == torch.float32 else 2  # probabilities are fp32 [N, C]
        return [value] if value.dim() >= least and value.dtype in DTYPES else []
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in tensors(part)]
    if is_dataclass(value):
        return tensors([getattr(value, f.name) for f in fields(value) if f.name != "scale"])
    return []


DTYPES = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "e4m3", torch.float32: "fp32"}
Size = tuple[tuple[int, ...], str]


def size(tensor: Tensor) -> Size:
    """Shape and dtype; of columns without room for tiles that an uneven load would take."""
    shape = tuple(ROWS if n == ROWS + EVEN.experts * TILE else n for n in tensor.shape)
    return shape, DTYPES[tensor.dtype]


def experts_step(case: Case, precision: Precision, added: bool) -> Recorder:
    """Run the experts forward and backward on the twins, and return what they moved."""
    shape, ids = case.shape, case.choices[0].int()
    rows: ExpertRows = expert_rows(ids, count_choices(ids, shape.experts), "swiglu")
    recorder = Recorder(rows.ops)
    gemm: Any = Recorder(TorchGroupedGemm())
    gemm.seen = recorder.seen
    rows.__dict__["ops"] = recorder
    weights = [w.detach().requires_grad_() for w in (case.fc1, case.fc2)]
    recipe: Any = Bf16(rows, gemm)
    if precision == "fp8":
        recipe = Rowwise(rows, gemm, prepare(case.fc1, case.fc2), wgrad8=True)
    totals = [torch.zeros_like(w, dtype=torch.float32) for w in weights]

    class Totals:
        def take(self) -> tuple[Tensor, Tensor]:
            return totals[0], totals[1]

    tokens = case.tokens[0].detach().requires_grad_()
    probs = torch.full(ids.shape, 0.5, requires_grad=True)
    output = FusedExperts.apply(
        tokens, probs, *weights, recipe, Keep("bf16"), Totals() if added else None, None
    )
    torch.autograd.backward(output, case.grads[0])
    return recorder


# Calls in the order in which they are made, and the term of each; None: work that a floor leaves
# out, as its doc says. Beside a term, the reads that it does not count.
BF16_CALLS = [
    *(("spread_rows", "tokens to rows"), ("forward", "fc1 forward"), ("activate", "activation")),
    *(("forward", "fc2 forward"), ("sum_rows", "rows to tokens")),
    *(("spread_rows", "gradients to rows"), ("dgrad", "fc2 dgrad")),
    *(("activate_backward", "activation backward"), ("wgrad", "fc2 wgrad")),
    *(("dgrad", "fc1 dgrad"), ("sum_rows", "gradient rows to tokens"), ("spread_rows", None)),
    ("wgrad", "fc1 wgrad"),
]
FP8_CALLS = [
    *(("quantize_rows", "tokens to rows"), ("spread_rows8", "tokens to rows")),
    *(("multiply", "fc1 forward"), ("activate", "activation"), ("multiply", "fc2 forward")),
    *(("sum_rows", "rows to tokens"), ("quantize_rows", "gradients to rows")),
    *(("spread_rows8", "gradients to rows"), ("multiply", "fc2 dgrad")),
    *(("activate_backward", "activation backward"), ("transpose_rows", "gradients to rows")),
    *(("transpose_rows", "activation backward"), ("multiply_columns", "fc2 wgrad")),
    *(("multiply", "fc1 dgrad"), ("sum_rows", "gradient rows to tokens")),
    *(("transpose_rows", "activation backward"), ("transpose_rows", "tokens transposed")),
    ("multiply_columns", "fc1 wgrad"),
]
ADDS = {"wgrad": "add_wgrad", "multiply_columns": "add_wgrad8"}


def expected_calls(precision: Precision, added: bool) -> list[tuple[str, str | None]]:
    calls = BF16_CALLS if precision == "bf16" else FP8_CALLS
    return [(ADDS.get(name, name) if added else name, term) for name, term in calls]


def even(shape: Shape) -> Case:
    """Each expert has 128 rows, so that no column is padding."""
    case = make_case(shape, "balanced", CPU)
    choice = torch.arange(shape.rows).view(shape.tokens, shape.topk) % shape.experts
    return replace(case, choices=(choice,) * 3)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_terms_are_the_tensors_that_are_made(precision: Precision, added: bool) -> None:
    shape = EVEN
    seen = experts_step(even(shape), precision, added).seen
    calls = expected_calls(precision, added)
    assert [name for name, _, _ in seen if name != "plan_tiles"] == [name for name, _ in calls]
    seen = [call for call in seen if call[0] != "plan_tiles"]
    work = Work(shape, precision, "added" if added else "anew")
    counted = {term.name: term for term in terms(work)}
    for name in dict.fromkeys(term for _, term in calls if term):
        mine = [call for call, (_, term) in zip(seen, calls, strict=True) if term == name]
        wanted = {
            written: Counter(
                (t.shape, t.dtype) for t in counted[name].tensors if t.written == written
            )
            for written in (False, True)
        }
        written = Counter(size(tensor) for _, _, made in mine for tensor in made)
        read = Counter(size(tensor) for _, given, _ in mine for tensor in given)
        if mine[0][0].startswith("add_"):  # totals are an operand, and the result
            written = Counter({s: n for s, n in read.items() if s[1] == "fp32"})
        if precision == "fp8":  # a pass of its own over what was quantised is not counted
            between = Counter(
                {((256, 64), "e4m3"): 2, ((512, 96), "e4m3"): 1, ((512, 192), "e4m3"): 1}
            )
            alone = name in ("tokens to rows", "gradients to rows", "activation backward")
            passes = read & between if alone else Counter()
            read -= passes
            if name == "gradients to rows":
                written -= Counter({((256, 64), "e4m3"): 1})
            if name == "activation backward":  # row-major for its transpose alone
                written -= Counter({((512, 96), "e4m3"): 1})
        assert read == wanted[False], name
        assert written == wanted[True], name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_term_of_the_experts_is_without_a_call(precision: Precision) -> None:
    named = {term for _, term in expected_calls(precision, False) if term}
    routing = {"gate forward", "gate dgrad", "gate wgrad", "choice forward", "choice backward"}
    of_all = {term.name for term in terms(Work(TINY, precision, "anew"))}
    assert of_all - routing - {"weights to e4m3"} == named


def test_terms_of_the_weights_are_what_quantising_makes() -> None:
    made = prepare(*(torch.zeros(n) for n in ((4, 256, 128), (4, 128, 128))))
    (term,) = (t for t in terms(Work(TINY, "fp8", "anew")) if t.name == "weights to e4m3")
    written = Counter((t.shape, t.dtype) for t in term.tensors if t.written)
    assert written == Counter(map(size, tensors(made)))
    assert term.share == 1 / 8


def test_a_product_alone_has_the_layer_s_term() -> None:
    work = Work(TINY, "bf16", "added")
    term = product_term(work, "fc2", "wgrad")
    parameters, operands = 4 * 128 * 128, 128 * (128 + 128)
    assert term.num_bytes == parameters * 8 + operands * 2
    assert term.operations == 2 * 128 * 128 * 128
    assert BYTES[term.tensors[0].dtype] == 2


@pytest.mark.parametrize("fp8", ["off", "rowwise"])
def test_added_gradients_are_those_made_anew(fp8: str) -> None:
    """Two steps add what one makes, twice; no parameter keeps a gradient."""
    case = make_case(TINY, "balanced", CPU)
    layer = make_layer(case, ExpertGroups(), fp8=fp8, save="fp8")
    precision: Precision = "bf16" if fp8 == "off" else "fp8"
    contender = as_contender(layer, "ep_plugin", precision)
    torch.autograd.backward(contender.forward(case.tokens[0]), case.grads[0])
    wanted = [p.grad for p in contender.parameters]
    assert all(grad is not None for grad in wanted)
    step = train_step(case, contender, "added")
    for parameter in contender.parameters:
        parameter.grad = None
    for _ in range(2):
        step(0)
    for parameter, grad in zip(contender.parameters, wanted, strict=True):
        assert parameter.grad is None
        assert grad is not None
        error = (total_of(parameter) - 2 * grad.float()).norm() / (2 * grad.float()).norm()
        assert error < 0.01
    totals = [total_of(p).clone() for p in contender.parameters]
    train_step(case, contender, "anew")(0)
    assert all(
        torch.equal(total_of(p), t) for p, t in zip(contender.parameters, totals, strict=True)
    )


@pytest.mark.parametrize("gradients", GRADIENTS)
def test_explained_terms_add_up(gradients: Gradients) -> None:
    work = Work(SHAPES["q3-30b"], "fp8", gradients)
    lines = floors.explain(work, H100).splitlines()[2:]
    parts = [float(line.split()[-2]) for line in lines[:-1]]
    assert sum(parts) == pytest.approx(float(lines[-1].split()[-1]), abs=2e-3)
    assert len(parts) == len(terms(work))
