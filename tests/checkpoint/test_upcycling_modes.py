"""Upcycling as tensor maths, in float64: what the layer computes against the dense FFN."""

import argparse
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tolerance import MAX_ERROR
from torch import Tensor

from ep_plugin import MoEConfig, MoELayer, RoutingConfig
from ep_plugin.checkpoint.adapt.ffn import ExpertMaker, FfnTensor, router_rows, shard
from ep_plugin.checkpoint.adapt.modes.drop import dropped
from ep_plugin.checkpoint.adapt.upcycle import make_experts
from ep_plugin.checkpoint.adapt.upcycling import GateSums, Losses, Upcycling
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.settings import _balancing
from ep_plugin.presets import presets
from ep_plugin.registry import available

H, WIDTH, TOKENS = 16, 32, 48
Weights = dict[str, Tensor]
ACTIVATIONS = {"swiglu": F.silu, "gelu": F.gelu, "relu": F.relu}


def dense_ffn(gated: bool, bias: bool, seed: int = 3) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    rows = WIDTH * (2 if gated else 1)
    shapes = {"linear_fc1.weight": (rows, H), "linear_fc2.weight": (H, WIDTH)}
    if bias:
        shapes |= {"linear_fc1.bias": (rows,), "linear_fc2.bias": (H,)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3
        for name, shape in shapes.items()
    }


def compute(ffn: Weights, x: Tensor, activation: str) -> Tensor:
    """The dense FFN, written out: [T, H]."""
    inner = F.linear(x, ffn["linear_fc1.weight"], ffn.get("linear_fc1.bias"))
    if activation == "swiglu":
        gate, value = inner.chunk(2, dim=-1)
        inner = F.silu(gate) * value
    else:
        inner = ACTIVATIONS[activation](inner)
    return F.linear(inner, ffn["linear_fc2.weight"], ffn.get("linear_fc2.bias"))


def made(maker: ExpertMaker, dense: Tensor, part: FfnTensor) -> list[Tensor]:
    return [values for _, values in maker.experts(dense, part, False)]


def part_of(name: str, gated: bool) -> FfnTensor:
    return FfnTensor(layer=0, fc=int(name[9]), is_weight=name.endswith("weight"), gated=gated)


def upcycled(
    settings: Upcycling, dense: Weights, routing: RoutingConfig, activation: str = "swiglu"
) -> MoELayer:
    """The layer with the converted experts and router, and a shared expert where asked."""
    gated, bias = activation == "swiglu", "linear_fc1.bias" in dense
    maker = make_experts(settings, gated)
    shared = {
        name: maker.shared_expert(values, part_of(name, gated), False)
        for name, values in dense.items()
    }
    layer = MoELayer(
        MoEConfig(
            hidden_size=H,
            ffn_hidden_size=WIDTH // settings.granularity,
            num_experts=settings.num_experts,
            activation=activation,  # type: ignore[arg-type]
            bias=bias,
            routing=replace(routing, topk=settings.topk, router_dtype="fp64"),
            shared_expert="learned" if settings.shared_expert == "learned" else "sum",
        ),
        shared_expert=None
        if settings.shared_expert == "none"
        else lambda x: compute(shared, x, activation),
        dtype=torch.float64,
    )
    state = {
        f"experts.{name}": torch.stack(made(maker, values, part_of(name, gated)))
        for name, values in dense.items()
    }
    shape = (settings.num_experts, H)
    rows = router_rows(settings.router_init, shape, settings.granularity, 0.3, settings.seed, 0)
    state["router.weight"] = rows.double()
    missing, unexpected = layer.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if name.startswith("experts.")]
    return layer.eval()


