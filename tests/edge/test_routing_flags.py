"""The `--ep-*` flags in Megatron's loop: what they say is done, and what is done is seen."""

import argparse
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import torch.nn.functional as F
from loop import MODEL, NEWEST, OURS, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ep_plugin import RoutingConfig
from ep_plugin.megatron.arguments.checks import settings_from_args
from ep_plugin.megatron.arguments.parser import add_ep_arguments, experts_per_layer
from ep_plugin.megatron.arguments.table import feeding
from ep_plugin.megatron.settings import EdgeSettings, _activation, routing_config
from ep_plugin.moe.config import Activation

pytestmark = pytest.mark.megatron
DROPS = "--ep-capacity-factor 1.5 --ep-drop-policy probs"
BALANCES = "--ep-aux-loss-coeff 0.5"
SAMPLES: dict[str, tuple[Any, str]] = {  # field -> (value, flags with what else it needs)
    "topk": (3, "--ep-topk 3"),
    "score_function": ("sigmoid", "--ep-score-function sigmoid"),
    "normalize": ("after_drop", f"--ep-normalize after_drop {DROPS}"),
    "scaling_factor": (2.5, "--ep-scaling-factor 2.5"),
    "router_dtype": ("model", "--ep-router-dtype model"),
    "router_bias": (True, "--ep-router-bias on"),
    "jitter_eps": (0.01, "--ep-jitter-eps 0.01"),
    "noise": ("rsample", "--ep-noise rsample"),
    "second_expert": ("random", "--ep-second-expert random"),
    "second_threshold": (0.5, "--ep-second-threshold 0.5 --ep-second-expert random"),
    "num_groups": (2, "--ep-num-groups 2 --ep-group-topk 1 --ep-normalize none"),
    "group_topk": (1, "--ep-num-groups 2 --ep-group-topk 1 --ep-normalize none"),
    "group_score_topk": (
        1,
        "--ep-num-groups 2 --ep-group-topk 1 --ep-group-score-topk 1 --ep-normalize none",
    ),
    "expert_bias": (True, "--ep-expert-bias on"),
    "bias_update_rate": (0.5, "--ep-bias-update-rate 0.5 --ep-expert-bias on"),
    "quantile_balancing": (True, "--ep-quantile-balancing on"),
    "quantile_ema": (0.5, "--ep-quantile-ema 0.5 --ep-quantile-balancing on"),
    "force_load_balancing": (True, "--ep-force-load-balancing on"),
    "capacity_factor": (1.5, "--ep-capacity-factor 1.5 --ep-drop-policy bpr"),
    "eval_capacity_factor": (2.0, "--ep-eval-capacity-factor 2 --ep-drop-policy probs"),
    "min_capacity": (4, f"--ep-min-capacity 4 {DROPS}"),
    "capacity_rounding": ("floor_x4", f"--ep-capacity-rounding floor_x4 {DROPS}"),
    "capacity_counts_topk": (False, f"--ep-capacity-counts-topk off {DROPS}"),
    "drop_policy": ("random", "--ep-capacity-factor 1 --ep-drop-policy random"),
    "group_tokens": (64, f"--ep-group-tokens 64 {DROPS}"),
    "aux_loss_coeff": (0.5, "--ep-aux-loss-coeff 0.5"),
    "aux_loss_counts": ("top1", f"--ep-aux-loss-counts top1 {BALANCES}"),
    "aux_loss_scope": ("sequence", f"--ep-aux-loss-scope sequence {BALANCES}"),
    "further_losses": (
        (("global", 0.25),),
        f"--ep-further-losses global:0.25 {BALANCES}",
    ),
    "aux_loss_layers": ("mean", f"--ep-aux-loss-layers mean {BALANCES}"),
    "z_loss_coeff": (0.5, "--ep-z-loss-coeff 0.5"),
    "force_expert_choice": (True, "--ep-force-expert-choice on"),
}


def parse(*flags: str) -> Any:
    from megatron.training import arguments

    parser = add_ep_arguments(arguments.add_megatron_arguments(argparse.ArgumentParser()))
    return parser.parse_args([*MODEL, "--num-experts", "8", *flags])


