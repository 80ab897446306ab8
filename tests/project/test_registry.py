"""Options are the files of a folder; unknown and unavailable names say what to use instead."""

import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest

from ep_plugin.errors import BackendUnavailable, ConfigError
from ep_plugin.registry import HOME, available, resolve


def test_options_are_the_files_of_the_folder() -> None:
    assert set(available("dispatcher")) >= {"alltoall", "local"}
    assert not [name for name in available("dispatcher") if name.startswith("_")]


KINDS = ("router", "dispatcher", "gemm", "overlap")
OPTIONS = [(kind, name) for kind in KINDS for name in available(kind)]
OPTIONAL = {  # and the package each needs
    "te": "transformer_engine",
    "deepgemm": "deep_gemm",
    "deepep": "deep_ep",
}


@pytest.mark.parametrize(("kind", "name"), OPTIONS)
def test_every_option_builds_or_names_its_package(kind: str, name: str) -> None:
    if find_spec(OPTIONAL.get(name, "torch")) is None:
        with pytest.raises(BackendUnavailable, match=OPTIONAL[name]):
            resolve(kind, name)
    else:
        assert callable(resolve(kind, name))


def test_unknown_name_lists_the_legal_ones() -> None:
    with pytest.raises(
        ConfigError,
        match="unknown gemm 'fast'; choose from deepgemm, loop, te, torch_grouped, triton",
    ):
        resolve("gemm", "fast")


def test_a_dotted_name_is_the_users_own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("users.router")
    module.build = lambda: "built"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "users", types.ModuleType("users"))
    monkeypatch.setitem(sys.modules, "users.router", module)
    assert resolve("router", "users.router")() == "built"


def test_one_of_ours_may_be_named_in_full() -> None:
    name = "ep_plugin.dispatcher.alltoall"
    assert resolve("dispatcher", name) is resolve("dispatcher", "alltoall")


def test_every_choice_is_a_folder() -> None:
    assert all(available(kind) for kind in HOME)


def test_a_missing_package_is_named() -> None:
    with pytest.raises(BackendUnavailable, match="No module named 'no_such_package'"):
        resolve("router", "no_such_package.router")


def test_a_package_that_does_not_load_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As one whose library was built for another torch."""
    (tmp_path / "broken_router.py").write_text(
        "import ctypes\nctypes.CDLL('/no/such/library.so')\n"
    )
    (tmp_path / "users_router").mkdir()
    (tmp_path / "users_router" / "__init__.py").write_text("")
    (tmp_path / "users_router" / "router.py").write_text("import broken_router\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BackendUnavailable, match=r"does not load .*library\.so"):
        resolve("router", "users_router.router")


def test_a_fork_that_refuses_our_products_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module_of_tvm = type("Module", (), {"__module__": "tvm_ffi.module"})
    fork = types.ModuleType("deep_gemm")
    fork._C = module_of_tvm()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deep_gemm", fork)
    monkeypatch.delitem(sys.modules, "ep_plugin.moe.experts.gemm.deepgemm", raising=False)
    with pytest.raises(BackendUnavailable, match=r"is sgl-deep-gemm, .* use DeepGEMM"):
        resolve("gemm", "deepgemm")
