"""`auto` measures once, keeps the times in a file, and takes the fastest backend."""

import json
import logging
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from ep_plugin.errors import ConfigError
from ep_plugin.moe.config import MoEConfig
from ep_plugin.moe.experts import autotune
from ep_plugin.moe.experts.autotune import _clock, _times, candidates, choose
from ep_plugin.moe.experts.experts import GroupedLinear
from ep_plugin.moe.experts.gemm.loop import LoopGemm
from ep_plugin.moe.experts.gemm.torch_grouped import TorchGroupedGemm
from ep_plugin.moe.interfaces import GroupedGemm
from ep_plugin.moe.layer import MoELayer
from ep_plugin.registry import resolve

FAST, SLOW = LoopGemm(), TorchGroupedGemm()
MILLISECONDS = {id(FAST): 1.5, id(SLOW): 3.0}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EP_PLUGIN_CACHE", str(tmp_path / "new" / "folder"))
    return _times.path()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="ep_plugin.moe.experts.autotune"):
        yield caplog


def backends() -> dict[str, GroupedGemm]:
    return {"slow": SLOW, "fast": FAST}


def clock(gemm: GroupedGemm) -> float:
    return MILLISECONDS[id(gemm)]


def never(*_: object) -> float:
    raise AssertionError("measured")


def test_the_fastest_is_taken_kept_and_named(cache: Path, log: pytest.LogCaptureFixture) -> None:
    assert choose("8 experts", backends, clock, "slow") == "fast"
    assert json.loads(cache.read_text()) == {"8 experts": {"slow": 3.0, "fast": 1.5}}
    (line,) = log.messages
    assert line.startswith("gemm auto: fast for 8 experts (slow 3.000 ms, fast 1.500 ms; measured")


def test_what_is_in_the_file_is_not_measured(cache: Path, log: pytest.LogCaptureFixture) -> None:
    _times.write(cache, "key", {"a": 2.0, "b": 1.0})
    assert choose("key", never, never, "a") == "b"
    assert log.messages == [f"gemm auto: b for key (a 2.000 ms, b 1.000 ms; {cache})"]
    assert choose("other key", backends, clock, "slow") == "fast"
    assert set(_times.read(cache)) == {"key", "other key"}


