"""HybridModels: whose block runs, what a pattern is refused for, a run that goes on elsewhere.

That they compute what a GPT of the same weights does is in `test_layouts.py`.
"""

import argparse
import inspect
import os
import subprocess
import sys
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
from loop import MOE, NEWEST, OURS, ROOT, SHAPE, launch_with
from parsed_hybrid import EXPERTS, parsed

from ep_plugin.checkpoint.formats.megatron_dist import open_checkpoint
from ep_plugin.checkpoint.moe_layers import has_dense_layer
from ep_plugin.cli import main
from ep_plugin.commands import plan
from ep_plugin.commands.plan.hybrid_flags import read_sizes
from ep_plugin.commands.plan.hybrid_plan import HybridModel, kinds
from ep_plugin.commands.report.events import read_run
from ep_plugin.errors import ConfigError
from ep_plugin.megatron.arguments.checks import check_arguments, settings_from_args
from ep_plugin.megatron.arguments.in_flags import in_flags
from ep_plugin.megatron.cpu import mode as cpu_mode
from ep_plugin.megatron.seams.install import install, uninstall
from ep_plugin.megatron.seams.served import check_pattern
from ep_plugin.megatron.settings import moe_pattern

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(not NEWEST, reason="one release of two; layouts are compared on both"),
    pytest.mark.skipif(
        not cpu_mode.wanted(), reason="a GPU is here and EP_PLUGIN_DEVICE is not cpu"
    ),
]
PATTERN = ("--hybrid-layer-pattern", "*E*E")


def test_the_order_of_imports_changes_no_bit_and_our_block_runs(tmp_path: Path) -> None:
    said = []
    for order in ("before", "after"):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers'}",
            **{"RANK": "0", "WORLD_SIZE": "1", "STORE": str(tmp_path / order)},
        }
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "helpers" / "hybrid_order.py"), order],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        # Of attn, mlp and mamba: attention and a dense block, and nothing of ours.
        assert "graphed True False True" in done.stdout.splitlines()
        said.append(next(line for line in done.stdout.splitlines() if line.startswith("found")))
    assert said[0] == said[1]
    assert said[0].split()[2:] == ["2", "EPMoELayer"]  # calls: one for each E


def test_a_class_that_is_not_ours_is_an_error_when_it_is_built() -> None:
    from megatron.core.transformer.moe.moe_layer import BaseMoELayer, MoELayer

    class Mine(MoELayer):  # type: ignore[misc]
        """Of a model of the user's."""

    class Other(BaseMoELayer):  # type: ignore[misc]
        """Not even Megatron's."""

        def forward(self, hidden_states: Any) -> Any: ...

    before = MoELayer.__init__, BaseMoELayer.__init__
    install()
    try:
        for kind in (Mine, Other):
            with pytest.raises(ConfigError, match=rf"{kind.__name__}, which is not the plugin's"):
                kind(None, layer_number=1)
    finally:
        uninstall()
    assert before == (MoELayer.__init__, BaseMoELayer.__init__)


def test_a_pattern_that_the_script_s_model_does_not_read_is_refused() -> None:
    from megatron.core.models.hybrid.hybrid_block import HybridStack

    class Part:
        """A part of a model, of the class `kind`."""

        def __init__(self, kind: type) -> None:
            self.kind = kind

        def modules(self) -> list[Any]:
            return [object.__new__(self.kind)]

    check_pattern([Part(HybridStack)], "*E")
    check_pattern([Part(Part)], None)
    with pytest.raises(ConfigError, match=r"\(\*E\) is for a HybridModel, and the script builds"):
        check_pattern([Part(Part)], "*E")


