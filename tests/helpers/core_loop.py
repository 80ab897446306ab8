"""Train over megatron-core alone, with its own schedule, DDP and optimizer, at many layouts.

python core_loop.py WANTED.json RESULTS.json

WANTED has "cases", each a `Case` as a dictionary, the "iterations" of each, and "checks", names of
`release_checks.CHECKS`.
A case's result is {"values": [one dictionary of scalars for each iteration]}, a check's {}, or
{"error": text}. Imports happen once: every world of ranks is forked.
"""

import itertools
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from core_model import (
    LENGTH,
    Case,
    batches,
    build,
    fill,
    forward_step,
    in_gpt,
    magnitudes,
    transformer_config,
)
from forked import connect, run_world

LOSSES = ["load_balancing_loss", "z_loss"]


def main() -> None:
    """Run every check and case of the file."""
    from release_checks import CHECKS

    from ep_plugin.megatron.block import adapter
    from ep_plugin.megatron.seams.install import install, uninstall
    from ep_plugin.megatron.settings import EdgeSettings

    logging.disable(logging.WARNING)
    wanted = json.loads(Path(sys.argv[1]).read_text())
    results = {name: run_world(1, CHECKS[name]) for name in wanted["checks"]}
    cases = [Case(**(case | {"experts": tuple(case["experts"])})) for case in wanted["cases"]]
    kinds = itertools.groupby(cases, lambda case: (case.block, case.experts))
    for (block, experts), group in kinds:
        if block == "stock":
            without_the_plugin()
        else:
            install(EdgeSettings(metrics=True, experts_per_layer=experts or None))
        if block == "untagged":
            adapter.set_tags = without_norm_tags(adapter.set_tags)
        for case in group:
            results[case.name] = run_world(case.world, train_and_keep, case, wanted["iterations"])
        uninstall()
    Path(sys.argv[2]).write_text(json.dumps(results))


def without_the_plugin() -> None:
    """Let Megatron's own MoE layer run on the CPU."""
    from megatron.core.transformer.moe import moe_utils

    from ep_plugin.megatron.cpu import mode as cpu_mode

    cpu_mode.enable()
    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16 forgets it without Transformer Engine
        moe_utils.te_general_gemm = None


def without_norm_tags(set_tags: Callable[..., None]) -> Callable[..., None]:
    """Tag experts as Megatron's grouped ones are until 0.18, which its norm then omits (#5916)."""

    def tag(replicated: Any, experts: Any, *rest: Any) -> None:
        set_tags(replicated, experts, *rest)
        for parameter in experts.parameters():
            parameter.tensor_model_parallel = False

    return tag


def train_and_keep(case: Case, iterations: int) -> dict[str, Any]:
    """Train one case on this rank of its world."""
    connect()
    values = train(case, iterations)
    dist.barrier()
    dist.destroy_process_group()
    return {"values": values}


def train(case: Case, iterations: int) -> list[dict[str, float]]:
    """Train this rank's part and return what every rank knows of each iteration."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    parallel_state.destroy_model_parallel()  # of a case before, in the same process
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=case.tp,
        context_parallel_size=case.cp,
        pipeline_model_parallel_size=case.pp,
        virtual_pipeline_model_parallel_size=case.vpp,
        expert_model_parallel_size=case.ep,
        expert_tensor_parallel_size=case.etp,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = transformer_config(case)
    models = [build(config, stage) for stage in (range(case.vpp) if case.vpp else (None,))]
    for model in models:
        fill(model)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=case.distributed_optimizer,
        overlap_grad_reduce=case.overlap,
    )
    chunks = [DistributedDataParallel(config, ddp, model) for model in models]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=2e-3,
            min_lr=2e-3,
            weight_decay=0.01,
            clip_grad=0.5,
            use_distributed_optimizer=case.distributed_optimizer,
        ),
        chunks,
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    step = get_forward_backward_func()
    dp, dp_rank = (
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_data_parallel_rank(),
    )
    cp_rank = parallel_state.get_context_parallel_rank()
    values = []
    for iteration in range(iterations):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        sums = step(
            forward_step_func=forward_step,
            data_iterator=[batches(case, iteration, dp_rank, dp, cp_rank) for _ in chunks],
            model=chunks,
            num_microbatches=case.sequences // dp,
            seq_length=LENGTH,
            micro_batch_size=1,
        )
        found = {"experts' gradients": expert_norm(case, chunks)}
        if not case.distributed_optimizer:  # with it ranks hold reduced shards alone
            found |= magnitudes(models, "grad")
        _, found["gradient norm"], _ = optimizer.step()
        total = torch.stack([torch.zeros(2), *(part["lm loss"] for part in sums)]).sum(0)
        dist.all_reduce(total)  # of last stages; those of one TP group report the same
        found["loss"] = float(total[0] / total[1])
        found |= magnitudes(models, "weight")
        values.append(found | report(config, iteration, case.sequences // dp))
    return values


def expert_norm(case: Case, chunks: list[Any]) -> float:
    """Return the norm of all experts' gradients; 0 where ranks hold reduced shards alone."""
    from megatron.core import parallel_state

    squares = torch.zeros((), dtype=torch.float64)
    if not case.distributed_optimizer:
        for name, parameter in (pair for chunk in chunks for pair in chunk.named_parameters()):
            if ".experts." in name and "fc2.bias" not in name:
                copies = getattr(parameter, "copies", None)
                times = 1 if copies is None else copies.size()
                squares += parameter.main_grad.double().pow(2).sum() / times
    dist.all_reduce(squares)
    return float((squares / parallel_state.get_expert_data_parallel_world_size()).sqrt())


class Scalars(dict[str, float]):
    """A TensorBoard writer that keeps what is written."""

    def add_scalar(self, name: str, value: Any, iteration: int) -> None:
        """Keep a scalar."""
        self[name] = float(value)


def report(config: Any, iteration: int, num_microbatches: int) -> Scalars:
    """Return what Megatron reports of the MoE layers, and the plugin beside it."""
    from megatron.core.transformer.moe import moe_utils

    writer = Scalars()
    if hasattr(moe_utils, "get_moe_layer_wise_logging_tracker"):
        write = moe_utils.track_moe_metrics
    else:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

        write = get_moe_metrics_tracker().report
    write(
        loss_scale=1 / num_microbatches,
        iteration=iteration,
        writer=writer,
        force_initialize=True,
        track_names=LOSSES,
        num_layers=config.pattern.count("E") or config.num_layers,  # as Megatron's loop does
        moe_layer_freq=config.moe_layer_freq,
    )
    named = {in_gpt(name, config.pattern): value for name, value in writer.items()}
    return Scalars(named)


if __name__ == "__main__":
    main()