BROKEN = ("", '{"key": {"a"', "[1]", '{"key": 3}', '{"key": {"a": "x"}}', '{"key": {"a": [1]}}')


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_file_is_ignored_and_written_anew(
    cache: Path, log: pytest.LogCaptureFixture, text: str
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    assert choose("key", backends, clock, "slow") == "fast"
    assert json.loads(cache.read_text()) == {"key": {"slow": 3.0, "fast": 1.5}}
    assert f"{cache} is ignored" in log.messages[0]


def test_a_folder_that_cannot_be_written_is_named(
    cache: Path, log: pytest.LogCaptureFixture
) -> None:
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("a file where the folder should be")
    assert choose("key", backends, clock, "slow") == "fast"
    assert "times are not kept" in log.text


def test_the_file_is_in_the_home_folder_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EP_PLUGIN_CACHE")
    assert _times.path() == Path.home() / ".cache" / "ep_plugin" / "gemm.json"


def test_a_later_start_with_a_single_backend_imports_none(cache: Path) -> None:
    assert choose("key", lambda: {"slow": SLOW}, clock, "other") == "slow"
    assert choose("key", never, never, "other") == "slow"
    assert json.loads(cache.read_text()) == {"key": {"slow": 3.0}}


class CompilationError(Exception):
    """Stands for Triton's errors, which are no RuntimeErrors."""


def failing(
    gemms: list[GroupedGemm], error: type[Exception] = RuntimeError
) -> Callable[[GroupedGemm], float]:
    def time(gemm: GroupedGemm) -> float:
        if gemm in gemms:
            raise error("out of memory")
        return clock(gemm)

    return time


@pytest.mark.parametrize("error", [RuntimeError, CompilationError, AssertionError])
def test_a_backend_that_fails_is_left_out_and_tried_again(
    error: type[Exception], cache: Path, log: pytest.LogCaptureFixture
) -> None:
    assert choose("key", backends, failing([FAST], error), "fast") == "slow"
    assert "fast fails and is left out (out of memory)" in log.text
    assert not cache.exists()
    assert choose("key", backends, failing([FAST, SLOW]), "default") == "default"


def _write_often(file: Path, rank: int) -> None:
    for index in range(20):
        _times.write(file, f"{rank}", {"loop": float(index)})


def test_ranks_that_write_at_once_leave_a_whole_file(cache: Path) -> None:
    context = get_context("spawn")
    ranks = [context.Process(target=_write_often, args=(cache, rank)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    while any(rank.is_alive() for rank in ranks):
        if cache.exists():
            json.loads(cache.read_text())
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    kept = json.loads(cache.read_text())
    assert {"loop": 19.0} in kept.values()
    assert list(cache.parent.iterdir()) == [cache]


@pytest.mark.parametrize("bias", [False, True])
def test_deterministic_experts_time_nothing(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []
    real = autotune.settle
    monkeypatch.setattr(autotune, "settle", lambda w, n: timed.append(n) or real(w, n))
    for deterministic in (False, True):
        timed.clear()
        config = MoEConfig(
            hidden_size=8, ffn_hidden_size=8, num_experts=4, bias=bias, deterministic=deterministic
        )
        MoELayer(config)(torch.randn(5, 8))
        assert bool(timed) is not deterministic


def test_on_the_cpu_it_is_the_loop_settled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def settle(weight: torch.Tensor, num_rows: int) -> GroupedGemm:
        calls.append((weight.dtype, num_rows))
        return real(weight, num_rows)

    real = autotune.settle
    monkeypatch.setattr(autotune, "settle", settle)
    linear = GroupedLinear(2, 8, 16, bias=False, gemm="auto")
    assert isinstance(linear.pick_gemm(0), LoopGemm)
    picked = [linear.pick_gemm(rows) for rows in (5, 9)]
    assert picked[0] is picked[1]
    assert isinstance(picked[0], LoopGemm)
    linear.bfloat16().pick_gemm(7)
    assert calls == [(torch.float32, 5), (torch.bfloat16, 7)]


def test_a_measurement_is_kept_for_calls_that_cannot_measure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(autotune, "pick", lambda weight, rows: FAST if rows else SLOW)
    linear = GroupedLinear(2, 8, 16, bias=False, gemm="auto")
    assert linear.pick_gemm(0) is SLOW
    assert linear.pick_gemm(5) is FAST
    assert linear.pick_gemm(0) is FAST


@pytest.mark.parametrize("capability", [None, (8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("features", [(128, 256), (128, 132), (132, 128)])
def test_without_a_measurement_our_own_products_are_taken_on_hopper(
    features: tuple[int, int],
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    grouped = capability is not None and dtype == torch.bfloat16 and features == (128, 256)
    expected = ("triton" if capability == (9, 0) else "torch_grouped") if grouped else "loop"
    assert autotune.rule(*features, dtype, capability is not None) == expected
    if expected == "triton":
        assert not resolve("gemm", "triton")(*features, dtype).waits_for_host
    else:
        with pytest.raises(ConfigError, match=r"gemm='triton' needs"):
            resolve("gemm", "triton")(*features, dtype)


@pytest.mark.parametrize(("experts", "rows"), [(4, 1000), (1, 5), (64, 32)])
def test_rows_are_timed_with_experts_at_random(experts: int, rows: int) -> None:
    ends = _clock.random_ends(experts, rows, torch.Generator().manual_seed(0))
    assert (ends.dtype, len(ends), int(ends[-1])) == (torch.int32, experts, rows)
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    assert int(counts.min()) >= 0
    assert experts == 1 or len(set(counts.tolist())) > 1


def test_the_host_is_ahead_when_the_clock_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.name = "stop" if "made" in seen else "start"
            seen.append("made")

        def record(self) -> None:
            seen.append(self.name)

        def synchronize(self) -> None:
            seen.append("waits")

        def elapsed_time(self, other: "Event") -> float:
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert _clock._milliseconds(lambda: seen.append("work")) == 2.5
    assert seen[2:] == ["work", "start", "work", "stop", "waits"]


def test_the_backend_of_both_products_takes_the_sizes_of_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(autotune, "pick", lambda w, _: asked.append(tuple(w.shape)) or LoopGemm())
    for ffn in (16, 12):
        config = MoEConfig(hidden_size=16, ffn_hidden_size=ffn, num_experts=4, activation="swiglu")
        layer = MoELayer(config)
        layer.experts.recipes(8)
        assert sorted(layer.state_dict()) == [
            *("experts.linear_fc1.weight", "experts.linear_fc2.weight", "router.weight")
        ]
    assert asked == [(4, 32, 16), (4, 16, 12)]


def test_candidates_take_the_sizes() -> None:
    assert "torch_grouped" in candidates(torch.empty(2, 16, 8))
    assert "loop" not in candidates(torch.empty(2, 16, 8))  # it waits for the host
    assert "torch_grouped" not in candidates(torch.empty(2, 16, 7))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_it_measures_and_then_reads(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {"torch_grouped": TorchGroupedGemm(), "loop": LoopGemm()}
    monkeypatch.setattr(autotune, "candidates", lambda weight: both)
    weight = torch.randn(4, 256, 128, device="cuda", dtype=torch.bfloat16)
    state = torch.cuda.get_rng_state()
    first, second = autotune.pick(weight, 1000), autotune.pick(weight, 1024)
    assert type(first) is type(second)
    assert "1024 random rows" in log.messages[0]
    assert "measured in" in log.messages[0]
    assert str(_times.path()) in log.messages[1]
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_nothing_is_measured_while_a_graph_is_captured(cache: Path) -> None:
    linear = GroupedLinear(4, 128, 256, False, "auto", device="cuda", dtype=torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        taken = linear.pick_gemm(1000)
    name = autotune.rule(128, 256, torch.bfloat16, cuda=True)
    assert type(taken) is type(resolve("gemm", name)(128, 256, torch.bfloat16))
    assert not cache.exists()
    measured = linear.pick_gemm(1000)
    assert cache.exists()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert linear.pick_gemm(1000) is measured


def test_deterministic_layers_measure_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement can end differently in the next run, and then so do the bits."""
    rows: list[int] = []
    real = autotune.pick
    monkeypatch.setattr(autotune, "pick", lambda w, n: rows.append(n) or real(w, n))
    for deterministic in (False, True):
        config = MoEConfig(
            hidden_size=128,
            ffn_hidden_size=128,
            num_experts=4,
            fp8="blockwise",
            fp8_wgrad="bf16",
            deterministic=deterministic,
        )
        MoELayer(config, dtype=torch.bfloat16)(torch.randn(8, 128).bfloat16())
    assert rows == [16, 0]
