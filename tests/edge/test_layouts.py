"""At every layout training equals one rank's, on the newest release and those asked for.

On the others: the layouts of `SEAMS` and of `LATENT`, the bugs and every check.
Loss, auxiliary losses, gradient norm, the experts' gradients and the routers' loads over two
iterations in fp32: over megatron-core's own schedule, DDP and optimizer, on gloo ranks.
`support_matrix.py` runs ten.
"""

import subprocess
from typing import Any

import pytest
from core_model import Case
from layouts import BUGS, CHECKS, LOSS_CHECKS, difference, layouts_of, results
from releases import RELEASES, installed

from ep_plugin.megatron.cpu import mode as cpu_mode

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(
        not cpu_mode.wanted(), reason="a GPU is here and EP_PLUGIN_DEVICE is not cpu"
    ),
]
RELATIVE = 1e-5
ITERATIONS = 2  # both read the same tokens


def found_on(version: str) -> dict[str, Any]:
    try:
        installed(version)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"megatron-core {version} cannot be installed here: {error}")
    return results(version, layouts_of(version), ITERATIONS)


def layouts() -> list[Any]:
    return [
        pytest.param(version, case, id=f"{version} {case.name}")
        for version in RELEASES
        for case in layouts_of(version)
    ]


@pytest.mark.parametrize(("version", "case"), layouts())
def test_a_layout_trains_as_one_rank(version: str, case: Case) -> None:
    found = found_on(version)
    assert "error" not in found[case.name], found[case.name]["error"]
    values = found[case.name]["values"]
    assert len(values) == ITERATIONS
    assert {"loss", "gradient norm", "load_balancing_loss", "z_loss"} <= values[0].keys()
    # install(settings) asks for metrics
    assert f"ep/router_entropy/layer_{case.layers}" in values[0]
    assert sum(values[-1][name] < values[0][name] for name in ("loss", "z_loss")) >= 1  # it trains
    assert difference(found, case) < RELATIVE
    if case.bias:
        idle = [f"ep/tokens_per_expert/layer_{case.layers}/expert_{e}" for e in (4, 5, 6, 7)]
        assert [step[name] for step in values for name in idle] == [0] * 4 * ITERATIONS


@pytest.mark.parametrize("case", BUGS, ids=lambda case: case.name)
@pytest.mark.parametrize("version", RELEASES[:-1])
def test_what_older_releases_get_wrong_without_us(version: str, case: Case) -> None:
    """ETP differing from TP at EP 1 (the tag rule), and a gradient norm without experts."""
    found = found_on(version)
    assert "error" not in found[case.name], found[case.name]["error"]
    values, expected = (found[name]["values"] for name in (case.name, case.alone().name))
    assert values[0]["loss"] == pytest.approx(expected[0]["loss"], rel=RELATIVE)
    norms = [
        (a["gradient norm"], b["gradient norm"]) for a, b in zip(values, expected, strict=True)
    ]
    assert max(abs(wrong / right - 1) for wrong, right in norms) > 1e-3


@pytest.mark.parametrize("check", CHECKS + LOSS_CHECKS)
@pytest.mark.parametrize("version", RELEASES)
def test_check(version: str, check: str) -> None:
    found = found_on(version)
    assert found[check] == {}, found[check]["error"]
