"""Each grouped product of a layer's linear maps alone, operands already quantised."""

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from ep_plugin.commands.bench import products
from ep_plugin.commands.bench.case import make_case, relative_error
from ep_plugin.commands.bench.contest import OURS, Contest, peer
from ep_plugin.commands.bench.figures import Row, make_row
from ep_plugin.commands.bench.floors import Precision, Work, product_term
from ep_plugin.commands.bench.measure import Timing
from ep_plugin.commands.bench.products import Problem, Product
from ep_plugin.commands.bench.shapes import Shape

PEERS = ("grouped_mm", "deepgemm", "transformer_engine")
CHECKED = 64  # rows of the first expert whose product is compared with fp32


def measure(contest: Contest, shape: Shape, routing: str) -> Iterator[Row]:
    """Yield a row for each product that is not measured yet."""
    case = make_case(shape, routing, contest.protocol.device)
    for linear in shape.linears:
        problem = products.make_problem(case, linear)
        found = {
            f"{p.backend}/{p.precision}/{p.direction}/{p.gradients}": p
            for p in _products(contest, problem)
            if (p.direction != "wgrad" or p.gradients in contest.gradients)
            and not contest.has(
                bench="gemm",
                shape=shape.name,
                op=f"{linear} {p.direction}",
                routing=routing,
                backend=p.backend,
                precision=p.precision,
                gradients=p.gradients,
            )
        }
        if not found:
            continue
        errors = {name: _error(problem, product) for name, product in found.items()}
        times, gpu = contest.protocol.interleave(
            {name: product.run for name, product in found.items()},
            f"gemm {shape.name} {linear} {routing}",
        )
        for name, product in found.items():
            row = _row(contest, shape, problem, product, times[name], errors[name])
            yield row | {"routing": routing, "gpu": gpu}


def _products(contest: Contest, problem: Problem) -> list[Product]:
    found: list[Product] = []
    for name, precision in contest.entries((OURS, *PEERS)):
        if name == OURS:
            makers = {f"{OURS}+{n}": make for n, make in products.makers(precision).items()}
        else:
            makers = {name: partial(_of_peer, name, precision)}
        for backend, make in makers.items():
            with contest.attempt(backend, precision):
                made = make(problem)
                for product in made:
                    product.run(0)
                found += made
                if not made:
                    contest.note(backend, precision, f"it has no {precision}")
    return found


def _of_peer(name: str, precision: Precision, problem: Problem) -> list[Product]:
    made: list[Product] = peer(name)(problem, precision)
    return made


def _row(
    contest: Contest,
    shape: Shape,
    problem: Problem,
    product: Product,
    time: Timing,
    error: float,
) -> Row:
    inputs, outputs = shape.linears[problem.linear]
    work = Work(shape, product.precision, product.gradients)
    term = product_term(work, problem.linear, product.direction)
    return make_row(
        problem.weight.device,
        time,
        bench="gemm",
        shape=shape.name,
        op=f"{problem.linear} {product.direction}",
        backend=product.backend,
        precision=product.precision,
        gradients=product.gradients,
        switches=product.switches,
        floor_ms=term.bound(contest.rates)[0],
        rates=contest.rates.facts(),
        tflops=2 * shape.rows * inputs * outputs / time.median / 1e9,
        error=error,
    )


def _error(problem: Problem, product: Product) -> float:
    """Return the relative error of a part of the first expert's product against fp32."""
    count = int(problem.ends[0][0])
    rows, grads = problem.rows[0][:count].float(), problem.grads[0][:count].float()
    weight = problem.weight[0].float()
    wanted: dict[str, Tensor] = {
        "forward": rows[:CHECKED] @ weight.T,
        "dgrad": grads[:CHECKED] @ weight,
        "wgrad": grads[:, :CHECKED].T @ rows,
    }
    if product.total is not None:
        product.total.zero_()
    value = product.run(0)
    part = value[0] if product.direction == "wgrad" else value
    return relative_error(part[: len(wanted[product.direction])], wanted[product.direction])
