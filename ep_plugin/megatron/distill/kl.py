"""The divergence of a student's next-token distribution from its teacher's.

    KL(teacher || student) = sum over the vocabulary of p * (log p - log q)
    p = softmax(teacher / T), q = softmax(student / T)

of each token, times T^2, so that its gradient keeps its size at any temperature T
(arXiv:1503.02531, section 2). DeepSpeed's student adds beta * T^2 * kl_div(batchmean) / seq_len
(arXiv:2201.05596, section 4.2; Megatron-DeepSpeed's pretrain_gpt.py): `batchmean` divides the sum
over [B, S, V] by B, so this is beta times the mean over all B * S tokens. Here it is a value of
each token, which Megatron masks and averages as it does the cross entropy: without masked tokens
the two are equal, and with them only counted tokens count.

Logits lie in slices of the vocabulary on the tensor-parallel ranks; what is summed over the
vocabulary is summed over their group. Rows that only pad the vocabulary are left out of p and q.

Of n logits in a slice it takes AT_PEAK * n bytes beside them, and keeps KEPT * n for the backward.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

AT_PEAK, KEPT = 13, 4  # bytes for each logit: three of float32 and a mask; q - p

Group = dist.ProcessGroup | None  # None: one rank has the whole vocabulary


def divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    vocabulary: int,
    group: Group = None,
) -> Tensor:
    """Return T^2 * KL(teacher || student) of each token, [S, B], float32 (float64 of float64).

    `student`, `teacher`: logits [S, B, V / ranks] of this rank's slice. `vocabulary`: entries of
    the whole vocabulary that count. Gradients go to `student` alone; neither is changed.
    """
    result: Tensor = _Divergence.apply(student, teacher, temperature, vocabulary, group)
    return result


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        temperature: float,
        vocabulary: int,
        group: Group,
    ) -> Tensor:
        log_q = _log_softmax(student, temperature, vocabulary, group)
        log_p = _log_softmax(teacher, temperature, vocabulary, group)
        p = log_p.exp()
        terms = log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0.0)  # in place: this is the peak
        found = _sum(terms.sum(-1), group) * temperature**2
        del log_p, terms
        ctx.save_for_backward(log_q.exp_().sub_(p))
        ctx.temperature, ctx.dtype = temperature, student.dtype
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (difference,) = ctx.saved_tensors
        grad = difference * (grads[0].unsqueeze(-1) * ctx.temperature)
        return grad.to(ctx.dtype), None, None, None, None


def _log_softmax(logits: Tensor, temperature: float, vocabulary: int, group: Group) -> Tensor:
    """Return the log softmax over the slices of all ranks; -inf in rows that pad."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    values = logits.to(wide, copy=True).div_(temperature)
    width = values.shape[-1]
    first = 0 if group is None else dist.get_rank(group) * width
    if first + width > vocabulary:
        values[..., max(vocabulary - first, 0) :] = float("-inf")
    top = values.amax(-1, keepdim=True)
    if group is not None:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    values -= top
    return values.sub_(_sum(values.exp().sum(-1, keepdim=True), group).log())


def _sum(values: Tensor, group: Group) -> Tensor:
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


class Counted:
    """The mean divergence of the tokens that counted since the last `take`.

    Which tokens count, the script's loss function decides; here it is seen by their gradient.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None  # [2]: sum of weight times divergence, sum of weights

    def watch(self, loss: Tensor, divergence: Tensor) -> None:
        """Note `divergence` of each token when the gradient of `loss`, of the same shape, comes."""
        values = divergence.detach()

        def note(grad: Tensor) -> None:
            size = grad.detach().abs().double()
            weights = size / size.amax().clamp(min=torch.finfo(torch.float64).tiny)
            pair = torch.stack([(weights * values).sum(), weights.sum()])
            self._total = pair if self._total is None else self._total + pair

        loss.register_hook(note)  # type: ignore[no-untyped-call]

    def take(self, group: dist.ProcessGroup, device: Any) -> Tensor:
        """Return the mean [] over the ranks of `group`, and begin anew. All must call it."""
        zeros = torch.zeros(2, dtype=torch.float64, device=device)
        total = zeros if self._total is None else self._total
        dist.all_reduce(total, group=group)
        self._total = None
        return (total[0] / total[1].clamp(min=1e-30)).float()


def with_gradient_of(loss: Tensor, extra: Tensor) -> Tensor:
    """Return `loss` as it is, whose gradient is that of `loss` + `extra`; nan where extra is."""
    return loss + (extra - extra.detach())
