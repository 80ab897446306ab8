"""The tables match the installed Megatron, cover what the edge uses, and say what is off."""

import ast
import re
from pathlib import Path

import pytest

import ep_plugin.megatron
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.seams import touchpoints
from ep_plugin.megatron.seams.touchpoints import (
    Touchpoint,
    problems,
    release_for,
    supported,
    table_for,
    verify,
)

pytestmark = pytest.mark.megatron
EDGE = Path(ep_plugin.megatron.__file__).parent
MOE_LAYER = "megatron.core.transformer.moe.moe_layer"
FILES = sorted(file for file in EDGE.rglob("*.py") if file.parent.name != "versions")
# looked for, not relied on
OPTIONAL = {
    "megatron.core.datasets.helpers_cpp",
    "megatron.legacy.model",
    "megatron.bridge",
    "megatron.training.argument_utils",  # makes a GPT's configuration from 0.19 on
    "megatron.core.dist_checkpointing.gpt_checkpoint_interop",  # from 0.19 on, looked for first
    # for vocabularies of tiktoken; it loads transformers, which no run should wait for
    "megatron.core.tokenizers.text.libraries.tiktoken_tokenizer",
}


def test_the_installed_megatron_matches_its_table() -> None:
    table = verify()
    assert problems(table) == []
    assert len({touchpoint.path for touchpoint in table}) == len(table) > 0


@pytest.mark.parametrize(
    ("touchpoint", "problem"),
    [
        (Touchpoint("megatron.core.no_such_module:f"), "No module named 'megatron.core.no_such_"),
        (
            Touchpoint(f"{MOE_LAYER}:MoELayer.no_such_method"),
            "type object 'MoELayer' has no attribute 'no_such_method'",
        ),
        (Touchpoint(f"{MOE_LAYER}:NoSuchLayer"), "has no attribute 'NoSuchLayer'"),
        (
            Touchpoint(f"{MOE_LAYER}:MoELayer.__init__", ("config", "old_name", "older_name")),
            "has no parameter old_name, older_name; it has self, config, submodules, layer_number",
        ),
        (
            Touchpoint("megatron.core.process_groups_config:ProcessGroupCollection", ("ep", "xp")),
            "has no parameter xp; it has ",
        ),
        (Touchpoint("megatron.core:__version__", ("x",)), "has no signature"),
        (
            Touchpoint(f"{MOE_LAYER}:MoELayer", base="megatron.core.transformer.mlp:MLP"),
            "does not derive from megatron.core.transformer.mlp:MLP",
        ),
        (
            Touchpoint(f"{MOE_LAYER}:MoELayer", base="megatron.core.transformer.mlp:NoMLP"),
            "has no attribute 'NoMLP'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mismatch_is_named_with_what_is_there(touchpoint: Touchpoint, problem: str) -> None:
    good = Touchpoint(f"{MOE_LAYER}:MoELayer", ("config",), base=f"{MOE_LAYER}:BaseMoELayer")
    (found,) = problems((good, touchpoint))
    assert found.startswith(touchpoint.path)
    assert problem in found


@pytest.mark.parametrize("version", ["0.19.0", "0.19.2", "0.19.1+0123abc", "0.19.0rc1"])
def test_a_release_finds_its_table(version: str) -> None:
    assert {touchpoint.path for touchpoint in table_for(version)} >= {f"{MOE_LAYER}:MoELayer"}


@pytest.mark.parametrize("version", ["0.9.0", "0.190.0", "1.19.0", "0.1", "unknown"])
def test_a_release_without_a_table_is_refused_with_the_list(version: str) -> None:
    listed = re.escape(", ".join(supported()))
    with pytest.raises(ConfigError, match=f"{version} is none that .*; supported are {listed};"):
        table_for(version)


def test_supported_releases_are_the_files_in_order_of_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "versions").mkdir()
    for name in ("core_0_19", "core_0_9", "core_1_2", "__init__"):
        (tmp_path / "versions" / f"{name}.py").touch()
    monkeypatch.setattr(touchpoints, "__file__", str(tmp_path / "seams" / "touchpoints.py"))
    assert list(supported()) == ["0.9", "0.19", "1.2"]


def test_verify_refuses_with_every_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = (Touchpoint("megatron.core:first"), Touchpoint("megatron.core:second"))
    monkeypatch.setattr(touchpoints, "table_for", lambda version: wrong)
    with pytest.raises(ConfigError, match=r"core:first is not there .*core:second is not there"):
        verify()


def symbols_used(source: str) -> set[tuple[str, str]]:
    """Return (module, name) of all that a file takes from Megatron; name "" for a whole module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron":
            found |= {(str(node.module), alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names if alias.name.startswith("megatron")}
        elif isinstance(node, ast.Constant) and re.fullmatch(r"megatron(\.\w+)+", str(node.value)):
            found.add((str(node.value), ""))
    return found


def test_symbols_used_are_found() -> None:
    source = (
        "from megatron.core import mpu\ndef f():\n    import megatron.training\n"
        "    import_module('megatron.core.utils')\n    return 'megatron is spoken of'\n"
    )
    assert symbols_used(source) == {
        ("megatron.core", "mpu"),
        ("megatron.training", ""),
        ("megatron.core.utils", ""),
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(EDGE)))
def test_all_that_the_edge_uses_is_in_every_table(file: Path) -> None:
    for release in supported():
        check_covered(file, release)


def check_covered(file: Path, release: str) -> None:
    paths = [f"{touchpoint.path}." for touchpoint in table_for(release)]
    hybrid = release_for(release).HYBRID
    for module, name in symbols_used(file.read_text()):
        if module.startswith("megatron.core.models.hybrid") and not hybrid:
            continue  # looked up where a release has it
        whole = f"{module}.{name}".rstrip(".")
        starts = f"{module}:{name}." if name else f"{module}:", f"{whole}:", f"{whole}."
        covered = any(path.startswith(starts) for path in paths)
        assert covered or module in OPTIONAL, f"{release} has no row for {module}:{name}"


@pytest.mark.parametrize("release", supported())
def test_what_a_release_has_of_its_own_is_in_its_table(release: str) -> None:
    losses = release_for(release).losses
    check_covered(Path(losses.__file__), release)
    paths = {touchpoint.path for touchpoint in table_for(release)}
    assert set(losses.WRITERS) <= paths
    assert len(paths) == len(table_for(release))


def test_a_megatron_of_two_installations_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a wheel of 0.16, which has no megatron.training, before a wheel that has one."""
    real = touchpoints._folder
    monkeypatch.setattr(
        touchpoints, "_folder", lambda name: tmp_path if "training" in name else real(name)
    )
    with pytest.raises(ConfigError, match=f"and megatron.training from {tmp_path}; leave one of"):
        verify()


def test_without_megatron_training_its_touch_points_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = verify()
    monkeypatch.setattr(touchpoints, "has_training", lambda: False)
    core = verify()
    assert 0 < len(core) < len(whole)
    assert not any("megatron.training" in touchpoint.path for touchpoint in core)
