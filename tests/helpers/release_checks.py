"""What must hold on every release in a process of its own; `py` forks one for each."""

import functools
import importlib
import inspect
import os
from collections.abc import Callable
from typing import Any

import losses_checks
import pytest
import torch

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.seams import install as hooks
from ep_plugin.megatron.seams import touchpoints, wheel

# Replaced by a value that may stand there already, which depends on what is installed.
CONSTANTS = {"megatron.core.transformer.multi_latent_attention:HAVE_TE"}


def doctor_is_content() -> None:
    """`doctor` names the release and has nothing to object."""
    from ep_plugin.commands.doctor import examine

    (finding,) = [f for f in examine() if f.name == "megatron-core"]
    assert finding.status == "ok", finding.text
    release, _, _ = touchpoints.installed_version().partition("+")  # a commit, of a checkout
    assert finding.text.startswith(release), finding.text
    assert ("megatron.training" in finding.text) is not touchpoints.has_training()


def a_missing_symbol_is_named() -> None:
    """Without a symbol install refuses with its path, and nothing is changed."""
    release = touchpoints.release_for(touchpoints.installed_version())
    specs: Any = importlib.import_module(hooks.MODULE_SPECS)
    for path in (
        "megatron.core.transformer.moe.moe_utils:get_default_pg_collection",
        release.losses.WRITERS[0],
    ):
        owner, name = touchpoints.find_owner(path)
        symbol, before = getattr(owner, name), specs.MoELayer
        delattr(owner, name)
        with pytest.raises(ConfigError, match=f"{path} is not there"):
            hooks.install()
        setattr(owner, name, symbol)
        assert specs.MoELayer is before
        assert not cpu_mode.active()


def places() -> list[str]:
    """Return every attribute that install would replace here, CPU mode included."""
    return [place for place, _ in hooks.seams() if ":" in place]


