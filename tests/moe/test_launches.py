"""What a layer's forward and backward have the host do: launches, other operations, tensors made.

A step outside of a CUDA graph can take no less time than the host. Counts do not depend on the
machine, so they are exact; a change that lowers one of them changes the table with it.
"""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton")
from fake_gpu import counting, fake_gpu

from ep_plugin import MoEConfig
from ep_plugin.moe.dispatcher import symm_mem
from ep_plugin.moe.experts.gemm import triton as triton_gemm
from ep_plugin.moe.layer import MoELayer
from ep_plugin.moe.routing_config import RoutingConfig

ROUTING = RoutingConfig(topk=2, aux_loss_coeff=0.01)
SIZES: dict[str, Any] = {"hidden_size": 64, "ffn_hidden_size": 64, "num_experts": 8}
BF16: dict[str, Any] = {"gemm": "torch_grouped"}
FP8: dict[str, Any] = {"fp8": "rowwise"}

# Settings, whether gradients are added to fp32 totals -> kernels of ours and products; other
# kernels of torch's; allocations and views.
COUNTS: dict[str, tuple[dict[str, Any], bool, tuple[int, int, int]]] = {
    "bf16": (BF16, False, (24, 4, 48)),
    "bf16, added": (BF16, True, (24, 4, 46)),
    "bf16, recomputed": ({**BF16, "save": "recompute"}, False, (26, 4, 51)),
    "bf16, by our products": ({"gemm": "triton"}, False, (25, 4, 49)),
    "rowwise": (FP8, False, (39, 6, 80)),
    "rowwise, added": (FP8, True, (39, 6, 80)),
    "blockwise": ({"fp8": "blockwise"}, False, (32, 4, 71)),
}


class Sums:
    """Totals of both weights, as a training loop has them."""

    def __init__(self, layer: MoELayer) -> None:
        weights = (layer.experts.linear_fc1.weight, layer.experts.linear_fc2.weight)
        self.fc1, self.fc2 = (torch.zeros_like(w, dtype=torch.float32) for w in weights)

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.fc1, self.fc2


def make_layer(settings: dict[str, Any], added: bool) -> MoELayer:
    layer = MoELayer(MoEConfig(**SIZES, routing=ROUTING, **settings), dtype=torch.bfloat16)
    layer._routing_checked = True  # by values, which there are none of
    if added:
        layer.experts.totals = Sums(layer)
    return layer


@pytest.mark.parametrize("case", COUNTS)
def test_a_step_launches_and_makes_no_more_than_this(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, added, expected = COUNTS[case]
    monkeypatch.setattr(triton_gemm, "on_hopper", lambda: True)
    layer = make_layer(settings, added)
    tokens = torch.randn(16, 2, 64, dtype=torch.bfloat16, requires_grad=True)  # [S, B, H]
    with fake_gpu() as gpu:
        layer(tokens).sum().backward()  # compiles
        for leaf in (tokens, *layer.parameters()):
            leaf.grad = None
        with counting(gpu):
            output = layer(tokens)
        forward = gpu.numbers()
        with counting(gpu):
            output.backward(torch.empty_like(output))
        backward = gpu.numbers()
    found = tuple(a + b for a, b in zip(forward, backward, strict=True))
    assert found == expected, f"{case}: {found} now: forward {forward}, backward {backward}"


@pytest.mark.parametrize("captured", [False, True])
def test_symm_mem_plans_and_receives_with_few_launches(captured: bool) -> None:
    """All but the exchange: what goes where; then what is this rank's, and its backward."""
    buffer: Any = SimpleNamespace(rank=1, ranks=4)
    groups: Any = SimpleNamespace(ep_etp=buffer, ep_size=4, ep_rank=1, etp_size=1)
    ids = torch.zeros(16, 2, dtype=torch.int64)
    probs = torch.rand(16, 2, requires_grad=True)
    found = []
    with (
        fake_gpu() as gpu,
        patch.object(symm_mem, "shared_buffer", lambda groups: buffer),
        patch.object(symm_mem, "all_gather_single", lambda *args, group: None),
        patch.object(symm_mem, "_captured", lambda tensor: captured),
    ):
        dispatcher = symm_mem.SymmetricMemoryDispatcher(8, groups, comm_sms=1)
        for _ in range(2):  # the first compiles
            dispatcher.most_tokens, probs.grad = len(ids), None
            with counting(gpu):
                sends = dispatcher._plan(ids)
            found.append(gpu.numbers())
            with counting(gpu):
                own = dispatcher._own(ids, probs, sends.came)
            found.append(gpu.numbers())
            grads = torch.empty_like(probs)
            with counting(gpu):
                own[1].backward(grads)
            found.append(gpu.numbers())
    assert found[3:] == [(3, 0, 7 if captured else 6), (1, 1, 2), (1, 0, 1)]
