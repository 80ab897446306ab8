"""NVIDIA apex, which Megatron uses where it is installed, and the other project of that name."""

from importlib.machinery import PathFinder
from importlib.util import find_spec

_MARKS = ("optimizers", "multi_tensor_apply")  # what Megatron imports from NVIDIA's


def foreign_apex() -> str | None:
    """Return what to do about an `apex` that is not NVIDIA's; None for NVIDIA's or none at all.

    Megatron asks only whether `import apex` works, takes any for NVIDIA's, and fails on its fused
    norm. Nothing of the package is imported here.
    """
    spec = find_spec("apex")
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or [])
    missing = [
        f"apex.{name}" for name in _MARKS if not PathFinder.find_spec(f"apex.{name}", folders)
    ]
    if not missing:
        return None
    where = folders[0] if folders else spec.origin
    return (
        f"the apex in {where} is not NVIDIA's, it has no {' and no '.join(missing)}; Megatron "
        "would take it for NVIDIA's and fail; the PyPI project of that name is a web toolkit: pip "
        "uninstall apex, and build NVIDIA apex from source if wanted (the plugin does not need it)"
    )
