"""The layer of this package as a contender, in each recipe and each way of keeping."""

from functools import partial
from typing import Any, get_args

from torch import nn

from ep_plugin.commands.bench.accumulate import total_of
from ep_plugin.commands.bench.case import Case, Contender, Makers
from ep_plugin.commands.bench.floors import Precision
from ep_plugin.moe.config import Fp8, MoEConfig, Save
from ep_plugin.moe.experts.fused import Into
from ep_plugin.moe.groups import ExpertGroups
from ep_plugin.moe.layer import MoELayer
from ep_plugin.moe.routing_config import RoutingConfig

SAVES: tuple[Save, ...] = ("bf16", "fp8")
AUX_LOSS = 0.01  # its cost is part of a training step; Megatron's layer has it too


def build(case: Case, precision: Precision) -> Makers:
    """Return what makes the layer for each recipe of this precision and each way of keeping.

    Making it raises ConfigError where a recipe has no product for the shape or the device.
    """
    recipes: list[Fp8] = [r for r in get_args(Fp8) if (r == "off") == (precision == "bf16")]
    return {
        _name(recipe, save): partial(_contender, case, precision, recipe, save)
        for recipe in recipes
        for save in SAVES
    }


def _name(recipe: Fp8, save: Save) -> str:
    suffixes = ([recipe] if recipe != "off" else []) + ([f"save_{save}"] if save != "bf16" else [])
    return "+".join(["ep_plugin", *suffixes])


def _contender(case: Case, precision: Precision, recipe: Fp8, save: Save) -> Contender:
    layer = make_layer(case, ExpertGroups(), fp8=recipe, save=save)
    return as_contender(layer, _name(recipe, save), precision)


def make_layer(case: Case, groups: ExpertGroups, **options: Any) -> MoELayer:
    """Return the layer of a case, with this rank's share of its experts; options of MoEConfig."""
    shape = case.shape
    config = MoEConfig(
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_experts=shape.experts,
        routing=RoutingConfig(topk=shape.topk, aux_loss_coeff=AUX_LOSS),
        **options,
    )
    layer = MoELayer(config, groups, init_method=None, device=case.device, dtype=case.router.dtype)
    mine = case.experts_of(groups.ep_rank, groups.ep_size)
    weights = {
        "router.weight": case.router,
        "experts.linear_fc1.weight": case.fc1[mine],
        "experts.linear_fc2.weight": case.fc2[mine],
    }
    layer.load_state_dict(weights, assign=True)
    layer.experts.weights_change_every_call = False
    return layer


def as_contender(layer: MoELayer, backend: str, precision: Precision) -> Contender:
    """Return a layer that `make_layer` made as what takes part in a run."""
    experts = layer.experts
    weights = [experts.linear_fc1.weight, experts.linear_fc2.weight]

    def fuse(added: bool) -> list[nn.Parameter]:
        experts.totals = _MainGrads(*weights) if added else None
        return weights

    def quantize() -> object:
        experts.is_first_microbatch = True
        return experts.weights8()

    return Contender(
        backend,
        precision,
        layer,
        list(layer.parameters()),
        quantize=quantize if experts.fp8 else None,
        fuse=fuse,
    )


class _MainGrads:
    """`Totals` of the experts: the `main_grad` of both weights."""

    def __init__(self, fc1: nn.Parameter, fc2: nn.Parameter) -> None:
        self.weights = fc1, fc2

    def take(self) -> Into:
        first, second = map(total_of, self.weights)
        return first, second
