"""What the check before a save reads, with how much memory, and when the note of a run goes."""

import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from ep_plugin.checkpoint import finite
from ep_plugin.megatron.arguments.not_saved import NOTE, leave
from ep_plugin.megatron.seams import check_save
from ep_plugin.megatron.seams.rank_state import buffers, held


class Quantized(Tensor):
    """Converted to float32 as Transformer Engine's tensors are; counts what lives at once."""

    alive = 0
    most = 0

    def dequantize(self) -> Tensor:  # type: ignore[override]
        values = self.as_subclass(Tensor).float()
        Quantized.alive += 1
        Quantized.most = max(Quantized.most, Quantized.alive)
        weakref.finalize(values, Quantized.freed)
        return values

    @staticmethod
    def freed() -> None:
        Quantized.alive -= 1


@pytest.mark.parametrize("wrong", [None, 0, 4])
def test_what_is_converted_is_converted_one_by_one(wrong: int | None) -> None:
    tensors: list[Tensor] = [
        torch.ones(8, dtype=torch.bfloat16).as_subclass(Quantized) for _ in range(5)
    ]
    if wrong is not None:
        tensors[wrong].as_subclass(Tensor)[3] = torch.nan
    Quantized.most = 0
    assert int(finite.any_nonfinite(tensors, torch.device("cpu"))) == (wrong is not None)
    assert Quantized.most == 1
    assert Quantized.alive == 0


def model_with_masks() -> list[nn.Module]:
    chunks = [nn.Sequential(nn.Linear(2, 2)) for _ in range(2)]
    chunks[1][0].register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    chunks[0][0].register_buffer("mask", torch.zeros(2))
    return list(chunks)


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, **given: Any) -> tuple[Any, ...]:
    """Return what is called for a save, a finalize and a training, and what was searched."""
    args = SimpleNamespace(save=str(folder), ep_check_save="on", no_save_optim=True, **given)
    empty = [False]
    megatron = SimpleNamespace(
        get_args=lambda: args,
        unwrap_model=lambda model: model,
        is_empty_async_queue=lambda: empty[0],
    )
    monkeypatch.setattr(check_save.importlib, "import_module", lambda name: megatron)
    patches = Mock()
    check_save.changes(patches)
    return *(call.args[1] for call in patches.wrap.call_args_list), empty


def test_a_buffer_that_holds_inf_from_the_start_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_save, _, with_start, _ = start(tmp_path, monkeypatch, async_save=False)
    searched: list[list[str]] = []

    def find(model: list[Any], optimizer: Any, by_design: Any) -> None:
        parts = held(model, optimizer, by_design)
        wrong = finite.nonfinite({str(n): part.tensor for n, part in enumerate(parts)})
        searched.append([parts[int(number)].name for number in wrong])

    monkeypatch.setattr(check_save, "find", find)
    chunks = model_with_masks()
    with_start(lambda *rest: None, "a step", chunks, None)
    said = "leaves out buffers that are not finite when training begins: 0.mask (inf)\n"
    assert capsys.readouterr().out.endswith(said)
    with_save(lambda *rest: None, 1, chunks, None)
    buffers(chunks)["0:0.mask"][0] = torch.nan  # of the same name, in another chunk
    chunks[1][0].weight.data[0, 0] = torch.inf
    with_save(lambda *rest: None, 2, chunks, None)
    assert searched == [[], ["0.weight", "0.mask"]]


def test_the_note_goes_when_a_save_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_save, "find", lambda *rest: None)
    for is_async in (False, True):
        leave(tmp_path, 5, "rank 1 holds nan in x")
        with_save, with_finalize, _, empty = start(tmp_path, monkeypatch, async_save=is_async)
        with_save(lambda *rest: None, 6, [], None)
        assert (tmp_path / NOTE).exists() is is_async
        if is_async:
            with_finalize(lambda: None)
            assert json.loads((tmp_path / NOTE).read_text())["iteration"] == 5
            empty[0] = True
            with_finalize(lambda: None)
            assert not (tmp_path / NOTE).exists()
