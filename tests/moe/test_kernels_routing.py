"""The fused routing kernel against its twin in float64, and the gate's accuracy."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).parents[1] / "helpers" / "routing_kernel_cases.py"


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_equals_its_twin_in_triton_s_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(CASES), "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_kernels_equal_their_twins_on_a_gpu() -> None:
    import routing_kernel_cases

    routing_kernel_cases.check_all("cuda")
    routing_kernel_cases.check_gate()


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_three_parts_are_the_whole_number(scale: float) -> None:
    pytest.importorskip("triton")
    from ep_plugin.moe.kernels.gate import split_torch

    matrix = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * scale
    parts = split_torch(matrix, 1).double().chunk(3, dim=1)
    assert torch.equal(parts[0] + parts[1] + parts[2], matrix.double())
