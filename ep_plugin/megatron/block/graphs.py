"""Megatron's CUDA graphs over our blocks: what can be captured, and what never waits for the host.

Megatron captures whole iterations (`--cuda-graph-impl full_iteration`), whole layers
(`transformer_engine` without modules; one graph for each micro-batch under way), or parts of a
layer. In the first two a block must not wait for the host, which leaves `symm_mem`, or one rank of
ep and etp; and grouped GEMMs that do not wait (`moe/experts/fits.py`). Parts that Megatron cuts its
own MoE layer into do not exist in ours.
"""

import sys
from typing import Any
from weakref import WeakSet

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments import captures
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.edge_settings import EdgeSettings
from ep_plugin.moe.config import GRAPH_RANKS
from ep_plugin.moe.rules import own

OUTSIDE = ("attn", "mlp", "mamba")  # modules of Megatron's layers that are not ours
_LAYERS: WeakSet[Any] = WeakSet()  # Megatron's helpers that have captured layers


def check_graphs(config: Any, settings: EdgeSettings) -> None:
    """Raise ConfigError for a graph of a TransformerConfig, or of arguments, that cannot be."""
    impl = getattr(config, "cuda_graph_impl", None) or "none"
    if impl == "none":
        return
    if cpu_mode.active():
        raise ConfigError(f"--cuda-graph-impl ({impl}) needs a GPU; use --cuda-graph-impl none")
    modules = captures.modules(config)
    if captures.captures_blocks(config):
        _check_captured(config, settings, impl)
    elif not modules or not set(modules) <= set(OUTSIDE):
        raise ConfigError(
            f"--cuda-graph-impl ({impl}) of {', '.join(modules) or 'whole layers'} would capture "
            f"parts of an MoE layer that ep_plugin's does not have; name attn, mlp and mamba "
            "alone, or use --cuda-graph-impl full_iteration, or transformer_engine without modules"
        )


def note_layers(helper: Any) -> None:
    """Note the TECudaGraphHelper whose graphs `end_graphs` is to free."""
    _LAYERS.add(helper)


def end_graphs() -> None:
    """Free graphs: until then NCCL's groups cannot end, and Python waits.

    Megatron keeps those of whole iterations for as long as the process lives, and those of layers
    where its loop ends by an exception.
    """
    for helper in _LAYERS:
        if helper.graphs_created():
            helper.delete_cuda_graphs()
    module = sys.modules.get("megatron.core.full_cuda_graph")
    if module is None:
        return
    graphs = module.FullCudaGraphWrapper.cuda_graph
    for stage, graph in graphs.items():
        if graph is not None:
            graph.reset()
            graphs[stage] = None


def _check_captured(config: Any, settings: EdgeSettings, impl: str) -> None:
    etp = config.expert_tensor_parallel_size or config.tensor_model_parallel_size
    ranks = config.expert_model_parallel_size * etp
    sent = ranks > 1 and not own(settings.dispatcher)
    if sent and settings.dispatcher not in ("auto", "symm_mem"):
        raise ConfigError(
            f"--cuda-graph-impl {impl} needs a dispatcher that does not wait for the host; "
            f"got {settings.dispatcher}; use --ep-dispatcher symm_mem"
        )
    if sent and ranks > GRAPH_RANKS:
        raise ConfigError(
            f"--cuda-graph-impl {impl} needs at most {GRAPH_RANKS} ranks of ep and etp; "
            f"got {ranks}; use --cuda-graph-impl none"
        )
    by_layer = captures.captures_layers(config)
    if (sent or by_layer) and getattr(config, "cuda_graph_warmup_steps", 1) == 0:
        raise ConfigError(
            f"--cuda-graph-warmup-steps (0) beside --cuda-graph-impl {impl} captures before any "
            "step has shown how many tokens ranks exchange, and how losses are scaled; use "
            "--cuda-graph-warmup-steps 1"
        )
    trained = getattr(config, "micro_batch_size", None) or 0  # 0: not of arguments
    evaluated = getattr(config, "eval_micro_batch_size", None) or 0
    if sent and evaluated > trained > 0:
        raise ConfigError(
            f"--eval-micro-batch-size ({evaluated}) above --micro-batch-size ({trained}) needs "
            "larger buffers for the exchange than those that a graph was captured with; use "
            f"--eval-micro-batch-size {trained}, or --cuda-graph-impl none"
        )
    _check_draws(config, settings)
    if by_layer:
        _check_layers(config, settings, impl)
    elif config.calculate_per_token_loss and config.pipeline_model_parallel_size > 1:
        raise ConfigError(
            "--cuda-graph-impl full_iteration cannot hold --calculate-per-token-loss over several "
            "pipeline stages, which tell each other the number of tokens through the host; use "
            "--cuda-graph-impl none"
        )


def _check_layers(config: Any, settings: EdgeSettings, impl: str) -> None:
    """Raise ConfigError for what graphs of whole layers cannot hold."""
    if getattr(config, "mtp_use_repeated_layer", False) and (config.mtp_num_layers or 0) > 1:
        raise ConfigError(
            f"--cuda-graph-impl {impl} of whole layers has one graph of a layer, and "
            "--mtp-use-repeated-layer passes it several times before its backward; use "
            "--cuda-graph-impl full_iteration, or none"
        )
    combined = getattr(config, "overlap_moe_expert_parallel_comm", False)
    if combined or settings.overlap == "two_batch":
        raise ConfigError(
            f"--cuda-graph-impl {impl} of whole layers cannot be beside the schedule for two "
            "micro-batches, which takes layers apart; use --cuda-graph-impl none, or "
            "--ep-overlap serial without --overlap-moe-expert-parallel-comm"
        )
    if config.calculate_per_token_loss:
        raise ConfigError(
            f"--cuda-graph-impl {impl} of whole layers cannot hold --calculate-per-token-loss: "
            "auxiliary losses weigh by a micro-batch's number of tokens, which a graph of one "
            "layer would keep from its capture; use --cuda-graph-impl full_iteration, or none"
        )


def _check_draws(config: Any, settings: EdgeSettings) -> None:
    """Raise ConfigError where a captured router would draw anew when it is computed again."""
    again = getattr(config, "recompute_granularity", None) == "selective" and "moe" in (
        getattr(config, "recompute_modules", None) or ()
    )
    routing = settings.routing
    second = routing.get("second_expert", "all")
    forced = getattr(config, "moe_router_force_load_balancing", False)
    drawn = {
        "--ep-drop-policy random": routing.get("drop_policy") == "random",
        f"--ep-second-expert {second}": second in ("random", "sampling"),
        "--ep-noise rsample": routing.get("noise", "none") != "none",
        "--moe-router-force-load-balancing": forced or routing.get("force_load_balancing", False),
    }
    for flag, given in drawn.items():
        if again and given:
            raise ConfigError(
                f"{flag} draws, and in a CUDA graph a router that --recompute-modules moe computes "
                "again would draw otherwise; use --ep-save recompute in place of "
                "--recompute-modules moe, or --cuda-graph-impl none"
            )
