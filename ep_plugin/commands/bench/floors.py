"""The least time one H100 needs: a roofline of what it reaches, not of its data sheet.

Assumed: HBM moves 3.0 TB/s (a copy of a large buffer), tensor cores do 790 TFLOPS in bf16 under the
700 W limit and 1234 in e4m3 (grouped products of DeepGEMM on H100, as torchao publishes them). A
product takes the longer of its arithmetic and its bytes; steps between products take their bytes.
e4m3 values carry a scale of 4 bytes for each 128. Weights are quantised already. On another device
the figures are still the H100's.
"""

from typing import Literal

from ep_plugin.commands.bench.shapes import Shape

Precision = Literal["bf16", "fp8"]
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8")
Direction = Literal["forward", "dgrad", "wgrad"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "dgrad", "wgrad")
BANDWIDTH = 3.0e12  # bytes per second
FLOPS = {"bf16": 790e12, "fp8": 1234e12}  # per second
VALUE_BYTES = {"bf16": 2.0, "fp8": 1 + 4 / 128}
BF16_GRADIENT, FP32_ACCUMULATED = 2, 8  # bytes per parameter: written; read and written


def product_floor(
    shape: Shape,
    linear: str,
    precision: Precision,
    direction: Direction,
    grad_bytes: int = BF16_GRADIENT,
) -> float:
    """Return milliseconds for one grouped product of `linear` (fc1, fc2), bf16 out.

    Its 2 * rows * in * out operations, or operands read once and the result written once.
    """
    (inputs, outputs), rows = shape.linears[linear], shape.rows
    value, parameters = VALUE_BYTES[precision], shape.experts * inputs * outputs
    weight_bytes = parameters * (2 if precision == "bf16" else 1)
    moved = {
        "forward": rows * inputs * value + weight_bytes + rows * outputs * 2,
        "dgrad": rows * outputs * value + weight_bytes + rows * inputs * 2,
        "wgrad": rows * (inputs + outputs) * value + parameters * grad_bytes,
    }[direction]
    arithmetic = 2 * rows * inputs * outputs / FLOPS[precision]
    return 1e3 * max(arithmetic, moved / BANDWIDTH)


def between_floor(shape: Shape, precision: Precision) -> float:
    """Return milliseconds for what is between the products, forward and backward.

    bf16: rows are gathered and summed twice (T x H and T*K x H each time); SwiGLU moves 3 T*K x F,
    its backward 6 (gradient and pre-activation in; their gradients and the activation out).
    e4m3: each row of the tokens and of the incoming gradient is written in two layouts and each
    output and input gradient read in bf16, 8.1 T*K x H bytes; SwiGLU reads bf16 and writes two
    layouts, its backward reads a bf16 gradient and an e4m3 pre-activation and writes e4m3, 12.2
    T*K x F bytes. Tokens themselves, at most a few percent, are left out: it stays a lower bound.
    """
    token, model, ffn = (
        shape.tokens * shape.hidden,
        shape.rows * shape.hidden,
        shape.rows * shape.ffn,
    )
    if precision == "bf16":
        moved = 2.0 * (4 * (token + model) + 9 * ffn)
    else:
        value = VALUE_BYTES["fp8"]
        moved = (4 * value + 4) * model + (4 + 2 * value + 2 + 4 * value) * ffn
    return 1e3 * moved / BANDWIDTH


def layer_floor(shape: Shape, precision: Precision) -> float:
    """Return milliseconds of forward and backward, weight gradients added to fp32 ones."""
    products = sum(
        product_floor(shape, linear, precision, direction, FP32_ACCUMULATED)
        for linear in shape.linears
        for direction in DIRECTIONS
    )
    return products + between_floor(shape, precision)


def layer_flops(shape: Shape) -> float:
    """Return the experts' operations in forward and backward, 18 * rows * H * F."""
    return 18.0 * shape.rows * shape.hidden * shape.ffn
