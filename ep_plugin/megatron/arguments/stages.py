"""How many layers of a GPT each pipeline stage has, by Megatron's flags."""

from importlib import import_module
from typing import Any

LAYOUT = "megatron.core.transformer.pipeline_parallel_layer_layout"


def segments(args: Any) -> list[int] | None:
    """Return the layers of each stage, virtual ones too, in the order of the layers.

    None where the layers cannot be divided like that, which Megatron says itself.
    """
    ranks, layers = args.pipeline_model_parallel_size, args.num_layers
    if args.pipeline_model_parallel_layout:
        return _of_layout(args.pipeline_model_parallel_layout, ranks, layers)
    virtual = _virtual(args, ranks, layers)
    if virtual is None:
        return None
    first, last = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    if first is not None or last is not None:
        return _uneven(first, last, ranks, virtual, layers)
    embedding = int(args.account_for_embedding_in_pipeline_split)
    loss = int(args.account_for_loss_in_pipeline_split)
    each, rest = divmod(layers + embedding + loss, ranks * virtual)
    found = [each] * (ranks * virtual)
    found[0] -= embedding
    found[-1] -= loss
    return None if rest or min(found) < 0 else found


def _virtual(args: Any, ranks: int, layers: int) -> int | None:
    """Return the virtual stages of a rank."""
    if args.num_virtual_stages_per_pipeline_rank is not None:
        return int(args.num_virtual_stages_per_pipeline_rank) or None
    each = args.num_layers_per_virtual_pipeline_stage
    if each is None:
        return 1
    return None if each < 1 or layers % (ranks * each) else layers // ranks // each


def _uneven(
    first: int | None, last: int | None, ranks: int, virtual: int, layers: int
) -> list[int] | None:
    """Return the segments where the first or the last rank has a number of its own."""
    given = [n for n in (first, last) if n is not None]
    others = ranks - len(given)
    left = layers - sum(given)
    if others < 0 or left < 0 or (left % others if others else left):
        return None
    of_ranks = [left // others if others else 0] * others
    of_ranks = [*given[: first is not None], *of_ranks, *given[len(given) - (last is not None) :]]
    if any(n % virtual for n in of_ranks):
        return None
    return [n // virtual for n in of_ranks] * virtual


def _of_layout(layout: str, ranks: int, layers: int) -> list[int] | None:
    """Return the segments of a --pipeline-model-parallel-layout."""
    module = import_module(LAYOUT)
    try:
        parsed = module.PipelineParallelLayerLayout(layout, ranks)
    except (AssertionError, ValueError, KeyError):
        return None
    stages = parsed.layout  # of each rank and virtual stage
    virtual = range(len(stages[0]))
    found = [
        sum(kind.name == "decoder" for kind in rank[place]) for place in virtual for rank in stages
    ]
    return found if sum(found) == layers else None
