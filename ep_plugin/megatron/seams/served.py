"""Refuse models that the plugin does not support: all but decoder-only GPTs and HybridModels.

The script's imports are read before it starts. What they do not show, such as a model defined in
the script, is checked when the model is built: in a run with --num-experts its MoE layers must be
ours, and only ours.
"""

import ast
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.seams.model_family import GPT, HYBRID, family_named, family_of, is_in
from ep_plugin.megatron.seams.patches import Patches
from ep_plugin.megatron.seams.refusal import refuse

SETUP = "megatron.training.training:setup_model_and_optimizer"
RECIPES = ("megatron.bridge", "nemo", "nemo_run")  # configured in Python; no flags are parsed
PAGE = "docs/other-scripts.md"
SERVED = "decoder-only GPTs and HybridModels"


def check_script(tree: ast.Module) -> None:
    """Raise ConfigError if a script imports a model of another family and no GPT."""
    imported = list(imports(tree))
    family = family_named(imported)
    if family is not None and not any(is_in(name, (*GPT, *HYBRID)) for name in imported):
        raise ConfigError(
            f"this is a script of a {family} model, and the plugin serves {SERVED} alone; use "
            "python SCRIPT, without the plugin"
        )


def check_recipe(tree: ast.Module) -> None:
    """Raise ConfigError if a script is a recipe in Python, which parses no Megatron flags."""
    roots = [root for root in RECIPES if any(is_in(name, (root,)) for name in imports(tree))]
    if roots:
        raise ConfigError(
            f"this is a recipe of {roots[0]} without Megatron's command line, where no --ep-* flag "
            "would be read; use ep_plugin.megatron.install(EdgeSettings(...)) in it, before the "
            f"model is built, as {PAGE} shows"
        )


def check_neighbours(script: Path) -> None:
    """Raise ConfigError if a package `megatron` of another project lies beside the script.

    Python would import it before any other. NVIDIA's has a file `core/package_info.py`, by which it
    is recognised.
    """
    package = script.resolve().parent / "megatron"
    core = package / "core" / "package_info.py"
    if (package / "__init__.py").is_file() and not core.is_file():
        raise ConfigError(
            f"the package megatron beside it is another project's (there is no {core}), which "
            "cannot be served; use a script of Megatron-LM"
        )


def imports(tree: ast.Module) -> Iterable[str]:
    """Yield the full name of each module and member a script imports, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def changes(patches: Patches, layer_class: Any) -> None:
    """Patch Megatron to check the model of a run with experts as soon as it is built."""
    checked: list[bool] = []

    def with_check(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        experts = import_module("megatron.training").get_args().num_experts
        if experts is not None and not checked:  # the first model is the trained one
            checked.append(True)
            try:
                check_model(result[0], layer_class, experts)
                check_pattern(result[0], layer_class.pattern)
            except ConfigError as error:
                refuse(error)
        return result

    patches.wrap(
        SETUP,
        with_check,
        "a model that holds none of our blocks, or others, ends the run here",
    )


def check_model(chunks: Any, layer_class: type, experts: int) -> None:
    """Raise ConfigError, on all ranks alike, unless all MoE layers of the model are ours.

    `chunks` are this rank's parts of the model; those of one rank may have only dense layers. Every
    rank must call it.
    """
    theirs = import_module("megatron.core.transformer.moe.moe_layer").BaseMoELayer
    modules = [part for chunk in chunks for part in chunk.modules()]
    ours = sum(isinstance(part, layer_class) for part in modules)
    others = {type(part) for part in modules if isinstance(part, theirs)}
    foreign = {kind for kind in others if not issubclass(kind, layer_class)}
    names = {f"{kind.__module__}.{kind.__name__}" for kind in foreign}
    family = family_of(modules)
    found = _of_all_ranks((ours, names, family))
    for one in (family for *_, family in found if family is not None):
        raise ConfigError(
            f"the script builds a {one} model, and the plugin serves {SERVED} alone; use python "
            "SCRIPT, without the plugin"
        )
    if unknown := sorted({name for _, names, _ in found for name in names}):
        raise ConfigError(
            f"the model has MoE layers of {', '.join(unknown)}, which are not the plugin's; use "
            "ep-plugin run SCRIPT, which is there before the script makes its layer specs"
        )
    if not any(count for count, *_ in found):
        raise ConfigError(
            f"--num-experts ({experts}) is given, and the model that the script builds has no MoE "
            "layer; use Megatron's GPT layer specs in it, as pretrain_gpt.py does"
        )


def check_pattern(chunks: Any, pattern: str | None) -> None:
    """Raise ConfigError where a pattern of a HybridModel was typed and the model is another."""
    if pattern is None:
        return
    parts = (type(part).__module__ for chunk in chunks for part in chunk.modules())
    if not any(is_in(name, HYBRID) for name in parts):
        raise ConfigError(
            f"--hybrid-layer-pattern ({pattern}) is for a HybridModel, and the script builds a "
            "GPT, which does not read it; use pretrain_hybrid.py, or leave it out"
        )


def _of_all_ranks(value: Any) -> list[Any]:
    dist = import_module("torch.distributed")
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
