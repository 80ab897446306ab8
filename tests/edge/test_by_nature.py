"""What `ep-plugin parity` sets aside is what differs between layouts by nature, no more, no less.

Each flag of the table that parity keeps runs alone on one rank, over data-parallel and over
tensor-parallel ranks: the gradients of a layer after two steps.
"""

import os
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from command_line import Accepted, completed, read
from flag_values import CASES as VALUES
from flag_values import given
from loop import NEWEST
from spawn import run_ranks
from torch import Tensor

from ep_plugin import ExpertGroups, MoEConfig, MoELayer, create_expert_groups
from ep_plugin.commands.parity.by_nature import set_aside
from ep_plugin.commands.parity.comparable import comparable
from ep_plugin.commands.parity.layouts import Layout, parse
from ep_plugin.megatron.arguments.table import BY_NAME
from ep_plugin.moe.rules import at_one_rank

pytestmark = [pytest.mark.megatron, pytest.mark.newest]
if not NEWEST:
    pytest.skip("the flags of Megatron 0.19", allow_module_level=True)
LENGTH, SEQUENCES = 16, 2
DATA, TENSOR = parse("ep=2"), parse("tp=2,ep=2,etp=1")
MEGATRON_S = (
    "--moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0.5",
    "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.5",
    "--moe-router-load-balancing-type aux_loss global_aux_loss --moe-aux-loss-coeff 0.1 0.5",
    "--ep-further-losses global:0.5 --ep-aux-loss-coeff 0.1",
    "--ep-further-losses sequence:0.1 --ep-aux-loss-scope global --ep-aux-loss-coeff 0.5",
    "--moe-expert-capacity-factor 0.5",
    "--moe-expert-capacity-factor 0.5 --moe-token-drop-policy position",
    "--moe-router-enable-expert-bias --moe-router-score-function sigmoid",
)
BESIDE = {  # what a test of such few tokens needs to see them
    ("aux_loss_scope", "group"): "--ep-group-tokens 8 --ep-aux-loss-coeff 0.5",
    ("aux_loss_scope", "global"): "--ep-aux-loss-coeff 0.5",
    ("second_expert", "random"): "--ep-second-threshold 1",
    ("second_expert", "threshold"): "--ep-second-threshold 0.4",
    ("group_tokens", 8): "--ep-capacity-factor 0.5 --ep-drop-policy probs",
}
# What Megatron runs, what one rank alone can have, and a capacity of more than all tokens.
NOT_ALONE = ("two_batch", "local", 24)
Gradients = dict[str, Tensor]


def lines() -> Iterator[tuple[str, ...]]:
    """Yield the flags of each case, as parity keeps them."""
    for name, value in VALUES:
        row = BY_NAME[name]
        if row.feeds and row.comparable and row.kind != "gemm" and value not in NOT_ALONE:
            beside = tuple(BESIDE.get((name, value), "").split())
            typed = [*given(name, value), *completed(name, value, beside=beside)]
            yield tuple(comparable(typed, 1).kept)
    yield from (tuple(words.split()) for words in MEGATRON_S)


def config_of(flags: tuple[str, ...]) -> MoEConfig | None:
    """Return what the flags mean; None for a dispatcher that is not here."""
    found = read(*flags, "--seq-length", str(LENGTH))
    assert isinstance(found, Accepted), found
    return None if found.config.dispatcher in ("deepep", "symm_mem") else found.config