WRONG = {
    "no experts": ((*PATTERN,), "has layers of experts, E; use --num-experts 8"),
    "no layer for them": (
        ("--hybrid-layer-pattern", "*-*-", *EXPERTS),
        "has no layer of experts, E; use --hybrid-layer-pattern '*E*-'",
    ),
    "no layer for them, beside prediction": (
        ("--hybrid-layer-pattern", "*-/*E/*E", *EXPERTS),
        "use --hybrid-layer-pattern '*E/*-/*-'",
    ),
    "a frequency beside it": (
        (*PATTERN, *EXPERTS, "--moe-layer-freq", "2"),
        "is for a GPT; in a HybridModel each E of --hybrid-layer-pattern (*E*E)",
    ),
    "two micro-batches": (
        (*PATTERN, *EXPERTS, "--ep-overlap", "two_batch"),
        "makes a HybridModel; use --ep-overlap auto",
    ),
    "experts behind a slash": (
        ("--hybrid-layer-pattern", "*E/*E", *EXPERTS),
        "use --hybrid-layer-pattern '*E/*-'",
    ),
    "experts in a pattern of prediction, by older flags": (
        (
            *("--hybrid-override-pattern", "*E", "--mtp-hybrid-override-pattern", "*E"),
            *("--mtp-num-layers", "1", *EXPERTS),
        ),
        "use --hybrid-layer-pattern '*E/*-'",
    ),
    "prediction on the CPU": (
        ("--hybrid-layer-pattern", "*E/*-", *EXPERTS),
        "on the CPU use '*E'",
    ),
    "Mamba on the CPU": (
        ("--hybrid-layer-pattern", "M*E", *EXPERTS),
        "has M, and Mamba layers need the package mamba-ssm",
    ),
    "a delta net on the CPU": (
        ("--hybrid-layer-pattern", "G*E", *EXPERTS),
        "has G, and gated delta nets need",
    ),
    "sparse attention on the CPU": (
        ("--hybrid-layer-pattern", "DE", *EXPERTS),
        "has D, and DeepSeek's sparse attention needs",
    ),
    "a pyramid that is too short": (
        (*PATTERN, *EXPERTS, "--ep-experts-per-layer", "4"),
        "must have one entry per MoE layer (2)",
    ),
    "a teacher": (
        (*PATTERN, *EXPERTS, "--ep-teacher", "runs/teacher"),
        "use --hybrid-layer-pattern without --ep-teacher",
    ),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_are_one_sentence(mistake: str) -> None:
    flags, message = WRONG[mistake]
    args = parsed(*flags)
    with pytest.raises(ConfigError) as raised:
        check_arguments(args, settings_from_args(args))
    assert message in raised.value.spelled(in_flags(flags))


@pytest.mark.parametrize("flag", ["--hybrid-layer-pattern", "--hybrid-override-pattern"])
def test_a_pattern_has_dense_layers_by_either_name(flag: str) -> None:
    assert has_dense_layer(parsed(flag, "*-*E", *EXPERTS))
    assert not has_dense_layer(parsed(flag, "*E*E", *EXPERTS))


@pytest.mark.parametrize("name", ["hybrid_layer_pattern", "hybrid_override_pattern"])
def test_a_model_s_layers_are_those_of_its_pattern_by_either_name(name: str) -> None:
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from ep_plugin.megatron.seams import hybrid

    def built(*args: Any, **kwargs: Any) -> None: ...

    built.__signature__ = inspect.signature(HybridModel.__init__)  # type: ignore[attr-defined]
    config = argparse.Namespace(moe_layer_freq=1, num_layers=4)
    before, patterns = dict(vars(config)), hybrid.KeptPatterns()
    with patterns:
        for pattern in ("*E*-", "*-*E"):  # two models of one configuration
            patterns.with_pattern(built, None, config, None, 64, 16, **{name: pattern})
        assert moe_pattern(config) == [0, 0, 0, 1]
    assert vars(config) == before
    config.hybrid_layer_pattern = "*E"  # the user's
    with patterns:
        patterns.with_pattern(built, None, config, None, 64, 16, **{name: "*-*E"})
    assert config.hybrid_layer_pattern == "*E"


def test_uninstall_takes_the_pattern_from_a_configuration() -> None:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=2)
    install()
    try:
        with pytest.raises(AssertionError, match="is not initialized"):  # no ranks met
            HybridModel(config, None, 64, 16, hybrid_layer_pattern="*E")
        assert config.hybrid_layer_pattern == "*E"
    finally:
        uninstall()
    assert not hasattr(config, "hybrid_layer_pattern")


