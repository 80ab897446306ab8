"""The distillation loss against a hand computation, whole and in slices of the vocabulary."""

import math
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from spawn import run_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ep_plugin.errors import ConfigError
from ep_plugin.megatron.distill.kl import AT_PEAK, KEPT, Counted, divergence, with_gradient_of
from ep_plugin.megatron.distill.teacher_layout import Layout, parse_layout

S, B, V = 3, 2, 8


def logits(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(S, B, V, generator=generator).to(dtype) * 3 for _ in range(2))
    return student, teacher


def by_hand(student: Tensor, teacher: Tensor, temperature: float, vocabulary: int) -> list[float]:
    """The definition, one number at a time."""
    found = []
    for q_row, p_row in zip(
        student.view(-1, V).tolist(), teacher.view(-1, V).tolist(), strict=True
    ):
        q = [math.exp(v / temperature) for v in q_row[:vocabulary]]
        p = [math.exp(v / temperature) for v in p_row[:vocabulary]]
        q, p = ([v / sum(row) for v in row] for row in (q, p))
        total = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        found.append(temperature**2 * total)
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("vocabulary", [V, V - 3])
def test_it_is_the_definition(temperature: float, vocabulary: int) -> None:
    student, teacher = logits()
    found = divergence(student, teacher, temperature, vocabulary)
    expected = by_hand(student, teacher, temperature, vocabulary)
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_gradient_and_deepspeeds_normalisation() -> None:
    """beta * T^2 * kl_div(batchmean) / S over [B, S, V] is the mean over tokens, gradients too."""
    student, teacher = logits()
    ours, theirs = (student.clone().requires_grad_() for _ in range(2))
    divergence(ours, teacher, 2.0, V).mean().backward()
    batch_first = [(x / 2.0).transpose(0, 1) for x in (theirs, teacher)]
    loss = F.kl_div(
        batch_first[0].log_softmax(-1), batch_first[1].softmax(-1), reduction="batchmean"
    )
    (loss * 2.0**2 / S).backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)
    assert torch.equal(ours.detach(), student)


def slices(ranks_of_group: int) -> tuple[Tensor, Tensor]:
    """This rank's part of the divergence and of its gradient."""
    rank, width = dist.get_rank(), V // ranks_of_group
    student, teacher = (x[..., rank * width : (rank + 1) * width].clone() for x in logits())
    student.requires_grad_()
    found = divergence(student, teacher, 1.5, V - 3, dist.group.WORLD)
    (found * torch.arange(S * B).view(S, B)).sum().backward()
    assert student.grad is not None
    return found.detach(), student.grad


class Living(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside and live, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.living: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.living:
                storage = tensor.untyped_storage()
                self.living[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.living.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.living.values()))
        return made


def test_its_bytes_are_those_that_plan_counts() -> None:
    """Of bf16 logits, whose inputs were there before."""
    student, teacher = (torch.randn(4, 2, 10_000).bfloat16() for _ in range(2))
    student.requires_grad_()
    with Living() as seen:
        found = divergence(student, teacher, 2.0, 9_000)
    assert seen.peak == pytest.approx(AT_PEAK * student.numel(), rel=0.01)
    (saved,) = found.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert saved.nbytes == KEPT * student.numel()
    assert sum(seen.living.values()) == pytest.approx(saved.nbytes, rel=0.01)


@pytest.mark.parametrize("ranks", [2, 4])
def test_slices_of_the_vocabulary_give_the_whole(ranks: int) -> None:
    """With four ranks the last has nothing but rows that pad."""
    student, teacher = logits()
    student.requires_grad_()
    whole = divergence(student, teacher, 1.5, V - 3)
    (whole * torch.arange(S * B).view(S, B)).sum().backward()
    parts = run_ranks(ranks, slices, ranks)
    for found, _ in parts:
        torch.testing.assert_close(found, whole.detach(), rtol=1e-12, atol=1e-14)
    grad = torch.cat([grad for _, grad in parts], dim=-1)
    torch.testing.assert_close(grad, student.grad, rtol=1e-12, atol=1e-14)


def test_value_stays_gradient_adds_and_masked_tokens_do_not_count() -> None:
    loss = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    extra = torch.tensor([10.0, 20.0, 40.0], requires_grad=True)
    whole = with_gradient_of(loss, 0.5 * extra)
    assert whole.tolist() == [1.0, 2.0, 3.0]
    counted = Counted()
    counted.watch(whole, extra)
    (whole * torch.tensor([1.0, 0.0, 1.0]) / 7).sum().backward()
    assert loss.grad is not None
    assert extra.grad is not None
    assert extra.grad.tolist() == pytest.approx([0.5 / 7, 0, 0.5 / 7])
    pair = counted._total
    assert pair is not None
    assert pair.tolist() == pytest.approx([50, 2])
    broken = with_gradient_of(loss, torch.tensor([0.0, math.nan, math.inf]))
    assert broken.isnan().tolist() == [False, True, True]


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]))
@settings(deadline=None)
def test_every_micro_batch_is_run_by_its_ranks_own_groups(student: int, teacher: int) -> None:
    """Every rank's micro-batch is among those of its group; ranks of a group have one order."""
    layout = Layout(tp=teacher, ep=1, etp=1)
    for rank in range(8):
        sources = layout.batches(rank, student)
        batches = [source // student for source in sources]
        assert rank // student in batches
        assert len(set(batches)) == len(batches) == max(1, teacher // student)
        assert {source // teacher for source in sources} == {rank // teacher}
        assert layout.batches(rank // teacher * teacher, student) == sources


@given(st.text(alphabet="tpec=,0123456789 x", max_size=12))
def test_a_layout_is_read_or_refused(text: str) -> None:
    try:
        found = parse_layout(text)
    except (ValueError, ConfigError):
        return
    assert found
    assert all(size > 0 for size in found.values())
