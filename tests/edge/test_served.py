"""Models and scripts that are not served are told from the script, or from the model it builds."""

import ast
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from loop import MODEL, MOE, OURS, SCRIPT
from spawn import run_ranks
from warm import Done, run_script

from ep_plugin.cli import main
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.seams import model_family, served

pytestmark = pytest.mark.megatron
WAYS = (
    "import {0}\n",
    "import {0}.deeper as x\n",
    "from {0} import x\n",
    "from {0}.deeper import (\n    x,\n    y,\n)\n",
    "def provider():\n    from {0} import x\n",
    "try:\n    import {0}\nexcept ImportError:\n    pass\n",
)
MODULES = [(family, name) for family, names in model_family.FAMILIES.items() for name in names]
CALL = "from megatron.training import pretrain\nif __name__ == '__main__':\n    pretrain()\n"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("family", "module"), MODULES, ids=lambda value: value)
def test_each_family_is_told_however_it_is_imported(family: str, module: str, way: str) -> None:
    text = way.format(module)
    with pytest.raises(ConfigError, match="serves decoder-only GPTs and HybridModels") as refused:
        served.check_script(ast.parse(text))
    assert f"a script of a {family} model" in str(refused.value)
    for gpt in (
        model_family.GPT + model_family.HYBRID
    ):  # which of the two it trains is seen when it is built
        served.check_script(ast.parse(text + f"import {gpt}\n"))


@pytest.mark.parametrize("text", ["", "import megatron.core.modelsT5\n", "from . import bert\n"])
def test_other_scripts_are_not_taken_for_them(text: str) -> None:
    served.check_script(ast.parse(text))
    served.check_recipe(ast.parse(text))


def test_the_modules_of_the_families_are_megatrons() -> None:
    """Those that this release does not have are older ones."""
    core = [name for _, name in MODULES if name.startswith("megatron.core.")]
    gone = {name for name in core if importlib.util.find_spec(name) is None}
    assert gone <= {"megatron.core.models.retro"}
    assert len(core) - len(gone) >= 5


@pytest.mark.parametrize("root", served.RECIPES)
def test_a_recipe_without_a_command_line_is_sent_to_the_call(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "recipe.py"
    script.write_text(f"from {root}.training.pretrain import pretrain\nif 1:\n    pretrain()\n")
    assert main(["apply", str(script)]) == 2
    said = capsys.readouterr().err
    assert f"a recipe of {root} without Megatron's command line" in said
    assert "install(EdgeSettings(...))" in said
    assert (Path(__file__).parents[2] / served.PAGE).is_file()


def test_apply_refuses_a_script_of_another_stack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (script := tmp_path / "pretrain_gpt.py").write_text(CALL)
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    assert main(["apply", "--check", str(script)]) == 1  # a folder without code is no package
    (tmp_path / "megatron" / "__init__.py").touch()
    assert main(["apply", str(script)]) == 2
    assert "the package megatron beside it is another project's" in capsys.readouterr().err
    assert script.read_text() == CALL
    (tmp_path / "megatron" / "core" / "package_info.py").touch()
    assert main(["apply", str(script)]) == 0


@pytest.mark.parametrize("family", model_family.FAMILIES)
def test_the_launcher_refuses_a_script_before_it_starts(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (script := tmp_path / "pretrain_it.py").write_text(
        f"import {model_family.FAMILIES[family][0]}\n"
    )
    assert main(["run", str(script), "--num-experts", "8"]) == 2
    assert f"error: this is a script of a {family} model" in capsys.readouterr().err


def models(kinds: tuple[tuple[str, ...], ...]) -> str:
    """Return what is said, on this rank, of a model whose part here is of these kinds."""
    from megatron.core.transformer.moe.moe_layer import BaseMoELayer

    ours = type("Ours", (BaseMoELayer,), {"forward": None, "__module__": "ours"})
    other = type("Other", (BaseMoELayer,), {"forward": None, "__module__": "other"})
    own = type("Own", (ours,), {"__module__": "mine"})
    t5 = type("Any", (torch.nn.Module,), {"__module__": "megatron.core.models.T5.t5_model"})
    classes: dict[str, Any] = {
        **{"ours": ours, "own": own, "other": other, "t5": t5},
        "dense": torch.nn.Identity,
    }
    part = torch.nn.Module()
    for number, kind in enumerate(kinds[torch.distributed.get_rank()]):
        module = classes[kind].__new__(classes[kind])
        torch.nn.Module.__init__(module)
        part.add_module(str(number), module)
    try:
        served.check_model([part], ours, 8)
    except ConfigError as error:
        return str(error)
    return "ok"


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        ((("ours", "dense"), ("ours",)), "ok"),
        ((("own", "dense"), ("dense",)), "ok"),  # a class of the user's, derived from ours
        ((("dense",), ("ours", "ours")), "ok"),  # a pipeline stage without experts
        ((("dense",), ("dense",)), "--num-experts (8) is given, and the model that the script bu"),
        ((("ours", "other"), ("ours",)), "the model has MoE layers of other.Other, which are not"),
        ((("dense",), ("other",)), "the model has MoE layers of other.Other, which are not"),
        ((("dense",), ("t5", "dense")), "the script builds a T5 model, and the plugin serves"),
    ],
)
def test_a_model_is_judged_by_all_its_parts_alike_on_every_rank(
    kinds: tuple[tuple[str, ...], ...], said: str
) -> None:
    first, second = run_ranks(2, models, kinds)
    assert first == second
    assert first.startswith(said)


def start(script: Path, *flags: str) -> Done:
    gpt = {**os.environ, "MODEL_CLASS": "gpt"}
    return run_script(1, [*OURS, str(script), *flags], gpt)


HIDES = """
import runpy
from megatron.core.models.gpt import gpt_layer_specs as specs
original = specs.get_mlp_module_spec_for_backend
def dense(*args, num_experts=None, **settings):
    return original(*args, **settings)
specs.get_mlp_module_spec_for_backend = dense
runpy.run_path({script!r}, run_name="__main__")
"""


def test_a_script_that_builds_no_experts_ends_before_its_first_step(tmp_path: Path) -> None:
    (script := tmp_path / "hides.py").write_text(HIDES.format(script=SCRIPT))
    done = start(script, *MODEL, *MOE, "--train-iters", "1")
    assert done.returncode == 2, done.stderr
    assert "error: --num-experts (4) is given, and the model that the script" in done.stderr
    done = start(script, *MODEL, "--train-iters", "1")
    assert done.returncode == 0, done.stderr
    assert "no MoE layer was built" not in done.stdout


def test_a_script_that_does_nothing_here_is_told_where_the_call_belongs(tmp_path: Path) -> None:
    (script := tmp_path / "starts_workers.py").write_text("import sys\nsys.exit(0)\n")
    done = start(script)
    assert done.returncode == 0
    assert "no MoE layer was built in this process" in done.stdout
    assert served.PAGE in done.stdout
