"""What a layer does under a configuration, on CPU ranks: the observers of `test_no_silence.py`.

What can only run on a GPU is seen by what it is asked: the backends of the grouped GEMM are
`loop` under their names, `symm_mem` runs its CPU twin, and `deepep` a stand-in of its package.
"""

import hashlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ep_plugin import ExpertGroups, MoEConfig, MoELayer, ParallelConfig, create_expert_groups
from ep_plugin.moe.dispatcher import _agreement
from ep_plugin.moe.experts import autotune, experts
from ep_plugin.moe.kernels import peers_torch
from ep_plugin.registry import resolve

POSITIONS, SEQUENCES = 10, 4
COLLECTIVES = ("all_to_all_single", "batch_isend_irecv", "all_gather", "all_gather_into_tensor")


@dataclass(frozen=True)
class Case:
    """A layer to run."""

    config: MoEConfig
    ranks: int
    ranks_per_node: int | None
    shared_expert: bool


class NamedGemm:
    """`loop` under the name of another backend, which notes each product."""

    waits_for_host = False

    def __init__(self, name: str, products: list[str], *sizes: Any) -> None:
        self.name, self.products = name, products
        self.loop = resolve("gemm", "loop")(*sizes)

    def __getattr__(self, product: str) -> Any:
        self.products.append(f"{self.name}.{product}")
        return getattr(self.loop, product)


class Log:
    """What was seen, in lists that the patches below fill."""

    def __init__(self) -> None:
        self.exchanges: list[Any] = []
        self.products: list[str] = []
        self.sms: list[int] = []
        self.kept = 0
        self.routing: list[str] = []

    def keep(self, tensor: Tensor) -> Tensor:
        self.kept += tensor.numel() * tensor.element_size()
        return tensor

    def after_routing(self, router: Any, inputs: Any, routing: Any) -> None:
        tensors = {"ids": routing.expert_ids, "probs": routing.probs, **routing.losses}
        self.routing += [f"{name} {bits(tensor)}" for name, tensor in tensors.items()]


def bits(tensor: Tensor | None) -> str:
    """Return what two tensors have in common when all their bits are equal."""
    if tensor is None:
        return "none"
    values = tensor.detach().contiguous().flatten().view(torch.uint8)
    return f"{tensor.dtype} {hashlib.sha256(bytes(values.tolist())).hexdigest()}"


@contextmanager
def watched(log: Log) -> Iterator[None]:
    """Note exchanges, products of the experts and SMs, while inside."""

    def collective(name: str, real: Any) -> Any:
        def noting(*args: Any, **more: Any) -> Any:
            group = more.get("group")
            rows = [a for a in args if isinstance(a, Tensor)]
            sent = [(str(r.dtype), r.numel()) for r in rows]
            log.exchanges.append((name, dist.get_world_size(group), sent))
            return real(*args, **more)

        return noting

    def find(kind: str, name: str) -> Any:
        return partial(NamedGemm, name, log.products) if kind == "gemm" else resolve(kind, name)

    def settle(*args: Any) -> Any:
        log.products.append("chosen by measuring")
        return autotune.build("loop", args[0])

    def kernel(real: Any) -> Any:
        def noting(*args: Any) -> Any:
            log.sms.append(args[-1])
            return real(*args)

        return noting

    with ExitStack() as stack:
        for name in COLLECTIVES:
            noting = collective(name, getattr(dist, name))
            stack.enter_context(patch.object(dist, name, noting))
        for module in (experts, autotune):
            stack.enter_context(patch.object(module, "resolve", find))
        stack.enter_context(patch.object(autotune, "settle", settle))
        for name in ("push_rows", "sum_rows"):
            noting = kernel(getattr(peers_torch, name))
            stack.enter_context(patch.object(peers_torch, name, noting))
        stack.enter_context(patch.object(_agreement, "FIRST_CALLS", 1))
        yield


def observe(case: Case, groups: ExpertGroups | None = None) -> dict[str, Any]:
    """Return what each observer sees of two steps in training and one in evaluation."""
    log, config = Log(), case.config
    torch.manual_seed(11)
    shared = nn.Linear(config.hidden_size, config.hidden_size, dtype=torch.bfloat16)

    def shared_expert(hidden: Tensor) -> Tensor:
        log.exchanges.append("shared expert")
        return shared(hidden)

    with watched(log):
        layer = MoELayer(
            config,
            groups,
            shared_expert=shared_expert if case.shared_expert else None,
            dtype=torch.bfloat16,
        )
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
        layer.router.register_forward_hook(log.after_routing)  # type: ignore[attr-defined]
        steps = torch.randn(2, POSITIONS, SEQUENCES, config.hidden_size, dtype=torch.bfloat16)
        steps = (steps + 0.5).requires_grad_()  # so that some experts are liked more
        outputs = []
        with saved_tensors_hooks(log.keep, lambda tensor: tensor):
            for hidden in steps:
                outputs.append(layer(hidden))
                outputs[-1].float().square().mean().backward()
                if config.routing.expert_bias:
                    layer.router.update_expert_bias()  # type: ignore[attr-defined]
                if config.routing.quantile_balancing:
                    layer.router.update_quantile_bias()  # type: ignore[attr-defined]
        layer.eval()
        with torch.no_grad():
            outputs.append(layer(hidden))
    gradients = {name: bits(p.grad) for name, p in layer.named_parameters()}
    return {
        "routing": log.routing,
        "output": [bits(output) for output in outputs],
        "gradients": gradients | {"hidden": bits(steps.grad)},
        "exchanges": log.exchanges,
        "checks": sum(entry[0] == "all_gather" for entry in log.exchanges),
        "kept": log.kept,
        "products": log.products,
        "sms": log.sms,
        "chunks": chunks(layer),
        "built": [
            *(type(part).__name__ for part in (layer.router, layer.dispatcher)),
            *(f"{name} {tuple(p.shape)}" for name, p in layer.named_parameters()),
        ],
    }


def chunks(layer: MoELayer) -> int | None:
    """Return how many parts the other ranks of 4 come in: of 2 ranks there is one part alone."""
    if layer.config.overlap != "chunked":
        return None
    groups = SimpleNamespace(ep_etp_size=4, replicas=None)
    block: Any = SimpleNamespace(groups=groups, dispatcher=layer.dispatcher)
    schedule: Any = resolve("overlap", "chunked")(layer.config, block)
    return int(schedule.args[0])


def observe_all(cases: list[Case]) -> list[dict[str, Any]]:
    """Observe each case on the ranks that all call this; groups are made once."""
    import deep_ep_standin

    sys.modules["deep_ep"] = deep_ep_standin
    ranks = dist.get_world_size()
    made: dict[int | None, ExpertGroups] = {}
    for case in cases:
        if case.ranks_per_node not in made:
            parallel = ParallelConfig(world_size=ranks, ep=ranks)
            made[case.ranks_per_node] = create_expert_groups(parallel, case.ranks_per_node)
    return [observe(case, made[case.ranks_per_node]) for case in cases]
