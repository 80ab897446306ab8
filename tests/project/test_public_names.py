"""Names that users' own options and scripts import: each keeps working, wherever the code lies."""

from importlib import import_module

import pytest

import ep_plugin
from ep_plugin.registry import HOME, available, resolve

NAMES = {
    "ep_plugin": ep_plugin.__all__,
    "ep_plugin.config": ("BackendUnavailable", "ConfigError", "MoEConfig", "RoutingConfig"),
    "ep_plugin.contracts": (
        *("Block", "Dispatched", "Dispatcher", "GroupedGemm", "Packed", "PeerDispatcher"),
        *("Pending", "Router", "Routing", "Schedule", "combine", "dispatch"),
    ),
    "ep_plugin.groups": ("ExpertGroups", "create_expert_groups"),
    "ep_plugin.router.topk": ("TopKRouter", "build"),
    "ep_plugin.overlap.two_batch": ("two_batch",),
    "ep_plugin.errors": ("BackendUnavailable", "ConfigError"),
    "ep_plugin.registry": ("available", "resolve"),
    "ep_plugin.cli": ("main",),
    "ep_plugin.run": ("main",),
    "ep_plugin.model_class": ("choose_model_class",),
    "ep_plugin.megatron": ("install", "uninstall"),
    "ep_plugin.megatron.settings": ("EdgeSettings",),
}


@pytest.mark.parametrize("module", NAMES)
def test_a_public_name_is_there(module: str) -> None:
    for name in NAMES[module]:
        assert getattr(import_module(module), name) is not None, name


@pytest.mark.parametrize("kind", ["router", "dispatcher", "gemm", "overlap"])
def test_an_option_may_be_named_in_full_by_its_public_or_its_real_name(kind: str) -> None:
    name = {"gemm": "loop", "overlap": "serial"}.get(kind, available(kind)[0])
    name = "alltoall" if kind == "dispatcher" else name
    option = resolve(kind, name)
    assert resolve(kind, f"ep_plugin.{kind}.{name}") is option
    assert resolve(kind, f"ep_plugin.{HOME[kind]}.{name}") is option
