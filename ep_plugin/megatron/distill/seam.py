"""Where a teacher enters Megatron's loop.

The student's loss of each token keeps its value, the cross entropy, so `lm loss` stays what it was;
its gradient is that of cross entropy + weight * T^2 * KL. So the script's loss function masks and
averages both alike, whatever it does. The divergence is logged as `distillation loss`.
"""

import inspect
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.distill.kl import Counted, divergence, with_gradient_of
from ep_plugin.megatron.seams.patches import Patches
from ep_plugin.megatron.seams.refusal import refuse

TRAINING = "megatron.training.training"
GPT_MODEL = "megatron.core.models.gpt.gpt_model:GPTModel.forward"
LOSS = (
    "megatron.core.models.common.language_module.language_module:"
    "LanguageModule.compute_language_model_loss"
)
LOGGED = "distillation loss"
ADVANCED = "advanced iterations"  # Megatron's key for the steps of an interval so far
_FORWARD = ("input_ids", "position_ids", "attention_mask")
_ALL = (*_FORWARD, "decoder_input", "labels")  # in the order of every release
_PASSED_ON = ("packed_seq_params", "padding_mask")

_NO_LOSS = ConfigError(
    "--ep-teacher joins the loss that Megatron's model computes of its labels, and this script's "
    "forward step gives the model none; give it labels=..., or leave --ep-teacher out"
)


class Distillation:
    """One process's teacher, and where the run stands."""

    def __init__(self) -> None:
        self.plan: Any = None
        self.teacher: Any = None
        self.inputs: dict[str, Any] | None = None  # of the student's forward that is under way
        self.counted = Counted()

    def set_up(self, original: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
        """Load the teacher once the student is built and its checkpoint loaded."""
        result = original(*rest, **kwargs)
        args = import_module("megatron.training").get_args()
        if self.plan is not None or getattr(args, "ep_teacher", None) is None:
            return result  # the first model is the trained one
        import_module("ep_plugin.megatron.arguments.resume").note_vocabulary(args)
        try:
            self.plan = import_module("ep_plugin.megatron.distill.fits_student").check_teacher(args)
            if not is_on(args):
                _say(f"{stopped(args)}; the teacher is not loaded")
            elif not args.skip_train:
                module = import_module("ep_plugin.megatron.distill.teacher")
                self.teacher = module.Teacher(self.plan, args)
                _say(described(args, self.plan, self.teacher))
        except ConfigError as error:
            refuse(error)
        return result

    def step(self, original: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
        """Take one training step, with the teacher while the run is not past its stop."""
        if self.teacher is None:
            return original(*rest, **kwargs)
        args = import_module("megatron.training").get_args()
        if not is_on(args):
            teacher, self.teacher = self.teacher, None
            teacher.release()
            _say(f"{stopped(args)}; the teacher is gone, with its memory and its communicators")
            return original(*rest, **kwargs)
        losses, *others = original(*rest, **kwargs)
        state = import_module("megatron.core.parallel_state")
        group = state.get_data_parallel_group(with_context_parallel=True)
        mean = self.counted.take(group, torch.device(torch.cuda.current_device()))
        if losses:
            losses = {**losses, LOGGED: mean}
        return (losses, *others)

    def log(self, original: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
        """Log a step; the mean of an interval is that of its distilled steps, if it has any."""
        given = inspect.signature(original).bind(*rest, **kwargs).arguments
        totals = given["total_loss_dict"]
        if LOGGED in totals and LOGGED not in given["loss_dict"]:
            steps = totals.get(ADVANCED, 0)
            if not steps:
                del totals[LOGGED]
            elif not given["skipped_iter"]:  # which Megatron is about to count
                totals[LOGGED] = totals[LOGGED] * (steps + 1) / steps
        return original(*rest, **kwargs)

    def forward(self, original: Callable[..., Any], model: Any, *rest: Any, **kwargs: Any) -> Any:
        """Note what the student is given; its loss asks the teacher."""
        if self.teacher is None or not model.training or not torch.is_grad_enabled():
            return original(model, *rest, **kwargs)
        self.inputs = {**dict(zip(_ALL, rest, strict=False)), **kwargs}
        try:
            found = original(model, *rest, **kwargs)
            if self.inputs is not None:
                refuse(_NO_LOSS)
            return found
        finally:
            self.inputs = None

    def loss(self, original: Callable[..., Any], model: Any, labels: Tensor, logits: Tensor) -> Any:
        """Return the cross entropy [B, S], with the gradient of the whole loss."""
        inputs = self.inputs
        if inputs is None or self.teacher is None or labels is not inputs["labels"]:
            return original(
                model, labels, logits
            )  # evaluation, or a head of multi-token prediction
        self.inputs = None
        args = import_module("megatron.training").get_args()
        more = {name: inputs[name] for name in _PASSED_ON if inputs.get(name) is not None}
        given = (inputs[name] for name in _FORWARD)
        try:
            theirs = self.teacher.logits(*given, width=logits.shape[-1], **more)
        except ConfigError as error:
            refuse(error)
        state = import_module("megatron.core.parallel_state")
        tp = state.get_tensor_model_parallel_group()
        # Before the cross entropy, which overwrites logits in float32.
        apart = divergence(
            *(logits, theirs, args.ep_distill_temperature, self.plan.vocabulary),
            tp if tp.size() > 1 else None,
        ).transpose(0, 1)
        loss = original(model, labels, logits)
        whole = with_gradient_of(loss, args.ep_distill_weight * apart)
        if whole.requires_grad:
            self.counted.watch(whole, apart)
        return whole


def is_on(args: Any) -> bool:
    """Whether the next step is distilled: its samples lie before the stop."""
    total = args.train_samples or (args.train_iters or 0) * args.global_batch_size
    return bool(args.consumed_train_samples < args.ep_distill_stop * total)


def stopped(args: Any) -> str:
    """Return where distillation ended."""
    return (
        f"distillation has ended: {args.consumed_train_samples} samples are past --ep-distill-stop "
        f"{args.ep_distill_stop:g} of the run"
    )


def described(args: Any, plan: Any, teacher: Any) -> str:
    """Return what was loaded."""
    size = sum(value.numel() * value.element_size() for value in teacher.parameters())
    layout = plan.layout
    return (
        f"teacher {plan.folder}: tp={layout.tp}, ep={layout.ep}, etp={layout.etp}, "
        f"{size / 2**20:.1f} MiB a rank; loss = lm loss + {args.ep_distill_weight:g} * "
        f"'{LOGGED}', until {args.ep_distill_stop:g} of the run"
    )


def changes(patches: Patches) -> None:
    """Note the places where a teacher enters."""
    state = Distillation()
    patches.wrap(
        f"{TRAINING}:setup_model_and_optimizer",
        state.set_up,
        "the student is built and loaded: its teacher is loaded beside it; --ep-teacher",
    )
    patches.wrap(
        f"{TRAINING}:train_step",
        state.step,
        "one call is one step: distilled until --ep-distill-stop, and logged",
    )
    patches.wrap(
        f"{TRAINING}:training_log",
        state.log,
        "a loss that was once logged would be printed as 0 after the stop",
    )
    patches.wrap(GPT_MODEL, state.forward, "the teacher is given what the student is given")
    patches.wrap(LOSS, state.loss, "here the student's logits are; the divergence joins the loss")


def _say(what: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"ep_plugin: {what}", flush=True)
