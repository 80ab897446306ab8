"""Optimizers that step matrices train stacks of experts as Megatron trains its own experts."""

import argparse
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from loop import MOE, NEWEST, OURS, STOCK, launch, train
from spawn import run_ranks
from stored import healthy, write
from torch import Tensor, nn

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments import optimizers
from ep_plugin.megatron.arguments.optimizers import check_optimizer
from ep_plugin.megatron.arguments.theirs import BY_FIELD
from ep_plugin.megatron.seams import matrices, touchpoints
from ep_plugin.megatron.seams.patches import Patches

muon_utils = pytest.importorskip(
    "emerging_optimizers.orthogonalized_optimizers.muon_utils",
    reason="needs the package of Megatron's Muon: pip install 'emerging-optimizers>=0.3'",
)
pytestmark = pytest.mark.megatron
SHAPES = ((3, 6, 4), (3, 4, 6), (1, 5, 5))  # [e, out, in]
MODES = ("blockwise", "duplicated", "distributed")
FP32 = ("--muon-fp32-matmul-prec", "high")  # without it the iteration is in bf16
EP2 = ("--expert-model-parallel-size", "2")


def patched() -> tuple[Any, Patches]:
    """Return Megatron's Muon, changed as by `install`, and what takes the change back."""
    release, patches = touchpoints.release_for(touchpoints.installed_version()), Patches()
    release.muon.changes(patches)
    patches.apply()
    muon, _ = touchpoints.find_owner(release.muon.ORTHOGONALIZE)
    return muon, patches


@pytest.fixture
def muon() -> Iterator[Any]:
    kind, patches = patched()
    yield kind
    patches.undo()


def made(kind: Any, parameters: list[Any], **settings: Any) -> Any:
    """Return an optimizer, by the names that its release has."""
    older = {"momentum": "momentum_beta", "nesterov": "use_nesterov", "tp_mode": "mode"}
    known = inspect.signature(kind.__init__).parameters
    named = {n if n in known else older[n]: value for n, value in settings.items()}
    return kind(parameters, lr=0.1, fp32_matmul_prec="highest", **named)


def stepped(kind: Any, weights: list[Tensor], gradients: list[Tensor], **settings: Any) -> Tensor:
    """Return parameters [N, ...] after a step for each gradient, all N by one optimizer."""
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    optimizer = made(kind, parameters, **settings)
    for gradient in gradients:
        for parameter, part in zip(parameters, gradient, strict=True):
            parameter.grad = part.clone()
        optimizer.step()
    return torch.stack([parameter.detach() for parameter in parameters])


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def singular_values(matrix: Tensor) -> Tensor:
    """Return `matrix` [..., out, in] in float64 with its singular values as after five steps.

    Keller Jordan's coefficients, https://kellerjordan.github.io/posts/muon/.
    """
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ torch.diag_embed(values) @ right


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("scale", "factor"),
    [
        ("spectral", lambda out, into: max(out, into) ** 0.5),
        ("unit_rms_norm", lambda out, into: (out / into) ** 0.5),
        ("shape_scaling", lambda out, into: max(1, out / into) ** 0.5),
    ],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_are_those_of_muon_in_float64(
    muon: Any, shape: tuple[int, int, int], scale: str, factor: Any, nesterov: bool
) -> None:
    weight, gradients = draw(*shape), draw(3, *shape).unbind(0)
    settings = {"momentum": 0.9, "weight_decay": 0.05, "coefficient_type": "simple"}
    found = stepped(
        *(muon, [weight], [gradient[None] for gradient in gradients]),
        **settings, nesterov=nesterov, scale_mode=scale, extra_scale_factor=0.5,
    )  # fmt: skip
    expected, momentum = weight.double(), torch.zeros(shape, dtype=torch.float64)
    for gradient in gradients:
        momentum = 0.9 * momentum + 0.1 * gradient
        update = 0.1 * gradient + 0.9 * momentum if nesterov else momentum
        step = 0.5 * factor(*shape[1:]) * singular_values(update)
        expected = expected * (1 - 0.1 * 0.05) - 0.1 * step
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [k for k in get_args(muon_utils.NSCoeffT) if k != "custom"])
@pytest.mark.parametrize("how", ["at once", "in parts", "one by one"])
def test_a_stack_is_stepped_as_its_matrices(
    muon: Any, monkeypatch: pytest.MonkeyPatch, kind: str, how: str
) -> None:
    """Whatever the coefficients, with more steps than there are sets of them."""
    if how == "in parts":
        monkeypatch.setattr(matrices, "ELEMENTS", 2 * 4 * 6)
    if how == "one by one":  # as before emerging-optimizers 0.3
        monkeypatch.setattr(matrices, "package_version", lambda: (0, 2))
    settings = {"coefficient_type": kind, "num_ns_steps": 9}
    weight, gradients = draw(5, 4, 6), draw(2, 5, 4, 6).unbind(0)
    stack = stepped(muon, [weight], [gradient[None] for gradient in gradients], **settings)
    alone = stepped(muon, list(weight), list(gradients), **settings)
    torch.testing.assert_close(stack[0], alone, rtol=1e-5, atol=2e-5)


