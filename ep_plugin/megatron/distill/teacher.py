"""The teacher: built and loaded once in its own layout, run without gradients, forgotten after."""

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.models.gpt import moe_module_specs as specs
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.module import Float16Module
from megatron.training import arguments as megatron_arguments
from torch import Tensor

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.checks import settings_from_args
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.cpu.latent_attention import use_local_latent_attention
from ep_plugin.megatron.distill.fits_student import Plan
from ep_plugin.megatron.distill.teacher_layout import Groups
from ep_plugin.megatron.workers import saved_model
from ep_plugin.megatron.workers.foreign import as_megatron_loads

# What the teacher takes from the student's run: precision and software, nothing of the model.
_OF_THE_RUN = ("params_dtype", "bf16", "fp16", "transformer_impl", "attention_backend")


class Teacher:
    """A model in evaluation mode that gives logits for the student's micro-batches."""

    def __init__(self, plan: Plan, run: Any) -> None:
        """Build and load it; every rank must call it together, with the run's arguments."""
        self._plan, self._tp = plan, parallel_state.get_tensor_model_parallel_world_size()
        self._groups = Groups(plan.layout, run.distributed_timeout_minutes)
        with _generators_kept(), self._groups.inside():
            self._model = _load(plan, run)

    def parameters(self) -> Iterator[Tensor]:
        """Yield its parameters on this rank."""
        yield from self._model.parameters()

    def release(self) -> None:
        """Forget the weights and destroy the process groups; every rank must call it together.

        Nothing else may be called after it.
        """
        del self._model
        gc.collect()  # modules refer to each other; buffers go before the groups that they are of
        self._groups.destroy()
        torch.cuda.empty_cache()

    @torch.no_grad()
    def logits(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None, width: int, **more: Any
    ) -> Tensor:
        """Return [S, B, width]: the student's slice of the vocabulary, for this rank's micro-batch.

        `tokens`, `positions` [B, S]; `mask` as Megatron's models take it; `width`: V / ranks of the
        student's slice. Every rank must call it together.
        """
        group, layout = self._groups.tp, self._plan.layout
        rank = dist.get_rank()
        batches = layout.batches(rank, self._tp)
        if len(batches) > 1 and any(value is not None for value in more.values()):
            raise ConfigError(
                "--ep-teacher-layout: micro-batches with packed sequences are not exchanged; use "
                f"tp={self._tp} in it"
            )
        own, found = rank // self._tp, None
        for source in batches:
            inputs = [tokens, positions, mask]
            if len(batches) > 1:
                inputs = [_from(value, source, group) for value in inputs]
            with self._groups.inside():
                part = self._model(*inputs, **more).transpose(0, 1)
                whole = self._slice(part, width)
            if source // self._tp == own:
                found = whole
        assert found is not None
        return found

    def _slice(self, part: Tensor, width: int) -> Tensor:
        """Return the student's slice of what the teacher's ranks hold in slices of their own."""
        group, ranks = self._groups.tp, self._plan.layout.tp
        if ranks == self._tp and part.shape[-1] == width:
            return part
        whole = part.contiguous()
        if ranks > 1:
            parts = [torch.empty_like(whole) for _ in range(ranks)]
            dist.all_gather(parts, whole, group=group)
            whole = torch.cat(parts, dim=-1)
        first = dist.get_rank() % self._tp * width
        ours = whole[..., first : first + width]
        return torch.nn.functional.pad(ours, (0, width - ours.shape[-1]))  # rows that pad


def _from(value: Tensor | None, source: int, group: dist.ProcessGroup) -> Any:
    """Return `value` of rank `source`; it has the same shape on all ranks of the group."""
    if value is None:
        return None
    sent = value.contiguous().clone()
    if sent.dtype == torch.bool:
        sent = sent.to(torch.uint8)
    dist.broadcast(sent, source, group=group)
    return sent.to(value.dtype)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Leave every random-number generator as it was: the student's draws are its own."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = copy.deepcopy(tracker.get_states()) if tracker.is_initialized() else None
    cpu, device = torch.get_rng_state(), torch.cuda.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state(device)
        if states is not None:
            tracker.set_states(states)


def _load(plan: Plan, run: Any) -> Any:
    with as_megatron_loads(plan.folder, None) as view:
        common = dist_checkpointing.load_common_state_dict(str(view))
        with _own_class(plan, common["args"], run) as args:
            model = _build(args)
        metadata = common.get("content_metadata") or {}
        same_names = getattr(plan.args, "transformer_impl", None) == args.transformer_impl
        saved_model.load_weights(model, view, metadata, same_names)
    if not cpu_mode.active():
        model = model.cuda()
    if args.fp16 or args.bf16:
        model = Float16Module(model.config, model)
    for parameter in model.parameters():
        parameter.requires_grad = False
    return model.eval()


@contextmanager
def _own_class(plan: Plan, saved: Any, run: Any) -> Iterator[Any]:
    """Yield the teacher's arguments, from those that were `saved`.

    MoE layers that are built inside have its own settings. They share neither groups nor metrics
    with the student's.
    """
    students: Any = specs.MoELayer
    before = {name: getattr(students, name, None) for name in ("parser", "known")}
    args = saved_model.plain(saved)
    for name, value in before.items():
        setattr(students, name, value)
    for name in _OF_THE_RUN:
        if hasattr(run, name):
            setattr(args, name, getattr(run, name))
    args.tensor_model_parallel_size = plan.layout.tp
    args.expert_model_parallel_size = plan.layout.ep
    args.expert_tensor_parallel_size = plan.layout.etp
    args.world_size = run.world_size
    settings = settings_from_args(args)
    fields: dict[str, Any] = {"settings": settings, "tracker": None, "shared": {}, "typed": None}
    specs.MoELayer = type("MoELayer", (students,), fields)
    kept, students.settings = students.settings, settings  # its activation, in every layer
    try:
        yield args
    finally:
        specs.MoELayer, students.settings = students, kept


def _build(args: Any) -> Any:
    """Return the model of these arguments, with weights that are not set yet."""
    config = megatron_arguments.core_transformer_config_from_args(args)
    engine = args.transformer_impl == "transformer_engine"
    spec = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=engine,
        normalization=args.normalization,
        qk_l2_norm=bool(getattr(args, "qk_l2_norm", False)),
    )
    if config.multi_latent_attention and not engine:
        use_local_latent_attention(spec)
    return saved_model.of_layers(spec, config, args)