def gradients(
    config: MoEConfig, layout: Layout | None = None, groups: ExpertGroups | None = None
) -> Gradients:
    """Return the gradients of all parameters, summed over ranks; None: of one rank."""
    rank, ranks = (0, 1) if layout is None else (dist.get_rank(), 2)
    if layout is None:
        config = at_one_rank(config)
    shared = config.shared_expert == "learned" or config.overlap == "shared_expert"
    layer = MoELayer(config, groups, shared_expert=torch.tanh if shared else None)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in layer.named_parameters():
        whole = [parameter.shape[0] * (ranks if name.startswith("experts") else 1)]
        weight = torch.randn(*whole, *parameter.shape[1:], generator=generator) * 0.3
        start = rank * parameter.shape[0] if name.startswith("experts") else 0
        parameter.data.copy_(weight[start : start + parameter.shape[0]])
    routing = config.routing
    steps = 2 if routing.expert_bias or routing.quantile_balancing else 1
    shape = (steps, SEQUENCES, LENGTH, 1, config.hidden_size)
    tokens, weights = (torch.randn(shape, generator=generator) for _ in range(2))
    weights *= 1e-2  # the auxiliary losses are to be seen beside them
    torch.manual_seed(rank)
    for hidden, weight in zip(tokens + 0.5, weights, strict=True):
        for number in range(SEQUENCES):
            if layout is DATA and number % 2 != rank:
                continue
            part = slice(rank * LENGTH // 2, (rank + 1) * LENGTH // 2)
            whole_one = part if layout is TENSOR else slice(None)
            (layer(hidden[number][whole_one]) * weight[number][whole_one]).sum().backward()
        if routing.expert_bias:
            layer.router.update_expert_bias()  # type: ignore[attr-defined]
        if routing.quantile_balancing:
            layer.router.update_quantile_bias()  # type: ignore[attr-defined]
    return {name: summed(name, parameter, ranks) for name, parameter in layer.named_parameters()}


def summed(name: str, parameter: Tensor, ranks: int) -> Tensor:
    """Return the gradient of a whole parameter; an expert without tokens has none."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    if ranks == 1:
        return gradient
    if name.startswith("experts"):
        parts = [torch.empty_like(gradient) for _ in range(ranks)]
        dist.all_gather(parts, gradient)
        return torch.cat(parts)
    dist.all_reduce(gradient)
    return gradient


def on_ranks(cases: list[tuple[MoEConfig, str]]) -> list[Gradients]:
    layouts = {"data": DATA, "tensor": TENSOR}
    groups = {name: create_expert_groups(x.parallel, 2) for name, x in layouts.items()}
    return [gradients(config, layouts[name], groups[name]) for config, name in cases]


@pytest.fixture(scope="module")
def found() -> dict[tuple[MoEConfig, str], Gradients]:
    """What every case computes at every layout, with and without what is set aside."""
    with patch.dict(os.environ, LOCAL_WORLD_SIZE="2"):
        configs = {config for flags in CASES for each in ways(flags) if (config := config_of(each))}
        cases = [(config, layout) for config in configs for layout in ("data", "tensor")]
        results = run_ranks(2, on_ranks, cases)[0]
        ones = {(config, "one"): gradients(config) for config in configs}
    return dict(zip(cases, results, strict=True)) | ones


def kept(flags: tuple[str, ...], layout: Layout) -> tuple[str, ...]:
    """Return the flags that parity compares."""
    arguments, _ = set_aside([*flags, "--seq-length", str(LENGTH)], [layout])
    return tuple(arguments)


def ways(flags: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [flags, kept(flags, DATA), kept(flags, TENSOR)]


CASES = list(dict.fromkeys(lines()))


def equal(config: MoEConfig, layout: str, found: dict[tuple[MoEConfig, str], Gradients]) -> bool:
    one, other = found[config, "one"], found[config, layout]
    assert one.keys() == other.keys()
    return all(float((one[n] - other[n]).norm()) < 1e-4 * float(one[n].norm()) for n in one)


@pytest.mark.parametrize("flags", CASES, ids=" ".join)
@pytest.mark.parametrize(("name", "layout"), [("data", DATA), ("tensor", TENSOR)])
def test_what_is_set_aside_is_what_differs(
    flags: tuple[str, ...],
    name: str,
    layout: Layout,
    found: dict[tuple[MoEConfig, str], Gradients],
) -> None:
    with patch.dict(os.environ, LOCAL_WORLD_SIZE="2"):
        whole, left = config_of(flags), config_of(kept(flags, layout))
        _, aside = set_aside([*flags, "--seq-length", str(LENGTH)], [layout])
    if whole is None or left is None:
        pytest.skip("its package is not here")
    assert equal(left, name, found)
    assert equal(whole, name, found) == (not aside), [setting.text for setting in aside]