def test_a_run_goes_on_at_another_size_and_layers_have_the_pattern_s_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = str(tmp_path / "saved")
    flags = (
        *(*SHAPE[2:], *PATTERN, *MOE, "--num-experts", "8", "--ep-experts-per-layer", "3,8"),
        *("--train-iters", "4", "--use-distributed-optimizer", "--save-interval", "2"),
        *("--moe-router-score-function", "sigmoid", "--moe-router-enable-expert-bias"),
    )
    found = []
    for ranks, more in (
        (2, ("--save", saved, "--ep-audit-save")),
        (1, ("--load", saved, "--ckpt-step", "2")),
    ):
        folder = tmp_path / str(ranks)
        ep = ("--expert-model-parallel-size", str(ranks), "--tensorboard-dir", str(folder))
        done = launch_with(ranks, OURS, *flags, *ep, *more)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        found.append(read_run(folder))
        assert (
            "by a layer's experts: 3 experts on 1 (2 copies of each)" in done.stdout or ranks == 1
        )
    whole, resumed = found
    assert sorted(whole.shares()) == [2, 4]
    assert planned_params(flags) == stored_params(saved)
    assert main(["audit", saved]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.rpartition("  ")[2] for line in table[:3]] == [
        *("symbol of the pattern", "2: E", "4: E")
    ]
    assert "2 MoE layers of '*E*E', optimizer" in table[-1]
    for tag in ("grad-norm", "lm loss validation"):
        expected = [value for step, value in whole.series(tag) if step > 2]
        assert expected
        assert [v for step, v in resumed.series(tag) if step > 2] == pytest.approx(
            expected, rel=1e-5
        )


PLANNED = (  # flags of a run that are about sizes
    *("--hybrid-layer-pattern", "--hidden-size", "--ffn-hidden-size", "--num-attention-heads"),
    *("--seq-length", "--position-embedding-type", "--num-experts", "--moe-router-topk"),
    *("--moe-ffn-hidden-size", "--ep-experts-per-layer"),
)


def planned_params(flags: tuple[str, ...]) -> int:
    """Return what `plan` says of a run's flags."""
    words = dict(pairwise(flags))
    sizes = [f"{name}={words[name]}" for name in PLANNED]
    line = [*sizes, "--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"]
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    pattern, counted, experts = read_sizes(parser.parse_args([*line, "--vocab-size", "128"]))
    return sum(kind.params for kind in kinds(HybridModel(pattern, counted, experts, 32)))


def stored_params(saved: str) -> int:
    """Return the values of a checkpoint's parameters."""
    tensors = open_checkpoint(Path(saved)).tensors
    names = [name for name in tensors if name.startswith(("decoder.", "embedding.", "output_"))]
    return sum(prod(tensors[name].shape) for name in names if not name.endswith("expert_bias"))


def test_a_pipeline_stage_without_experts_takes_its_part_in_what_is_logged(tmp_path: Path) -> None:
    """Megatron alone waits for ever: its table of losses has another length there."""
    flags = (
        *(*SHAPE[2:], "--hybrid-layer-pattern", "**|*E", *MOE, "--train-iters", "2"),
        *("--pipeline-model-parallel-size", "2", "--tensorboard-dir", str(tmp_path)),
    )
    done = launch_with(2, OURS, *flags)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    run = read_run(tmp_path)
    assert len(run.series("load_balancing_loss")) == 2
    assert sorted(run.shares()) == [4]
    assert 0.9 < run.series("load_balancing_loss")[0][1] < 1.5  # of one layer, not spread over four
