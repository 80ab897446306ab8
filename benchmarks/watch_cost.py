"""What the places of a rank and the thread that watches them cost a layer's step, in one run.

    python benchmarks/watch_cost.py [--device cpu|cuda] [--tokens 2048] [--rounds 15]

Rounds of eager steps, and on CUDA of replays of a CUDA graph, alternate: with (places entered, a
watcher with a store beside it) and without (nothing entered, no watcher). Prints one JSON line: the
median of each in ms, and the median of the rounds' ratios.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ep_plugin import MoEConfig, MoELayer, RoutingConfig
from ep_plugin.moe.watch.place import Place
from ep_plugin.moe.watch.watcher import Watcher

REAL = Place.enter_layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    eager = step_of(args.device, args.tokens, in_graph=False)
    results: dict[str, Any] = {"eager": compare(eager, args.rounds, args.device)}
    if args.device == "cuda":
        results["graph"] = compare(
            graph_of(step_of(args.device, args.tokens, in_graph=True)), args.rounds, args.device
        )
        results["gpu"] = torch.cuda.get_device_name()
    print(json.dumps({"device": args.device, "tokens": args.tokens, **results}))


def step_of(device: str, tokens: int, in_graph: bool) -> Callable[[], None]:
    """Return a forward and backward of one layer, on one rank."""
    on_gpu = device == "cuda"
    dtype, sizes = (torch.bfloat16, (2048, 1408, 16)) if on_gpu else (torch.float32, (64, 64, 8))
    hidden, ffn, experts = sizes
    config = MoEConfig(
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_experts=experts,
        routing=RoutingConfig(topk=2),
        activation="swiglu",
        in_graph=in_graph,
    )
    layer = MoELayer(config, device=device, dtype=dtype)
    rows = torch.randn(tokens, hidden, device=device, dtype=dtype, requires_grad=True)
    grads = torch.randn_like(rows)

    def step() -> None:
        layer(rows).backward(grads)

    return step


def graph_of(step: Callable[[], None]) -> Callable[[], None]:
    """Return the replay of a step that was captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


def compare(step: Callable[[], None], rounds: int, device: str) -> dict[str, float]:
    """Return the medians with and without, in ms, and of their ratio."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    for _ in range(5):
        step()
    with_it, without = [], []
    for _ in range(rounds):
        watcher = Watcher(store.clone(), rank=0, ranks=8, after=20.0, slow=600.0, keeper="")
        watcher.start()
        with_it.append(time_of(step, device))
        watcher.end()
        Place.enter_layer = lambda place, code: None  # type: ignore[method-assign]
        without.append(time_of(step, device))
        Place.enter_layer = REAL  # type: ignore[method-assign]
    ratios = [a / b for a, b in zip(with_it, without, strict=True)]
    medians = [round(statistics.median(values), 4) for values in (with_it, without, ratios)]
    return dict(zip(("with_ms", "without_ms", "ratio"), medians, strict=True))


def time_of(step: Callable[[], None], device: str, steps: int = 50) -> float:
    """Return the ms of a step."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    step()
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return (time.perf_counter() - start) / steps * 1000


if __name__ == "__main__":
    main()
