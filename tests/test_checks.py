"""docs/checks.md names tests that exist; and what it says of machines that no other test is about."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/checks.md").read_text(encoding="utf-8")


def test_every_row_names_a_test_that_exists() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| what you bring")]
    assert len(rows) >= 30
    for row in rows:
        named = re.fullmatch(r"\| .+ \| .+ \| `(tests/\S+\.py)::(test_\w+)` \|", row)
        assert named, row
        assert f"def {named[2]}(" in (ROOT / named[1]).read_text(encoding="utf-8"), row


WITHOUT_FCNTL = """
import sys, tempfile
from pathlib import Path
sys.modules["fcntl"] = None  # as on Windows
from dgpo_fast.evaluate import evaluate
from dgpo_fast.train import train
from dgpo_fast.run.folder import FolderLock, read_lock
assert train(["--help"]) == evaluate(["--help"]) == 0
import dgpo_fast.lifecycle
with tempfile.TemporaryDirectory() as folder:
    FolderLock(Path(folder), {"launcher": "job"}).release()
    assert read_lock(Path(folder))["launcher"] == "job"
"""


def test_commands_start_without_fcntl() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_FCNTL], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
