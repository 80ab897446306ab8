"""A model that has just got its experts, in the class that it is to have."""

from dataclasses import replace

from ep_plugin.checkpoint.adapt.class_names import ONLY_HYBRID, to_hybrid
from ep_plugin.checkpoint.adapt.model_class import hybrid_args, pairs_of_gpt
from ep_plugin.checkpoint.opened import Opened
from ep_plugin.checkpoint.tensors import NO_EXTRA_STATE, NewObject


def with_experts_as_hybrid(model: Opened, pattern: str | None) -> Opened:
    """Return a GPT that `add_experts` made as a HybridModel. Reads no tensor.

    `pattern` is the HybridModel's; None: the one without cuts. Raises ConfigError for a pattern of
    other layers.
    """
    made = model.upcycled
    assert made is not None, "it has got experts"
    pairs, pattern = pairs_of_gpt(model, pattern)
    spelled = to_hybrid(model, pairs)
    # Where the dense model was a HybridModel, its own names are the older ones.
    first = {new: old for old, new in (model.reclassed.name_map if model.reclassed else ())}
    args = hybrid_args(model.args, pattern)
    content = tuple(replace(entry, name=spelled(entry.name)) for entry in made.content)
    source = model.source
    old = {spelled(name): name for name in source.tensors}
    return replace(
        model,
        args=args,
        source=replace(
            source,
            common=source.common | {"args": args},
            tensors={name: source.tensors[before] for name, before in old.items()},
            read_tensor=lambda name: source.read_tensor(old[name]),
        ),
        origins={
            name: model.origins[before] for name, before in old.items() if before in model.origins
        },
        upcycled=replace(
            made,
            content=(*content, NewObject(ONLY_HYBRID, NO_EXTRA_STATE)),
            common=made.common | {"args": args},
            name_map=tuple((first.get(was, was), spelled(now)) for was, now in made.name_map),
        ),
    )
