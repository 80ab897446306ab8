"""The least time for the work that a row does, term by term: a roofline.

A term is a product or a step between products. It takes the longer of its arithmetic and its bytes;
terms are added. A tensor that two kernels share is written once in each layout, and read once by
each product or step that needs it. Rates are those of the GPU at hand, measured in the same run
(`measure.rates`); without a GPU those assumed of one H100.

Left out, so that it stays a lower bound: scales of e4m3 values, row numbers, counts and
probabilities; padding; what a layer does again to keep less (our bf16 backward copies tokens to
rows a second time), and reads that a transpose by itself needs.
"""

from dataclasses import dataclass, field
from typing import Literal

from ep_plugin.commands.bench.shapes import Shape

Precision = Literal["bf16", "fp8"]
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8")
Direction = Literal["forward", "dgrad", "wgrad"]
# Weight gradients in bf16 written once, or added to fp32 totals: `main_grad`, as training does.
Gradients = Literal["anew", "added"]
GRADIENTS: tuple[Gradients, ...] = ("anew", "added")
BYTES = {"bf16": 2, "fp32": 4, "e4m3": 1}
STEPS_PER_WEIGHT = 8  # micro-batches of an optimizer step: weights are quantised once


@dataclass(frozen=True)
class Rates:
    """What a device reaches with large buffers and products."""

    bandwidth: float  # bytes per second of a copy, read and written both counted
    bf16: float  # operations per second
    fp8: float
    source: str  # measured on what, or assumed of what

    def facts(self) -> dict[str, float | str]:
        """Return what a row keeps of them."""
        return {
            "copy_tbps": round(self.bandwidth / 1e12, 4),
            "bf16_tflops": round(self.bf16 / 1e12, 1),
            "fp8_tflops": round(self.fp8 / 1e12, 1),
            "source": self.source,
        }


# A copy of a large buffer; cuBLAS under the 700 W limit; grouped products of DeepGEMM on H100, as
# torchao publishes them.
H100 = Rates(3.0e12, 790e12, 1234e12, "assumed of one H100")


@dataclass(frozen=True)
class Tensor:
    """One read or one write of a tensor in memory."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # of BYTES
    written: bool = False

    @property
    def num_bytes(self) -> int:
        values = BYTES[self.dtype]
        for size in self.shape:
            values *= size
        return values


@dataclass(frozen=True)
class Term:
    """A product or a step between products."""

    name: str
    tensors: tuple[Tensor, ...]
    operations: float = 0.0
    precision: Precision = "bf16"  # of the operations
    share: float = 1.0  # of it in a step

    @property
    def num_bytes(self) -> float:
        return self.share * sum(tensor.num_bytes for tensor in self.tensors)

    def bound(self, rates: Rates) -> tuple[float, str]:
        """Return milliseconds, and what they are due to: bytes or operations."""
        moving = self.num_bytes / rates.bandwidth
        computing = self.operations / (rates.bf16 if self.precision == "bf16" else rates.fp8)
        return 1e3 * max(moving, computing), "bytes" if moving >= computing else "operations"


@dataclass(frozen=True)
class Work:
    """What a row does: a layer's forward and backward, from tokens to their gradients."""

    shape: Shape
    precision: Precision
    gradients: Gradients
    ranks: int = 1  # that share the experts; the shape's are one rank's
    weights: float = field(default=1 / STEPS_PER_WEIGHT)  # how often they are quantised in a step


def floor_ms(work: Work, rates: Rates) -> float:
    """Return the milliseconds of all terms."""
    return sum(term.bound(rates)[0] for term in terms(work))


def product_term(work: Work, linear: str, direction: Direction) -> Term:
    """Return one grouped product of `linear` (fc1, fc2), its operands quantised already."""
    (term,) = (t for t in _experts(work) if t.name == f"{linear} {direction}")
    return term


def terms(work: Work) -> list[Term]:
    """Return every term of the layer: routing, experts, and quantising the weights."""
    return [*_routing(work), *_experts(work), *_weights(work)]


def layer_flops(shape: Shape) -> float:
    """Return the experts' operations in forward and backward, 18 * rows * H * F."""
    return 18.0 * shape.rows * shape.hidden * shape.ffn


def _gradient(work: Work, name: str, *shape: int) -> tuple[Tensor, ...]:
    if work.gradients == "anew":
        return (_written(name, "bf16", *shape),)
    return _read(name, "fp32", *shape), _written(name, "fp32", *shape)


def _read(name: str, dtype: str, *shape: int) -> Tensor:
    return Tensor(name, shape, dtype)


def _written(name: str, dtype: str, *shape: int) -> Tensor:
    return Tensor(name, shape, dtype, written=True)


def _routing(work: Work) -> list[Term]:
    """Return the gate's three products and the choice of experts, forward and backward."""
    shape = work.shape
    num, hidden, experts = shape.tokens, shape.hidden, shape.experts * work.ranks
    tokens, router = (
        _read("tokens", "bf16", num, hidden),
        _read("router", "bf16", experts, hidden),
    )
    logits = _read("logits", "fp32", num, experts)
    grads = _read("logits' gradient", "fp32", num, experts)
    operations = 2.0 * num * hidden * experts
    return [
        Term(
            "gate forward",
            (tokens, router, _written("logits", "fp32", num, experts)),
            operations,
        ),
        Term("choice forward", (logits,)),
        Term(
            "choice backward",
            (logits, _written("logits' gradient", "fp32", num, experts)),
        ),
        Term(
            "gate dgrad",
            (
                *(grads, router, _read("tokens' gradient", "bf16", num, hidden)),
                _written("tokens' gradient", "bf16", num, hidden),
            ),
            operations,
        ),
        Term(
            "gate wgrad",
            (grads, tokens, *_gradient(work, "router's gradient", experts, hidden)),
            operations,
        ),
    ]


