"""A dispatcher beside alltoall with dispatch_dedup, on any device: equal to the bit.

Sums of two ranks' rows have one order; for more, both sum by rank on the CPU alone.
"""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from routings import count
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ep_plugin import (
    ExpertGroups,
    MoEConfig,
    MoELayer,
    ParallelConfig,
    RoutingConfig,
    create_expert_groups,
)
from ep_plugin.moe.config import Fp8
from ep_plugin.moe.dispatcher import symm_mem
from ep_plugin.moe.interfaces import Dispatched, Dispatcher, Routing, combine, dispatch
from ep_plugin.moe.schedule.chunked import exchange_alone
from ep_plugin.registry import resolve

EXPERTS = 16
MULTICAST_OFF = {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NCCL_NVLS_ENABLE": "0"}
CONFIG = MoEConfig(hidden_size=8, ffn_hidden_size=8, num_experts=EXPERTS)
OWN: dict[str, dict[str, Any]] = {"alltoall": {"dispatch_dedup": True}, "symm_mem": {"comm_sms": 3}}


def make_groups(ep: int, etp: int = 1) -> ExpertGroups:
    return create_expert_groups(ParallelConfig(world_size=dist.get_world_size(), ep=ep, etp=etp))


DTYPES = (torch.float32, torch.bfloat16)


def both(groups: ExpertGroups, name: str = "symm_mem", hidden_size: int = 8) -> list[Dispatcher]:
    return [make(each, groups, hidden_size) for each in ("alltoall", name)]


def make(name: str, groups: ExpertGroups, hidden_size: int = 8) -> Any:
    config = replace(CONFIG, hidden_size=hidden_size, dispatcher=name, **OWN.get(name, {}))
    return resolve("dispatcher", name)(config, groups)


def random_ids(case: str, tokens: int, topk: int, seed: int) -> Tensor:
    """Expert ids [T, K]: every rank its own number of tokens, rank 1 none in case `a rank idle`."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    tokens = 0 if case == "a rank idle" and rank == 1 else tokens + 3 * rank
    if case == "one expert":
        return torch.full((tokens, 1), EXPERTS - 1)
    experts = EXPERTS // 2 if case == "experts idle" else EXPERTS
    ids = torch.rand(tokens, experts, generator=generator).topk(topk, dim=1).indices
    if case == "dropped":
        ids[torch.rand(ids.shape, generator=generator) < 0.4] = -1
    return ids


CASES = ("random", "a rank idle", "one expert", "experts idle", "dropped")


def outputs_of(inbox: Dispatched) -> Tensor:
    """Stand for the experts: rows that depend on tokens, ids and probabilities."""
    factors = (inbox.probs * (inbox.expert_ids + 2)).sum(1, keepdim=True)
    return (inbox.tokens.float() * factors).tanh().to(inbox.tokens.dtype)


def block(dispatcher: Dispatcher, ids: Tensor, hidden: Tensor, probs: Tensor) -> Tensor:
    inbox = dispatch(dispatcher, hidden, Routing(ids, probs, count(ids, EXPERTS)))
    return combine(dispatcher, outputs_of(inbox), inbox)


def assert_equal(found: Any, expected: Any, what: str) -> None:
    for index, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert x.dtype == y.dtype, (what, index, x.dtype, y.dtype)
        assert torch.equal(x, y), f"{what}: tensor {index} differs"


def leaves(ids: Tensor, hidden_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7 + dist.get_rank())
    hidden = torch.randn(len(ids), hidden_size, generator=generator).to(dtype)
    probs = torch.rand(ids.shape, generator=generator)
    return hidden.to(ids.device).requires_grad_(), probs.to(ids.device).requires_grad_()


def agree(
    ep: int,
    etp: int,
    device: str,
    hidden_size: int = 8,
    tokens: int = 11,
    name: str = "symm_mem",
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> int:
    """Inboxes, outputs and gradients of one block; returns the number of comparisons."""
    groups, checked = make_groups(ep, etp), 0
    for case in CASES:
        ids = random_ids(case, tokens, 3, seed=1).to(device)
        for dtype in dtypes:
            results = []
            for dispatcher in both(groups, name, hidden_size):
                hidden, probs = leaves(ids, hidden_size, dtype)
                inbox = dispatch(dispatcher, hidden, Routing(ids, probs, count(ids, EXPERTS)))
                output = combine(dispatcher, outputs_of(inbox), inbox)
                output.backward(torch.ones_like(output) * 0.3 + hidden.detach())
                fields = (inbox.tokens, inbox.expert_ids, inbox.probs, inbox.tokens_per_expert)
                results.append((*fields, output, hidden.grad, probs.grad))
            assert_equal(results[1], results[0], f"{case}, {dtype}")
            checked += 1
    return checked


def layers_share(device: str, again: bool) -> None:
    """Three layers have one buffer, and go back in reverse; with `again` forward runs twice."""
    groups, results = make_groups(dist.get_world_size()), []
    ids = [random_ids("random", 6, topk, seed=topk).to(device) for topk in (1, 2, 4)]
    for name in ("alltoall", "symm_mem"):
        layers = [make(name, groups) for _ in ids]
        parts = [leaves(chosen, 8, torch.float32) for chosen in ids]
        hidden = parts[0][0]
        for layer, chosen, (_, probs) in zip(layers, ids, parts, strict=True):
            args = (layer, chosen, hidden, probs)
            hidden = hidden + (
                checkpoint(block, *args, use_reentrant=False) if again else block(*args)
            )
        hidden.square().sum().backward()
        results.append((hidden, parts[0][0].grad, *(probs.grad for _, probs in parts)))
    assert_equal(results[1], results[0], f"three layers, again {again}")
    assert len({id(layer.link.buffer) for layer in layers}) == 1


def allows_for_all(device: str) -> int:
    """As while a graph is captured: rows that nobody wrote are no one's; all else is equal."""
    groups, checked = make_groups(dist.get_world_size()), 0
    for case in CASES:
        ids = random_ids(case, 11, 3, seed=5).to(device)
        dispatcher, results = both(groups)[1], []
        for bounded in (False, True):
            hidden, probs = leaves(ids, 8, torch.float32)
            with patch.object(symm_mem, "_captured", lambda _, bounded=bounded: bounded):
                inbox = dispatch(dispatcher, hidden, Routing(ids, probs, count(ids, EXPERTS)))
            received = len(inbox.tokens) if not bounded else len(results[0][0])
            if bounded:
                assert len(inbox.tokens) == dist.get_world_size() * dispatcher.most_tokens
                assert bool((inbox.expert_ids[received:] == -1).all())
                assert bool((inbox.probs[received:] == 0).all())
            output = combine(dispatcher, outputs_of(inbox), inbox)
            output.backward(torch.ones_like(output) * 0.3 + hidden.detach())
            fields = (inbox.tokens[:received], inbox.expert_ids[:received], inbox.tokens_per_expert)
            results.append((*fields, output, hidden.grad, probs.grad))
            dist.barrier()
            own = dispatcher.link.buffer
            own.peers.buffers[own.rank].fill_(255)  # not a number, or expert -1 with others' names
            dist.barrier()
        assert_equal(results[1], results[0], case)
        checked += 1
    return checked


def chunks_allow_for_all(device: str, fp8: Fp8) -> int:
    """Schedule chunked as while a graph is captured, with fewer tokens than a rank had before."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    config = MoEConfig(
        hidden_size=128, ffn_hidden_size=256, num_experts=EXPERTS, routing=RoutingConfig(topk=2),
        fp8=fp8, overlap="chunked", dispatcher="symm_mem",
    )  # fmt: skip
    torch.manual_seed(rank)
    dtype = torch.float32 if fp8 == "off" else torch.bfloat16
    layer = MoELayer(config, make_groups(ranks), device=device, dtype=dtype)
    layer(torch.randn(40, 128, device=device).to(dtype))
    own = layer.dispatcher.link.buffer  # type: ignore[attr-defined]
    for tokens in (17, 0):
        hidden, results = torch.randn(tokens + 3 * rank, 128, device=device).to(dtype), []
        for bounded in (False, True):
            leaf = hidden.clone().requires_grad_()
            layer.zero_grad()
            with patch.object(symm_mem, "_captured", lambda _, bounded=bounded: bounded):
                output = layer(leaf)
                output.square().sum().backward()
            results.append((output, leaf.grad, *(w.grad for w in layer.parameters())))
            dist.barrier()
            own.peers.buffers[own.rank].fill_(255)  # not a number
            dist.barrier()
        assert_equal(results[1], results[0], f"{tokens} tokens, fp8 {fp8}")
    return len(results[0])


def goes_there_and_back(device: str) -> int:
    """The exchange of schedule chunked by itself: every rank returns what it got."""
    ranks = dist.get_world_size()
    dispatcher: Any = both(make_groups(ranks))[1]
    ids = random_ids("random", 11, 3, seed=2).to(device)
    hidden, probs = leaves(ids, 8, torch.float32)
    routing = Routing(ids, probs, count(ids, EXPERTS))
    inbox, returned = exchange_alone(dispatcher, hidden, routing)
    returned.backward(torch.ones_like(returned))
    wanted = ranks * hidden.detach(), torch.full_like(hidden, ranks), torch.full_like(probs, ranks)
    torch.testing.assert_close((returned.detach(), hidden.grad, probs.grad), wanted)
    assert len(inbox.expert_ids) == ranks * dispatcher.most_tokens
    return len(ids)


def grows(device: str) -> list[int]:
    """A layer that needs more gets more, before what an earlier layer kept goes back."""
    groups = make_groups(dist.get_world_size())
    buffer, sizes, results = groups.shared, [], []
    for dispatcher in both(groups):
        small, large = (random_ids("random", tokens, 2, seed=3) for tokens in (4, 900))
        kept, outputs = [], []
        for ids in (small, large, small):
            hidden, probs = leaves(ids.to(device), 512, torch.float32)
            outputs.append(block(dispatcher, ids.to(device), hidden, probs))
            kept += [hidden, probs]
            if "buffer" in buffer and hasattr(dispatcher, "link"):
                sizes.append(buffer["buffer"].num_bytes)
        torch.stack([output.square().sum() for output in outputs]).sum().backward()
        results.append((*outputs, *(leaf.grad for leaf in kept)))
    assert_equal(results[1], results[0], "grows")
    return sizes