def test_every_axis_is_a_flag() -> None:
    names = [field.name for field in fields(RoutingConfig)]
    assert [row.name for row in feeding("routing")] == names == list(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_flag_reaches_the_router_and_nothing_else_changes(name: str) -> None:
    if name.startswith("quantile") and not NEWEST:
        pytest.skip("Megatron has it from 0.19 on")
    value, flags = SAMPLES[name]
    args = parse(*flags.split())
    found = routing_config(args, settings_from_args(args))
    assert getattr(found, name) == value
    plain = parse()
    default = routing_config(plain, settings_from_args(plain))
    given = {flag.removeprefix("--ep-").replace("-", "_") for flag in flags.split()[::2]}
    assert getattr(default, name) != value
    for other in set(SAMPLES) - given:
        assert getattr(found, other) == getattr(default, other), other


def test_the_defaults_are_megatron_s() -> None:
    args = parse()
    assert routing_config(args, settings_from_args(args)) == RoutingConfig()


def test_ours_and_megatron_s_names_are_one_argument_and_the_last_wins() -> None:
    assert parse("--ep-topk", "3", "--moe-router-topk", "4").moe_router_topk == 4
    assert parse("--moe-router-topk", "4", "--ep-topk", "3").moe_router_topk == 3
    assert parse().moe_router_topk == 2


def test_a_pyramid_is_read() -> None:
    assert experts_per_layer("32*3,64") == (32, 32, 32, 64)
    for text in ("", "a", "4*", "0*2", "4*2*3*"):
        with pytest.raises(argparse.ArgumentTypeError):
            experts_per_layer(text)


def test_the_dense_blocks_get_their_own_activation() -> None:
    """GLaM (arXiv:2112.06905) gates its dense blocks with GELU; Megatron has no flag for it."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    import ep_plugin.megatron as edge
    from ep_plugin.megatron.seams import install as hooks

    def config() -> Any:
        return TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)

    args = parse("--ep-dense-activation", "geglu", "--ep-expert-activation", "relu")
    every = {name: parse("--ep-dense-activation", name) for name in get_args(Activation)}
    edge.install()
    try:
        specs: Any = import_module(hooks.MODULE_SPECS)
        specs.MoELayer.settings = settings_from_args(args)
        gated = config()
        assert (gated.activation_func, gated.gated_linear_unit) == (F.gelu, True)
        for name, alike in every.items():  # experts without a flag of their own follow
            specs.MoELayer.settings = settings_from_args(alike)
            assert _activation(config(), EdgeSettings()) == name
    finally:
        edge.uninstall()
    assert config().gated_linear_unit is False


RESIDUAL_PYRAMID = (
    *("--num-experts", "8", "--moe-layer-freq", "[1,1]", "--ep-experts-per-layer", "4,8"),
    *("--ep-shared-expert", "learned", "--moe-shared-expert-intermediate-size", "48"),
    *("--moe-ffn-hidden-size", "48", "--ep-dense-activation", "geglu"),
    *("--ep-expert-activation", "relu", "--ep-topk", "1", "--ep-normalize", "none"),
    *("--ep-capacity-factor", "1.0", "--ep-min-capacity", "2", "--ep-drop-policy", "position"),
    *("--ep-aux-loss-coeff", "1e-2", "--ep-aux-loss-counts", "top1"),
)


def scalars(folder: Path) -> dict[str, float]:
    """Return the last value of every `ep/` scalar."""
    events = EventAccumulator(str(next(folder.glob("events*"))))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("ep/")]
    return {tag.removeprefix("ep/"): events.Scalars(tag)[-1].value for tag in tags}


@pytest.mark.newest
def test_a_residual_pyramid_trains_alike_on_any_ep_and_resumes(tmp_path: Path) -> None:
    """Layers of 4 and 8 experts with a learned residual, dropping by position."""
    saved = str(tmp_path / "checkpoint")
    optimizer = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
    run = ("--train-iters", "6", *RESIDUAL_PYRAMID, *optimizer)
    split = ("--expert-model-parallel-size", "2")
    save = ("--save", saved, "--save-interval", "3")
    spread = train(2, OURS, tmp_path / "ep2", *run, *split, *save)
    load = ("--load", saved, "--ckpt-step", "3")
    resumed = train(2, OURS, tmp_path / "more", *run, *split, *load)
    weights = (*load, "--no-load-optim", "--no-load-rng")  # Megatron keeps the optimizer by EP
    anew = train(2, OURS, tmp_path / "anew", *run, *split, *weights)
    together = train(2, OURS, tmp_path / "ep1", *run, *weights)
    for tag in ("load_balancing_loss", "grad-norm"):
        values = [value for iteration, value in spread.series(tag) if iteration > 3]
        assert [value for _, value in resumed.series(tag)] == pytest.approx(values, rel=1e-5)
        values = [value for _, value in anew.series(tag)]
        assert [value for _, value in together.series(tag)] == pytest.approx(values, rel=1e-5)
    seen = scalars(tmp_path / "ep2")
    for layer, experts in ((1, 4), (2, 8)):
        tag = f"layer_{layer}"
        shares = [seen.pop(f"tokens_per_expert/{tag}/expert_{e}") for e in range(experts)]
        assert sum(shares) == pytest.approx(1)
        assert seen.pop(f"max_over_mean/{tag}") == pytest.approx(max(shares) * experts, rel=1e-5)
        dropped = seen.pop(f"dropped_fraction/{tag}")
        assert 0 < dropped < 0.5
        assert seen.pop(f"dispatched_none/{tag}") == pytest.approx(dropped)  # one choice a token
        assert seen.pop(f"dispatched_first/{tag}") == pytest.approx(1 - dropped)
        assert seen.pop(f"dispatched_second/{tag}") == 0
        assert 1 / experts < seen.pop(f"router_confidence/{tag}") < 1
        assert 0 < seen.pop(f"router_entropy/{tag}") < 2.08  # at most ln 8
    assert not seen
