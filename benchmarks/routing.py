"""Time the router's kernels against plain torch on one GPU, in one run; prints and writes JSON.

python benchmarks/routing.py [--tokens 8192] [--experts 256] [--topk 8] [--hidden 7168] [--output F]
"""

import argparse
import json
import statistics
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ep_plugin import ExpertGroups, MoEConfig, RoutingConfig
from ep_plugin.commands.bench.figures import versions
from ep_plugin.moe.kernels.gate import gate_logits
from ep_plugin.moe.router._choice import Choice, choose
from ep_plugin.moe.router.topk import TopKRouter

REPEATS = 50


def microseconds(variants: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median time of each variant on the GPU, interleaved, behind a flushed L2 cache.

    Each is captured into a CUDA graph, so that launching from Python is not what is timed.
    """
    graphs = {}
    for name, function in variants.items():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            function()
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    seen: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(REPEATS + 5):
        for name, graph in graphs.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if repeat >= 5:
                seen[name].append(start.elapsed_time(end) * 1e3)
    return {name: statistics.median(times) for name, times in seen.items()}


def router_variants(args: argparse.Namespace, **capacity: Any) -> dict[str, Callable[[], object]]:
    """From logits to routing, forward and with the backward: the kernel and its twin."""
    routing = RoutingConfig(topk=args.topk, aux_loss_coeff=0.01, z_loss_coeff=1e-3, **capacity)
    suffix = f", capacity {capacity['drop_policy']}" if capacity else ""
    config = MoEConfig(
        hidden_size=args.experts, ffn_hidden_size=1, num_experts=args.experts, routing=routing
    )
    logits = torch.randn(args.tokens, args.experts, device="cuda").requires_grad_()
    seed = torch.randn(args.tokens, args.topk, device="cuda")

    class FromLogits(TopKRouter):
        def logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return hidden, hidden

    class Plain(FromLogits):
        def _choose(
            self, logits: torch.Tensor, num_sequences: int, padding: torch.Tensor | None
        ) -> Choice:
            return choose(logits, self.routing, self.expert_bias, self.training)

    def forward(router: TopKRouter) -> Callable[[], object]:
        return lambda: router(logits)

    def both(router: TopKRouter) -> Callable[[], object]:
        return lambda: torch.autograd.grad(router(logits).probs, logits, seed)

    routers = {"ep_plugin": FromLogits, "torch": Plain}
    made = {name: kind(config, ExpertGroups(), device="cuda") for name, kind in routers.items()}
    return {f"routing forward {name}{suffix}": forward(router) for name, router in made.items()} | {
        f"routing forward+backward {name}{suffix}": both(router) for name, router in made.items()
    }


def gate_variants(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Logits with fp32 accuracy: through bf16 parts, and as torch's fp32 product."""
    hidden = torch.randn(args.tokens, args.hidden, device="cuda").bfloat16()
    weight = torch.randn(args.experts, args.hidden, device="cuda") / args.hidden**0.5
    wide = hidden.float()
    return {
        "gate bf16 weight ep_plugin": lambda: gate_logits(hidden, weight.bfloat16())[0],
        "gate fp32 weight ep_plugin": lambda: gate_logits(hidden, weight)[0],
        "gate torch fp32 matmul": lambda: wide @ weight.T,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("tokens", 8192), ("experts", 256), ("topk", 8), ("hidden", 7168)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    variants = router_variants(args)
    for policy in ("position", "probs"):
        variants |= router_variants(args, capacity_factor=1.0, drop_policy=policy)
    times = microseconds(variants | gate_variants(args))
    for name, value in times.items():
        print(f"{value:9.1f} us  {name}")
    record = {
        "bench": "routing",
        "shape": {n: getattr(args, n) for n in ("tokens", "experts", "topk", "hidden")},
        "microseconds": {name: round(value, 1) for name, value in times.items()},
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    if args.output is not None:
        args.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
