"""A run without anything that balances its experts says so once, and what to type."""

import pytest
from flag_values import parser
from loop import OURS, launch

from ep_plugin.megatron.arguments.checks import settings_from_args, take_typed
from ep_plugin.megatron.arguments.unbalanced import unbalanced

pytestmark = [pytest.mark.megatron, pytest.mark.newest]
BALANCED = (
    "--moe-aux-loss-coeff 1e-2",
    "--moe-aux-loss-coeff 1e-2 --moe-router-load-balancing-type seq_aux_loss",
    "--ep-aux-loss-coeff 1e-2",
    "--ep-aux-loss-coeff 1e-2 --ep-aux-loss-scope group --ep-group-tokens 8",
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias",
    "--ep-router expert_choice --ep-force-expert-choice on --ep-capacity-factor 1",
    "--ep-router my_moe.router",
    "--moe-router-force-load-balancing",
    "--ep-quantile-balancing on",
    "--moe-router-topk 4",
    "--skip-train",
)
UNBALANCED = (
    "",
    "--moe-z-loss-coeff 1e-3",
    "--moe-router-load-balancing-type none",
    "--moe-router-load-balancing-type seq_aux_loss",
    "--ep-preset mixtral-8x7b --ep-aux-loss-coeff 0",
)


def said(typed: str) -> str | None:
    args = parser().parse_args(["--num-layers", "2", "--num-experts", "4", *typed.split()])
    take_typed(args)
    settings = settings_from_args(args)
    return unbalanced(args, settings)


@pytest.mark.parametrize("typed", BALANCED)
def test_what_balances_is_silent(typed: str) -> None:
    assert said(typed) is None


@pytest.mark.parametrize("typed", UNBALANCED)
def test_what_does_not_is_told_and_the_flags_help(typed: str) -> None:
    warning = said(typed)
    assert warning is not None
    advice = warning.partition("; use ")[2]
    assert said(f"{typed} {advice}") is None


def test_a_run_says_it_once() -> None:
    done = launch(2, OURS, "--num-experts", "4", "--train-iters", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("no balancing loss: ") == 1
