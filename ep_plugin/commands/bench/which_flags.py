"""Which flags of `ep-plugin bench` act in which bench, and beside which others."""

from ep_plugin.commands.bench import over_ranks, products_alone, rounds, whole_layer
from ep_plugin.commands.bench.contest import OURS
from ep_plugin.commands.bench.floors import PRECISIONS
from ep_plugin.commands.law import Need


def _any_of(names: list[str], wanted: tuple[str, ...]) -> bool:
    """Whether one of `wanted` is among `names`; no name stands for all."""
    return not names or not set(names).isdisjoint(wanted)


def _precisions(recipes: list[str]) -> set[str]:
    return {"bf16" if recipe == "off" else "fp8" for recipe in recipes}


BACKENDS = {  # that take part
    "layer": (OURS, *whole_layer.PEERS),
    "gemm": (OURS, *products_alone.PEERS),
    "kernels": (OURS,),
    "overlap": (OURS, *over_ranks.PEERS),
}
NEEDS = (
    Need(
        "--explain",
        lambda args: args.bench == "layer",
        "--explain is for layer; got {args.bench}; use bench layer --explain",
    ),
    Need(
        "--backends --skip --routing --repeats --warm --resume --output --plot --json --cuda-graph",
        lambda args: not args.explain,
        "{flag} is for a run that measures, and --explain prints the floors alone; use {flag} "
        "without --explain",
    ),
    Need(
        "--gradients",
        lambda args: args.bench != "kernels",
        "--gradients has no choice in bench kernels, which has no weight gradients; use bench "
        "kernels without --gradients",
    ),
    Need(
        "--recipes --dispatchers --trace --trace-plot",
        lambda args: args.bench == "overlap",
        "{flag} is for overlap; got {args.bench}; use bench overlap",
    ),
    Need(
        "--cuda-graph",
        lambda args: args.bench in ("layer", "overlap"),
        "--cuda-graph is for layer and overlap; got {args.bench}; use bench layer",
    ),
    Need(
        "--cuda-graph",
        lambda args: args.bench != "layer" or _any_of(args.backends, rounds.CAPTURABLE),
        "--cuda-graph cannot capture the layers of --backends {args.backends[0]}; use --backends "
        "ep_plugin",
    ),
    Need(
        "--backends",
        lambda args: args.bench != "kernels",
        "--backends has no choice in bench kernels, whose steps are all ep_plugin's; use bench "
        "kernels without --backends",
    ),
    Need(
        "--skip",
        lambda args: args.bench != "kernels" and not (args.bench == "overlap" and args.cuda_graph),
        "--skip has nothing to leave out: bench {args.bench} has ep_plugin alone here; use bench "
        "{args.bench} without --skip",
    ),
    Need(
        "--skip",
        lambda args: not args.backends,
        "--skip leaves backends out of all there are, and --backends names some; use --skip "
        "without --backends",
    ),
    Need(
        "--skip",
        lambda args: args.bench not in BACKENDS or not set(BACKENDS[args.bench]) <= set(args.skip),
        "--skip leaves out all that bench {args.bench} has; use --skip {args.skip[0]}",
    ),
    Need(
        "--cuda-graph",
        lambda args: args.bench != "layer" or not set(rounds.CAPTURABLE) <= set(args.skip),
        "--cuda-graph has nothing to capture: --skip leaves out all that it can; use --cuda-graph "
        "without --skip",
    ),
    Need(
        "--backends",
        lambda args: args.bench != "overlap" or not args.cuda_graph,
        "--backends has no choice beside --cuda-graph, which overlap has for ep_plugin alone; use "
        "--cuda-graph without --backends",
    ),
    Need(
        "--recipes --dispatchers",
        lambda args: _any_of(args.backends, (OURS,)) and OURS not in args.skip,
        "{flag} is for ep_plugin, which is left out; use --backends ep_plugin",
    ),
    Need(
        "--recipes",
        lambda args: _precisions(args.recipes) <= set(args.precision or PRECISIONS),
        "--recipes off is in bf16 and the others are in fp8, and --precision {args.precision[0]} "
        "has not all that are named; use --recipes without --precision",
    ),
    Need(
        "--dispatchers",
        lambda args: not args.cuda_graph or set(args.dispatchers) <= set(over_ranks.CAPTURABLE),
        "--dispatchers {args.dispatchers[0]} cannot be captured by --cuda-graph; use --dispatchers "
        "symm_mem",
    ),
    Need(
        "--resume",
        lambda args: args.output is not None,
        "--resume needs --output, whose rows it keeps; use --output FILE",
    ),
)
