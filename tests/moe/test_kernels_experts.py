"""Kernels of the experts against their plain-torch twins."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).parents[1] / "helpers" / "kernel_cases.py"


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_equal_their_twins_in_triton_s_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(CASES), "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_equal_their_twins_on_a_gpu() -> None:
    import kernel_cases

    kernel_cases.check_all("cuda")
