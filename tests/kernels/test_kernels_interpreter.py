"""Runs the fused kernels' tests in Triton's interpreter, a process for each file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU itself runs fused/")
FUSED = Path(__file__).parent / "fused"


@pytest.mark.parametrize("file", sorted(path.name for path in FUSED.glob("test_*.py")))
def test_fused_kernels_in_the_interpreter(file: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    # The fixtures of other tests import what takes seconds.
    command = [sys.executable, "-m", "pytest", f"--confcutdir={FUSED.parent}", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "no:randomly", str(FUSED / file)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
