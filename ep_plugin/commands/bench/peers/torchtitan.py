"""torchtitan's MoE layer in bf16: as it is, compiled as its trainer does, over symmetric memory.

Its products are torch's. `minimal_async_ep` keeps all row counts on the GPU; its buffer has one
size in a process, so another shape needs a process of its own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import (
    GroupedExperts,
    MoE,
    RoutedExperts,
    TokenChoiceTopKRouter,
)
from torchtitan.models.common.token_dispatcher import (
    AllToAllTokenDispatcher,
    DeepEPTokenDispatcher,
    LocalTokenDispatcher,
    MinimalAsyncEPTokenDispatcher,
)

from ep_plugin.commands.bench.case import Case, Contender, Makers
from ep_plugin.commands.bench.floors import Precision
from ep_plugin.commands.bench.peers._compiled import SWITCHES, compiled

NAME, ASYNC = "torchtitan", "minimal_async_ep"


def build(case: Case, precision: Precision) -> Makers:
    """Return what makes the layer for each of its dispatchers; it has no fp8 on Hopper.

    Over ranks with its experts on all of them, otherwise on one GPU; on the CPU as it is.
    """
    if precision != "bf16":
        return {}
    if dist.is_initialized() and dist.get_world_size() > 1:
        return {
            f"{NAME}+{way}": partial(_contender, case, way) for way in ("standard", "deepep", ASYNC)
        }
    makers = {NAME: partial(_contender, case, "local")}
    if case.device.type == "cuda":
        makers |= {
            f"{NAME}+compiled": partial(_contender, case, "local", whole=True),
            f"{NAME}+{ASYNC}": partial(_contender, case, ASYNC),
        }
    return makers


def _dispatcher(case: Case, way: str) -> Any:
    """Return the settings of a dispatcher; raises ImportError where its package is missing."""
    shape = case.shape
    sizes: dict[str, Any] = {"num_experts": shape.experts, "top_k": shape.topk}
    if way == "local":
        return LocalTokenDispatcher.Config(**sizes)
    if way == "standard":
        return AllToAllTokenDispatcher.Config(**sizes)
    sizes |= {"hidden_dim": shape.hidden, "num_max_tokens_per_rank": shape.tokens}
    if way == "deepep":
        import deep_ep  # noqa: F401  its own error comes with the first step

        return DeepEPTokenDispatcher.Config(**sizes)
    return MinimalAsyncEPTokenDispatcher.Config(**sizes, dtype=torch.bfloat16, device=case.device)


def _contender(case: Case, way: str, whole: bool = False) -> Contender:
    rank, ranks = 0, 1
    if way != "local":
        rank, ranks = _join()
    layer = _layer(case, _dispatcher(case, way), rank, ranks)
    if way != "local":
        mesh = init_device_mesh("cuda", (ranks,), mesh_dim_names=("ep",))
        layer.routed_experts.token_dispatcher.wire_meshes(ep_mesh=mesh)
    run: Callable[[Tensor], Tensor] = layer
    if whole:
        torch._dynamo.config.capture_scalar_outputs = True  # as its trainer sets it
        run = compiled(layer)
    ways = [] if way == "local" else [way]
    return Contender(
        "+".join([NAME, *ways, *(["compiled"] if whole else [])]),
        "bf16",
        lambda tokens: run(tokens.unsqueeze(0)).squeeze(0),
        list(layer.parameters()),
        dispatcher=way,
        switches=SWITCHES if whole else "",
    )


def _join() -> tuple[int, int]:
    """Return rank and number of ranks; one rank where no other was started."""
    if not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return dist.get_rank(), dist.get_world_size()


def _layer(case: Case, dispatcher: Any, rank: int, ranks: int) -> Any:
    """Return its layer with this rank's share of the weights; gate and up are two of its own."""
    shape, mine = case.shape, case.experts_of(rank, ranks)
    config = MoE.Config(
        num_experts=shape.experts,
        router=TokenChoiceTopKRouter.Config(
            num_experts=shape.experts,
            gate=Linear.Config(in_features=shape.hidden, out_features=shape.experts),
            top_k=shape.topk,
            score_func="softmax",
            route_norm=True,
        ),
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(
                dim=shape.hidden, hidden_dim=shape.ffn, num_experts=shape.experts // ranks
            ),
            token_dispatcher=dispatcher,
        ),
        load_balance_coeff=None,
    )
    with torch.device("meta"):
        layer: Any = MoE(config)
    gate, up = case.fc1[mine].chunk(2, dim=1)
    experts = layer.routed_experts.inner_experts
    experts.w1_EFD, experts.w3_EFD = (nn.Parameter(half.contiguous()) for half in (gate, up))
    experts.w2_EDF = nn.Parameter(case.fc2[mine])
    layer.router.gate.weight = nn.Parameter(case.router)
    layer.tokens_per_expert_E = torch.zeros(shape.experts, device=case.device)
    return layer.train()