def over_two_ranks() -> list[tuple[str, Tensor, Tensor]]:
    """Return (case, our part of a stack, Megatron's of each of its matrices) after two steps."""
    muon, patches = patched()
    groups = SimpleNamespace(expt_tp=dist.group.WORLD, tp=None, expt_gtp_remat=None)
    found = []
    for mode in MODES:
        for dim in (1, 2):
            whole, steps = draw(3, 4, 6), draw(2, 3, 4, 6)
            weight = whole.chunk(2, dim)[dist.get_rank()].contiguous()
            gradients = steps.chunk(2, dim + 1)[dist.get_rank()].contiguous()
            ours, theirs = nn.Parameter(weight.clone()), [nn.Parameter(m) for m in weight.clone()]
            for parameter, at in ((ours, dim), *((matrix, dim - 1) for matrix in theirs)):
                parameter.partition_dim, parameter.expert_tp = at, True  # type: ignore[attr-defined]
            settings = {"pg_collection": groups, "tp_mode": mode, "scale_mode": "unit_rms_norm"}
            stack, alone = made(muon, [ours], **settings), made(muon, theirs, **settings)
            for gradient in gradients:
                ours.grad = gradient.clone()
                for matrix, part in zip(theirs, gradient, strict=True):
                    matrix.grad = part.clone()
                stack.step()
                alone.step()
            found.append(
                (f"{mode} {dim}", ours.detach(), torch.stack([m.detach() for m in theirs]))
            )
    patches.undo()
    return found


def test_parts_of_a_matrix_become_one_as_megatron_s_do() -> None:
    """By each `--muon-tp-mode`, for fc1 and for fc2."""
    ranks = run_ranks(2, over_two_ranks)
    assert len(ranks[0]) == 2 * len(MODES)
    whole: dict[str, Tensor] = {}
    for parts in zip(*ranks, strict=True):
        for name, ours, theirs in parts:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5, msg=name)
        name = parts[0][0]
        whole[name] = torch.cat([ours for _, ours, _ in parts], dim=int(name[-1]))
    for dim in (1, 2):  # a whole matrix's update, or one of each part
        one, other, parts = (whole[f"{mode} {dim}"] for mode in reversed(MODES))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(one, parts, atol=1e-2)