def standing(more: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what stands now wherever install changes something, and at `more` places."""
    found: dict[str, Any] = {}
    for place in dict.fromkeys((*places(), *more)):
        owner, name = touchpoints.find_owner(place)
        found[place] = vars(owner).get(name, "inherited")
    return found


def process() -> tuple[Any, ...]:
    """Return what else install changes in this process."""
    eval_frame: Any = importlib.import_module("torch._dynamo.eval_frame")
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    return environment, torch._C._len_torch_function_stack(), eval_frame._stance


def changed(before: dict[str, Any]) -> set[str]:
    """Return the places where something else stands than before."""
    return {p for p, v in standing(tuple(before)).items() if v is not before.get(p, "inherited")}


def install_leaves_no_trace() -> None:
    """Every seam is hooked once and put back, again and again, on the CPU and as on a GPU."""
    assert any("validate_args" in place for place in places()) is touchpoints.has_training()
    for device in ("cpu", "cuda", "cpu", "cuda"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EP_PLUGIN_DEVICE", device)
            patch.setattr(torch.cuda, "is_available", functools.partial(bool, device == "cuda"))
            check_no_trace()


def check_no_trace() -> None:
    """Install twice and uninstall."""
    before, around, wanted = standing(), process(), set(places())
    on_cpu = cpu_mode.wanted()
    hooks.install()
    assert cpu_mode.active() is on_cpu
    hooked = standing()
    kept = {place for place in wanted if hooked[place] is before[place]}
    assert kept <= CONSTANTS
    assert changed(before) == wanted - kept
    hooks.install()
    assert changed(hooked) == set()
    hooks.uninstall()
    assert not cpu_mode.active()
    assert changed(before) == set()
    assert process() == around


def the_wheel_s_helpers_are_not_made_again() -> None:
    """Megatron runs `make` without a Makefile and exits; with us it does not."""
    datasets: Any = importlib.import_module(wheel.DATASETS)
    with pytest.raises(SystemExit, match="1"):
        datasets.compile_helpers()
    hooks.install()
    datasets.compile_helpers()


def evaluation_drops_nothing() -> None:
    """A full expert drops in training alone; Megatron's own block drops in evaluation too."""
    from core_loop import without_the_plugin
    from core_model import HIDDEN, Case, build, fill, transformer_config
    from forked import one_rank

    model, tokens = Case("one layer"), torch.randn(64, 1, HIDDEN)

    def output(training: bool, **capacity: Any) -> torch.Tensor:
        config = transformer_config(model)
        for name, value in capacity.items():
            setattr(config, name, value)
        block = build(config, None)
        fill(block)
        layer = block.decoder.layers[0].mlp.train(training)
        with torch.no_grad():
            found: torch.Tensor = layer(tokens)[0]
        return found

    without_the_plugin()
    one_rank()
    capacity = {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "probs"}
    assert not torch.allclose(output(False, **capacity), output(False), atol=1e-3)
    hooks.install()
    assert torch.equal(output(False, **capacity), output(False))
    assert not torch.allclose(output(True, **capacity), output(True), atol=1e-3)


def a_pyramid_s_biases_move_by_their_own_counts() -> None:
    """Layers of 4, 8 and again 4 experts: each bias moves against its own layer's load."""
    from core_model import HIDDEN, Case, build, transformer_config
    from forked import one_rank
    from megatron.core import parallel_state

    from ep_plugin.megatron.settings import EdgeSettings

    hooks.install(EdgeSettings(experts_per_layer=(4, 8, 4)))
    one_rank()
    config = transformer_config(Case("a pyramid", layers=3))
    config.moe_router_score_function, config.moe_router_enable_expert_bias = "sigmoid", True
    config.moe_router_bias_update_rate = 0.25
    model = build(config, None)
    routers = [layer.mlp.router for layer in model.decoder.layers]
    for layer in model.decoder.layers:
        layer.mlp(torch.randn(5, 2, HIDDEN))
    loads = [router.local_tokens_per_expert.clone() for router in routers]
    assert [load.tolist() for load in loads if load.sum() != 5 * 2 * 2] == []
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    takes_group = "tp_dp_cp_group" in inspect.signature(module.get_updated_expert_bias).parameters
    update = module._update_router_expert_bias
    update([model], config, **({"tp_dp_cp_group": group} if takes_group else {}))
    for router, load in zip(routers, loads, strict=True):
        expected = 0.25 * (load.mean() - load).sign()
        assert torch.equal(router.expert_bias, expected), (router.expert_bias, load)


def sharded_parameters_are_refused() -> None:
    """Whichever wrapper a loop chooses is refused for a model with experts, and called without."""
    from core_model import Case, build, transformer_config
    from forked import one_rank

    asked: list[str] = []

    class Asked(Exception):
        """A wrapper went on."""

    def stands_in(path: str) -> Callable[..., None]:
        def init(
            self: Any, config: Any = None, ddp_config: Any = None, module: Any = None, **_: Any
        ) -> None:
            asked.append(path)
            raise Asked

        return init

    wrappers = touchpoints.release_for(touchpoints.installed_version()).SHARDERS
    for path in wrappers:  # a wrapper itself needs a GPU
        owner, name = touchpoints.find_owner(path)
        setattr(owner, name, stands_in(path))
    hooks.install()
    one_rank()
    config = transformer_config(Case("one layer"))
    model = build(config, None)
    for path in wrappers:
        owner = touchpoints.find_owner(path)[0]
        for given in ((config, None, model), ()):
            more = {} if given else {"module": model}
            with pytest.raises(ConfigError, match=f"^{owner.__name__} s.*; use Megatron's Distrib"):
                owner(*given, **more)
        with pytest.raises(Asked):
            owner(module=model.embedding)
    assert asked == list(wrappers)


CHECKS: dict[str, Callable[[], None]] = {
    "a pyramid with expert bias": a_pyramid_s_biases_move_by_their_own_counts,
    "doctor": doctor_is_content,
    "sharded parameters": sharded_parameters_are_refused,
    "a symbol that is gone": a_missing_symbol_is_named,
    "install and uninstall": install_leaves_no_trace,
    "helpers of the wheel": the_wheel_s_helpers_are_not_made_again,
    "evaluation": evaluation_drops_nothing,
    **losses_checks.CHECKS,
}