def _experts(work: Work) -> list[Term]:
    """Return tokens to rows, both linear maps in three directions, activation, rows to tokens."""
    shape, value = work.shape, "bf16" if work.precision == "bf16" else "e4m3"
    num, rows, hidden, ffn = shape.tokens, shape.rows, shape.hidden, shape.ffn
    eight = work.precision == "fp8"

    def turned(name: str, width: int) -> tuple[Tensor, ...]:
        """The same values transposed, as e4m3 weight gradients read them."""
        return (_written(f"{name}, transposed", value, width, rows),) if eight else ()

    def product(linear: str, direction: Direction) -> Term:
        inputs, outputs = shape.linears[linear]
        turns = eight and direction == "dgrad"  # e4m3 products take both operands along their sum
        sides = (inputs, outputs) if turns else (outputs, inputs)
        weight = _read(linear, value, shape.experts, *sides)
        operands: tuple[Tensor, ...]
        if direction == "wgrad":
            sizes = [(width, rows) if eight else (rows, width) for width in (outputs, inputs)]
            operands = (
                *(_read(n, value, *s) for n, s in zip(("left", "right"), sizes, strict=True)),
                *_gradient(work, f"{linear}'s gradient", shape.experts, outputs, inputs),
            )
        else:
            wide = (inputs, outputs) if direction == "forward" else (outputs, inputs)
            operands = (
                *(_read("rows", value, rows, wide[0]), weight),
                _written("product", "bf16", rows, wide[1]),
            )
        operations = 2.0 * rows * inputs * outputs
        return Term(f"{linear} {direction}", operands, operations, work.precision)

    kept = (_written("tokens, kept", value, num, hidden),) if eight else ()
    summed = (
        _read("rows", "bf16", rows, hidden),
        _written("sums", "bf16", num, hidden),
    )
    return [
        Term(
            "tokens to rows",
            (
                *(_read("tokens", "bf16", num, hidden), *kept),
                _written("rows", value, rows, hidden),
            ),
        ),
        product("fc1", "forward"),
        Term(
            "activation",
            (
                _read("pre-activations", "bf16", rows, 2 * ffn),
                _written("activation", value, rows, ffn),
            ),
        ),
        product("fc2", "forward"),
        Term("rows to tokens", summed),
        Term(
            "gradients to rows",
            (
                _read("gradients", "bf16", num, hidden),
                _written("rows", value, rows, hidden),
                *turned("rows", hidden),
            ),
        ),
        product("fc2", "dgrad"),
        Term(
            "activation backward",
            (
                _read("activation's gradient", "bf16", rows, ffn),
                _read("pre-activations", "bf16", rows, 2 * ffn),
                _written("pre-activations' gradient", value, rows, 2 * ffn),
                *turned("pre-activations' gradient", 2 * ffn),
                _written("activation", value, *((ffn, rows) if eight else (rows, ffn))),
            ),
        ),
        product("fc2", "wgrad"),
        product("fc1", "dgrad"),
        Term("gradient rows to tokens", summed),
        *(
            [
                Term(
                    "tokens transposed",
                    (_read("tokens, kept", value, num, hidden), *turned("rows", hidden)),
                )
            ]
            if eight
            else []
        ),
        product("fc1", "wgrad"),
    ]


def _weights(work: Work) -> list[Term]:
    """Return what quantises both weights, each in two layouts; nothing in bf16."""
    if work.precision == "bf16" or not work.weights:
        return []
    tensors: list[Tensor] = []
    for linear, (inputs, outputs) in work.shape.linears.items():
        size = (work.shape.experts, outputs, inputs)
        turned = (work.shape.experts, inputs, outputs)
        tensors += [_read(linear, "bf16", *size), _written(linear, "e4m3", *size)]
        tensors += [_written(f"{linear}, transposed", "e4m3", *turned)]
    return [Term("weights to e4m3", tuple(tensors), share=work.weights)]


def explain(work: Work, rates: Rates) -> str:
    """Return the terms as a table: gigabytes, teraoperations, milliseconds, and what binds."""
    shape = work.shape
    once = f", weights quantised {work.weights:g} times" if work.precision == "fp8" else ""
    lines = [
        f"{shape.name}: {shape.tokens} tokens, top-{shape.topk}, hidden {shape.hidden}, FFN "
        f"{shape.ffn}, {shape.experts} experts; {work.precision}, gradients {work.gradients}{once}",
        f"  {'term':24} {'GB':>9} {'TFLOP':>9} {'ms':>9}",
    ]
    for term in terms(work):
        ms, bound = term.bound(rates)
        lines.append(
            f"  {term.name:24} {term.num_bytes / 1e9:9.4f} {term.operations / 1e12:9.4f} "
            f"{ms:9.4f}  {bound}"
        )
    total = sum(term.num_bytes for term in terms(work))
    lines.append(f"  {'floor':24} {total / 1e9:9.4f} {'':9} {floor_ms(work, rates):9.4f}")
    return "\n".join(lines)


def told(facts: dict[str, float | str]) -> str:
    """Return rates, as `Rates.facts` gives them, for a reader."""
    return (
        f"{facts['copy_tbps']:.2f} TB/s, {facts['bf16_tflops']:.0f} TFLOPS in bf16, "
        f"{facts['fp8_tflops']:.0f} in FP8, {facts['source']}"
    )