def relative_error(
    settings: Upcycling, routing: RoutingConfig, activation: str = "swiglu"
) -> float:
    """Largest difference of the layer's output from the dense FFN's, over its size."""
    dense = dense_ffn(activation == "swiglu", bias=activation != "swiglu")
    x = torch.randn(TOKENS, H, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    routing = replace(routing, eval_capacity_factor=None)
    if routing.capacity_factor is None:
        routing = replace(routing, drop_policy="none")
    with torch.no_grad():
        before = compute(dense, x, activation)
        after = upcycled(settings, dense, routing, activation)(x)
    return float((after - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("granularity", [2, 4, 8])
def test_granular_keeps_the_output(granularity: int, activation: str) -> None:
    """Virtual groups chosen together add up to the dense FFN, and another router's shards not."""
    settings = Upcycling(
        num_experts=4 * granularity,
        topk=2 * granularity,
        mode="granular",
        granularity=granularity,
        router_init="virtual-group",
    )
    assert make_experts(settings, gated=True).deviations == ()
    assert relative_error(settings, RoutingConfig(), activation) < MAX_ERROR[torch.float64]
    loose = replace(settings, router_init="normal")
    assert "no whole FFN" in make_experts(loose, gated=True).deviations[0]
    assert relative_error(loose, RoutingConfig(), activation) > 0.1


def test_granular_is_right_on_average() -> None:
    """Over all ways to choose shards, the gain gives the dense output."""
    dense, x = dense_ffn(True, False), torch.randn(5, H, dtype=torch.float64)
    settings = Upcycling(
        num_experts=8, topk=2, mode="granular", granularity=4, router_init="normal"
    )
    maker = make_experts(settings, gated=True)
    experts = [made(maker, v, part_of(n, True)) for n, v in dense.items()]
    names = list(dense)
    outputs = [
        compute(dict(zip(names, tensors, strict=True)), x, "swiglu")
        for tensors in zip(*experts, strict=True)
    ]
    mean = torch.stack(outputs).mean(dim=0)
    torch.testing.assert_close(mean, compute(dense, x, "swiglu"), rtol=1e-12, atol=1e-12)


def test_gain_of_a_power_of_two_rounds_nothing() -> None:
    """In bf16 too the experts are the dense weights times powers of two."""
    settings = Upcycling(
        num_experts=16, topk=8, mode="granular", granularity=8, router_init="virtual-group"
    )
    maker = make_experts(settings, gated=True)
    assert (maker.routed.value, maker.routed.weight, maker.routed.bias) == (2.0, 4.0, 1.0)
    for name, values in dense_ffn(True, False).items():
        part, dense = part_of(name, True), values.bfloat16()
        for index, expert in maker.experts(dense, part, False):
            exact = torch.stack([half.double() for half in part.halves(expert)])
            old = torch.stack(
                [half.double() for half in part.halves(shard(dense, part, index % 8, 8))]
            )
            factor = exact / old
            wanted = [[1.0, 2.0]] if part.fc == 1 else [[4.0]]
            assert torch.equal(factor.flatten(1)[:, 0], torch.tensor(wanted[0]).double())
            assert (factor.flatten(1) == factor.flatten(1)[:, :1]).all()


PRESETS = {name: preset for name, preset in presets().items() if preset.router == "topk"}


@pytest.mark.parametrize("name", [name for name in PRESETS if any(PRESETS[name].model.experts)])
def test_copy_under_each_preset_s_routing(name: str) -> None:
    """Exact where weights are divided by their sum, and with a zero router everywhere."""
    routing = PRESETS[name].routing
    gates = GateSums.of(routing)
    per_group = routing.topk // (routing.group_topk or 1)
    num_experts = max(8, (routing.num_groups or 1) * 2 * per_group)
    settings = Upcycling(num_experts=num_experts, topk=routing.topk, gates=gates)
    zero = replace(settings, router_init="zero")
    # A second expert that may be left out takes its weight with it, but never the sum of weights.
    certain = replace(
        routing, second_expert="all", second_threshold=0.2, noise="none", jitter_eps=0.0
    )
    assert relative_error(zero, certain) < 1e-6
    error = relative_error(settings, certain)
    if make_experts(settings, gated=True).deviations:
        assert "divided by their sum" in make_experts(settings, gated=True).deviations[0]
        assert 1e-3 < error < 5
    else:
        assert error < 1e-6


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_gates_that_are_not_divided_by_their_sum(topk: int, activation: str) -> None:
    """Sigmoid top-1 and softmax before the choice: compensated for equal logits, to the digit."""
    softmax = GateSums(pre_softmax=True, scaling_factor=2.5)
    routing = RoutingConfig(normalize="none", scaling_factor=2.5)
    settings = Upcycling(num_experts=8, topk=topk, gates=softmax, router_init="zero")
    assert relative_error(settings, routing, activation) < MAX_ERROR[torch.float64]
    if topk == 1:
        sigmoid = GateSums(score_function="sigmoid")
        settings = Upcycling(num_experts=8, topk=1, gates=sigmoid, router_init="zero")
        routing = RoutingConfig(normalize="none", score_function="sigmoid")
        assert relative_error(settings, routing, activation) < MAX_ERROR[torch.float64]


@pytest.mark.parametrize("shared", ["copy", "learned"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_shared_expert_keeps_the_output(shared: str, activation: str) -> None:
    settings = Upcycling(num_experts=8, topk=2, shared_expert=shared)  # type: ignore[arg-type]
    assert make_experts(settings, gated=True).deviations == ()
    dtype = torch.float32 if shared == "learned" else torch.float64  # its softmax is fp32
    assert relative_error(settings, RoutingConfig(), activation) < MAX_ERROR[dtype]


def test_drop_redraws_its_channels_alone() -> None:
    """Half of each expert's channels, each expert's own, with the statistics of what was there."""
    dense = {"fc1": torch.randn(2 * 4000, 6).double() * 3 + 1, "fc2": torch.randn(6, 4000).double()}
    settings = Upcycling(num_experts=3, topk=2, mode="drop", drop_ratio=0.5, seed=9)
    maker = make_experts(settings, gated=True)
    fc1, fc2 = (FfnTensor(2, fc, is_weight=True, gated=True) for fc in (1, 2))
    seen = []
    for expert, (new1, new2) in enumerate(
        zip(made(maker, dense["fc1"], fc1), made(maker, dense["fc2"], fc2), strict=True)
    ):
        gate, value = (new1 != dense["fc1"]).all(dim=1).chunk(2)
        column = (new2 != dense["fc2"]).all(dim=0)
        assert int(column.sum()) == 2000
        assert torch.equal(gate, column)
        assert torch.equal(value, column)
        assert sorted(dropped(4000, 0.5, 9, 2, expert).tolist()) == column.nonzero()[:, 0].tolist()
        assert (new1 == dense["fc1"]).all(dim=1).sum() == 2 * 2000  # the rest to the bit
        redrawn = new1.chunk(2)[1][column]
        assert float(redrawn.mean()) == pytest.approx(1, abs=0.15)
        assert float(redrawn.std()) == pytest.approx(3, rel=0.05)
        seen.append(column)
    assert not torch.equal(seen[0], seen[1])
    moments = [values for _, values in maker.experts(dense["fc1"], fc1, True)]
    assert all(torch.equal(values, dense["fc1"]) for values in moments)


def test_noise_is_relative() -> None:
    dense = torch.cat([torch.randn(3000, 8) * 5, torch.randn(3000, 8) * 0.2])
    settings = Upcycling(num_experts=2, topk=2, mode="noise", noise_std=0.1)
    part = FfnTensor(0, 1, is_weight=True, gated=True)
    first, second = made(make_experts(settings, gated=True), dense, part)
    for new in (first, second):
        gate, value = (new - dense).chunk(2)
        assert float(gate.std()) == pytest.approx(0.5, rel=0.05)
        assert float(value.std()) == pytest.approx(0.02, rel=0.05)
    assert (
        abs(
            float(
                torch.corrcoef(torch.stack([(first - dense)[:, 0], (second - dense)[:, 0]]))[0, 1]
            )
        )
        < 0.1
    )


@pytest.mark.parametrize("mode", ["drop", "noise"])
def test_changed_experts_say_so(mode: str) -> None:
    """The deviation is stated, and is none when nothing is changed."""
    settings = Upcycling(num_experts=4, topk=2, mode=mode)
    assert len(make_experts(settings, gated=True).deviations) == 1
    assert 1e-3 < relative_error(settings, RoutingConfig()) < 3
    nothing = replace(settings, drop_ratio=0.0, noise_std=0.0)
    assert make_experts(nothing, gated=True).deviations == ()
    assert relative_error(nothing, RoutingConfig()) < MAX_ERROR[torch.float64]


def test_halves_saved_apart_are_the_same_experts() -> None:
    """Gate and value under names of their own come out as the halves of one tensor do."""
    dense = dense_ffn(True, False)["linear_fc1.weight"]
    whole = FfnTensor(1, 1, is_weight=True, gated=True)
    for settings in (
        Upcycling(num_experts=4, topk=2, mode="drop"),
        Upcycling(num_experts=4, topk=2, mode="noise"),
        Upcycling(
            num_experts=8, topk=4, mode="granular", granularity=4, router_init="virtual-group"
        ),
    ):
        maker = make_experts(settings, gated=True)
        together = made(maker, dense, whole)
        for half, name in enumerate(("_w", "_v")):
            apart = made(maker, dense.chunk(2)[half], replace(whole, half=name))
            for one, both in zip(apart, together, strict=True):
                assert torch.equal(one, both.chunk(2)[half])


def test_modes_are_the_files_of_the_folder() -> None:
    assert available("modes") == ("copy", "drop", "granular", "noise")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "sparse"}, r"--mode must be one of copy, drop, granular, noise; got 'sparse'"),
        ({"topk": 0}, r"--topk must be at least 1; got 0; use --topk 2"),
        ({"topk": 1}, r"--topk 1 --pre-softmax"),
        ({"mode": "granular"}, r"--granularity \(1\) must be above 1 in --mode granular"),
        (
            {"granularity": 2},
            r"--granularity \(2\) must be above 1 in --mode granular and 1 in the",
        ),
        ({"mode": "granular", "granularity": 3}, r"--num-experts \(8\) must be a multiple of"),
        (
            {"mode": "granular", "granularity": 4, "router_init": "virtual-group"},
            r"--topk \(2\) must be a multiple of --granularity \(4\).*use --topk 4",
        ),
        ({"ep": 3}, r"--ep \(3\) must divide --num-experts \(8\); use --ep 2"),
        ({"drop_ratio": 1.5}, r"--drop-ratio must be between 0 and 1; got 1.5"),
        ({"noise_std": -1.0}, r"--noise-std must be finite and not negative"),
        ({"router_init": "ones"}, r"router_init must be one of normal, virtual-group, zero"),
        ({"shared_expert": "yes"}, r"shared_expert must be one of none, copy, learned"),
        (
            {"gates": GateSums(num_groups=3, group_topk=1)},
            r"num_groups \(3\) must divide num_experts",
        ),
    ],
)
def test_settings_that_contradict(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Upcycling(**{"num_experts": 8, "topk": 2, **changes})  # type: ignore[arg-type]


@given(
    scopes=st.permutations(["micro_batch", "sequence", "global"]),
    coefficients=st.lists(st.floats(1e-6, 1), min_size=0, max_size=3),
)
def test_every_balancing_loss_of_a_routing_goes_along(
    scopes: list[str], coefficients: list[float]
) -> None:
    """Megatron reads from the new model's arguments the losses that the preset has."""
    losses: Any = tuple(zip(scopes, coefficients, strict=False))
    routing = RoutingConfig()
    if losses:
        (scope, coefficient), *further = losses
        routing = RoutingConfig(
            aux_loss_scope=scope, aux_loss_coeff=coefficient, further_losses=tuple(further)
        )
    wanted = Upcycling(num_experts=4, topk=2, losses=Losses.of(routing))
    args = wanted.arguments(argparse.Namespace(num_layers=2, ffn_hidden_size=64))
    found = RoutingConfig(**_balancing(args))
    assert found.balancing_losses == routing.balancing_losses == losses
