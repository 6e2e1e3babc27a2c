"""Runs the Dockerfile's RUN lines in their order where there is no container engine, and then the image's command.

    python -m benchmarks.dockerfile [EXTRAS]

What the image copies is copied to a temporary folder, and Python is that of a new virtual environment. Packages of the
system are installed on this machine. At the end, the command trains for one iteration. Ends with status 1 if a line
fails.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHORT = ["--iterations", "1", "--rollout.groups", "2", "--rollout.group-size", "2", "--evaluation.images", "4"]


def instructions(text: str) -> list[tuple[str, str]]:
    """Name and argument of each instruction of a Dockerfile, without comments."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def follow(text: str, folder: Path, extras: str | None) -> list[str]:
    """Copies files and runs lines as the Dockerfile `text` says, in `folder`; returns the image's command.

    Raises CalledProcessError if a line fails.
    """
    environment = folder / "environment"
    venv.create(environment, with_pip=True)
    variables = {**os.environ, "PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": str(environment)}
    variables.pop("PYTHONPATH", None)
    command: list[str] = []
    for name, argument in instructions(text):
        if name == "ARG":
            default = argument.partition("=")[2]
            variables[argument.partition("=")[0]] = default if extras is None else extras
        elif name == "ENV":
            variables |= dict(pair.split("=", 1) for pair in argument.split())
        elif name == "WORKDIR":
            where = folder / argument.lstrip("/")
            where.mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            *sources, target = argument.split()
            for source in sources:
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, where / target)
        elif name == "RUN":
            line, started = re.sub(r"^(--\S+ )*", "", argument), time.monotonic()
            subprocess.run(["bash", "-euc", line], cwd=where, env=variables, check=True, stdout=subprocess.DEVNULL)
            print(f"{time.monotonic() - started:6.0f} s  RUN {line}", flush=True)
        elif name in ("ENTRYPOINT", "CMD"):
            command += json.loads(argument)
    subprocess.run([*command, *SHORT], cwd=where, env=variables, check=True, stdout=subprocess.DEVNULL)
    return command


def main() -> int:
    extras = sys.argv[1] if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as folder:
        try:
            command = follow((ROOT / "Dockerfile").read_text(encoding="utf-8"), Path(folder), extras)
        except subprocess.CalledProcessError as error:
            print(f"failed: {error.cmd}", file=sys.stderr)
            return 1
    print(f"and its command, {' '.join(command)}, trains")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