def who_steps_what() -> dict[str, str]:
    """Return the class of the optimizer that steps each parameter of layer 0's MoE block."""
    from core_model import Case, build, transformer_config
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    from ep_plugin.megatron.seams.install import install

    install()
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = transformer_config(Case("biases", layers=1, bias=True))
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), build(config, None))
    release = touchpoints.release_for(touchpoints.installed_version())
    module, name = release.muon.MAKER.split(":")
    made_by = getattr(importlib.import_module(module), name)
    chain = made_by(OptimizerConfig(optimizer="muon", lr=0.1, min_lr=0.1), [model])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for optimizer in chain.chained_optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                found[names.pop(id(parameter))] = type(optimizer.optimizer).__name__
    assert not names  # nobody is forgotten, and nobody is stepped twice
    assert all(parameter.requires_grad for parameter in model.parameters())
    return {name.partition(".mlp.")[2]: kind for name, kind in found.items() if ".mlp." in name}


def test_weights_are_matrices_and_biases_are_vectors() -> None:
    (found,) = run_ranks(1, who_steps_what)
    linears = ("experts.linear_fc1", "experts.linear_fc2")
    assert {found[f"{linear}.weight"] for linear in linears} == {"TensorParallelMuon"}
    assert {found[f"{linear}.bias"] for linear in linears} == {"AdamW"}
    assert found["router.weight"] == "TensorParallelMuon"


