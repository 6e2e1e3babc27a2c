"""Every kernel compiles for every architecture, without spills, with wide accesses and within its budget."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
DOCUMENTATION = Path(__file__).parents[2] / "docs" / "kernels.md"


@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_kernels_compile_ahead_of_time_within_their_budget(architecture, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dgpo_kernels.triton.aot", architecture]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    version, _, *rows = result.stdout.splitlines()
    documented = DOCUMENTATION.read_text().splitlines()
    if version in documented:
        assert all(row in documented for row in rows[2:]), "docs/kernels.md: run python -m dgpo_kernels.triton.aot"
