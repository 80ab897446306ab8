"""What Megatron's flags put into CUDA graphs: whole iterations, whole layers, or parts of them."""

from typing import Any


def captures_blocks(config: Any) -> bool:
    """Whether a TransformerConfig, or arguments, put our blocks into CUDA graphs."""
    return _captures_iteration(config) or captures_layers(config)


def captures_layers(config: Any) -> bool:
    """Whether a TransformerConfig, or arguments, put whole layers into graphs of their own."""
    old = getattr(config, "external_cuda_graph", False)  # until Megatron has translated it
    impl = "transformer_engine" if old else getattr(config, "cuda_graph_impl", None)
    return impl == "transformer_engine" and not modules(config)


def _captures_iteration(config: Any) -> bool:
    impl = getattr(config, "cuda_graph_impl", None) or "none"
    return impl == "full_iteration" or (impl != "none" and "full_iteration" in modules(config))


def modules(config: Any) -> list[str]:
    """Return the names of the parts of a layer that are asked for; none: all of it."""
    fields = ("cuda_graph_modules", "cuda_graph_scope", "cuda_graph_scope_deprecated")
    asked = next(filter(None, (getattr(config, field, None) for field in fields)), None)
    several = asked if isinstance(asked, list | tuple) else [asked] if asked else []
    names = [str(getattr(each, "name", each)) for each in several]
    return [name for name in names if name != "full"]  # Megatron's older word for no name