def test_the_document_names_what_is_served() -> None:
    text = (Path(__file__).parents[2] / "docs" / "support-matrix.md").read_text()
    section = text.partition("## Optimizers")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ((?:`\w+`,? ?)+) \| (\w+)", section, re.MULTILINE)
    named = {word: re.findall(r"`(\w+)`", names) for names, word in rows}
    assert {*named["served"]} == {*BY_FIELD["optimizer"].legal}
    assert named["refused"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--optimizer", "muon", *FP32, *EP2),
        pytest.param(("--optimizer", "lion", *EP2), marks=pytest.mark.newest),
    ],
    ids=["muon", "lion"],
)
def test_training_is_megatron_s(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """What steps each parameter: experts' weights are matrices, as Megatron's own are."""
    run = ("--train-iters", "4", *MOE, *flags)
    ours, theirs = (
        train(2, runner, tmp_path / name, *run) for name, runner in (("a", OURS), ("b", STOCK))
    )
    for tag in ("lm loss", "grad-norm"):
        values, expected = ([v for _, v in run.series(tag)] for run in (ours, theirs))
        assert len(values) == 4
        assert values == pytest.approx(expected, rel=1e-5), tag
    losses = [value for _, value in ours.series("lm loss")]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.skipif(not NEWEST, reason="Megatron has it from 0.18 on, by another name until then")
def test_the_layer_wise_optimizer_changes_nothing_and_resumes(tmp_path: Path) -> None:
    """In bf16, to the bit; a run that goes on is the uninterrupted one."""
    run = ("--train-iters", "4", *MOE, "--optimizer", "muon", "--bf16", *EP2)
    whole = train(2, OURS, tmp_path / "whole", *run)
    split = (*run, "--use-distributed-optimizer", "--save-interval", "2")
    saved = train(2, OURS, tmp_path / "saved", *split, "--save", str(tmp_path / "state"))
    load = ("--load", str(tmp_path / "state"), "--ckpt-step", "2")
    resumed = train(2, OURS, tmp_path / "resumed", *split, *load)
    assert saved.series("lm loss") == whole.series("lm loss")
    for tag in ("lm loss", "grad-norm"):  # the norm is summed in another order
        assert resumed.series(tag) == saved.series(tag)[2:]
    done = launch(2, OURS, *run[:-2], "--use-distributed-optimizer", *load)
    assert done.returncode != 0
    assert "stepped apart from the rest" in done.stdout + done.stderr


def arguments(**more: Any) -> argparse.Namespace:
    """Return validated arguments of 0.18 and newer."""
    plain = {
        **{"optimizer": "muon", "fp16": False, "bf16": True, "use_mup": False},
        **{"use_distributed_optimizer": False, "use_layer_wise_distributed_optimizer": False},
        **{"use_layer_wise_param_layout": True, "add_bias_linear": False},
        **{"tensor_model_parallel_size": 1, "expert_model_parallel_size": 2},
        **{"expert_tensor_parallel_size": 1, "load": None, "ckpt_step": None},
        **{"finetune": False, "no_load_optim": False, "ckpt_format": "torch_dist"},
    }
    return argparse.Namespace(**{**plain, **more})


@pytest.fixture
def on_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(touchpoints, "installed_version", lambda: "0.19.2")


@pytest.mark.usefixtures("on_newest")
@pytest.mark.parametrize("optimizer", ["muon", "lion"])
def test_what_trips_megatron_is_refused_with_a_way_out(optimizer: str) -> None:
    layer_wise = {"optimizer": optimizer, "use_layer_wise_distributed_optimizer": True}
    check_optimizer(arguments(optimizer=optimizer))
    check_optimizer(arguments(**layer_wise))
    for more, way in (
        ({"fp16": True, "bf16": False}, "use --bf16"),
        ({**layer_wise, "bf16": False}, "use --bf16"),
        ({**layer_wise, "add_bias_linear": True}, "use --disable-bias-linear"),
        ({**layer_wise, "ep_experts_per_layer": (3, 4)}, f"use --optimizer {optimizer} without"),
    ):
        with pytest.raises(ConfigError, match=f"^--optimizer .{optimizer}.*; {way}"):
            check_optimizer(arguments(**{"optimizer": optimizer, **more}))
        check_optimizer(arguments(**{**more, "optimizer": "adam"}))
    check_optimizer(
        arguments(**layer_wise, add_bias_linear=True, use_layer_wise_param_layout=False)
    )
    check_optimizer(arguments(**layer_wise, add_bias_linear=True, expert_model_parallel_size=1))
    check_optimizer(arguments(**layer_wise, ep_experts_per_layer=(2, 4)))  # one copy of each
    check_optimizer(arguments(optimizer=optimizer, ep_experts_per_layer=(3, 4)))


@pytest.mark.parametrize("version", ["0.16.1", "0.17.1", "0.18.2", "0.19.2"])
def test_each_release_says_which_package_it_needs(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(touchpoints, "installed_version", lambda: version)
    needs = "older than 0.2" if version == "0.16.1" else "or newer"
    for installed, got in ((None, "none is installed"), ((0, 0), "got 0.0")):
        monkeypatch.setattr(optimizers, "package_version", lambda at=installed: at)
        with pytest.raises(ConfigError, match=f"{needs}.*{re.escape(got)}; use pip install '"):
            check_optimizer(arguments())
        check_optimizer(arguments(optimizer="adam"))
    monkeypatch.setattr(optimizers, "package_version", lambda: (0, 3))
    if version == "0.16.1":
        with pytest.raises(ConfigError, match=r"got 0\.3; .* or megatron-core 0.17 or newer"):
            check_optimizer(arguments())
        monkeypatch.setattr(optimizers, "package_version", lambda: (0, 1))
    check_optimizer(arguments())


@pytest.mark.usefixtures("on_newest")
def test_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    content = healthy()
    content.common["args"] = arguments()
    load = str(write(content, tmp_path))
    check_optimizer(arguments(load=load))
    check_optimizer(arguments(load=load, expert_model_parallel_size=4))
    for more, said in (
        ({"optimizer": "lion"}, "saved with --optimizer muon, and this run has --optimizer lion"),
        ({"use_layer_wise_distributed_optimizer": True}, "use --optimizer muon, or --no-load-opt"),
        ({"expert_model_parallel_size": 1}, "apart from .*; use --expert-model-parallel-size 2 "),
    ):
        with pytest.raises(ConfigError, match=said):
            check_optimizer(arguments(load=load, **more))
        check_optimizer(arguments(load=load, no_load_optim=True, **more))
    check_optimizer(arguments(load=str(tmp_path / "nothing")))
