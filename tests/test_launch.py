"""Launch files and the Dockerfile, as far as they can be checked without a cluster, a cloud and a container engine."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import parse_args

from benchmarks.dockerfile import instructions
from dgpo_fast.config.command_line import configure

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "examples/launch"
SLURM = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
SKY = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """A folder of commands: torchrun notes its arguments, srun runs what it is given, scontrol names two nodes."""
    scripts = {
        "torchrun": f'printf "%s\\n" "$@" > {tmp_path}/arguments',
        "srun": '"$@"',
        "scontrol": "printf 'n1\\nn2\\n'",
        "python": "echo 4",
    }
    for name, script in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def launched(stand_ins: Path, command: list[str], **variables: str) -> tuple[dict, list[str]]:
    """What torchrun understands of the arguments that it gets, and those of the training."""
    environment = {**os.environ, **variables, "PATH": f"{stand_ins}:{os.environ['PATH']}"}
    subprocess.run(command, env=environment, check=True)
    found = parse_args((stand_ins / "arguments").read_text().splitlines())
    assert found.module and found.training_script == "dgpo_fast.train"
    return vars(found), found.training_script_args


def test_one_machine_and_several_under_torchrun(stand_ins: Path) -> None:
    script = ["bash", str(LAUNCH / "torchrun.sh"), "sd35m-ocr", "--name", "my-run"]
    found, args = launched(stand_ins, script)
    assert (found["standalone"], found["nproc_per_node"], found["max_restarts"]) == (True, "4", 3)
    assert configure(args).name == "my-run"
    found, args = launched(stand_ins, script, NODES="3", HEAD="node0", PROCESSES="2")
    assert (found["nnodes"], found["nproc_per_node"], found["rdzv_endpoint"]) == ("3", "2", "node0:29500")
    assert configure(args).recipe == "sd35m-ocr"
    missing = subprocess.run(script, env={**os.environ, "NODES": "2"}, capture_output=True, text=True)
    assert missing.returncode != 0 and "HEAD: is the name of the first machine" in missing.stderr


def test_a_job_under_slurm(stand_ins: Path) -> None:
    """A requeued job has its number, and so its run's name."""
    found, args = launched(stand_ins, ["bash", str(LAUNCH / "slurm.sbatch"), "sd35m-ocr", "--seed", "3"], **SLURM)
    assert (found["nnodes"], found["nproc_per_node"], found["rdzv_id"]) == ("2", "4", "42")
    assert found["rdzv_endpoint"] == "n1:29500" and found["rdzv_backend"] == "c10d"
    assert (configure(args).name, configure(args).seed) == ("slurm-42", 3)
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE)
    assert len(options) == text.count("#SBATCH") and dict(options)["ntasks-per-node"] == "1"
    assert text.index("#SBATCH") < text.index("set -euo"), "Slurm reads options up to the first command"


def test_a_task_of_skypilot(stand_ins: Path) -> None:
    """Its commands; and the file by SkyPilot's own schema, where it is installed."""
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    found, args = launched(stand_ins, ["bash", "-euc", task["run"]], **SKY, **task["envs"])
    assert (found["nnodes"], found["nproc_per_node"], found["rdzv_endpoint"]) == ("2", "8", "10.0.0.1:29500")
    assert (configure(args).name, configure(args).runs_dir) == ("sky", next(iter(task["file_mounts"])))
    extras = re.findall(r"\[([\w,]+)\]", task["setup"])[0].split(",")
    assert set(extras) <= set(known_extras())
    schemas = pytest.importorskip("sky.utils.schemas")
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(task, schemas.get_task_schema())


def known_extras() -> list[str]:
    import tomllib

    return list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])


def test_the_dockerfile_copies_what_there_is_and_installs_known_extras() -> None:
    """Its RUN lines run by `python -m benchmarks.dockerfile`, which takes minutes."""
    found = instructions((ROOT / "Dockerfile").read_text())
    copied = [source for name, argument in found if name == "COPY" for source in argument.split()[:-1]]
    assert copied and all((ROOT / source).exists() for source in copied)
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    assert kept[0] == "*" and {f"!{source}" for source in copied} == {line for line in kept if line.startswith("!")}
    (default,) = [argument.partition("=")[2] for name, argument in found if name == "ARG"]
    named = re.findall(r"EXTRAS=([\w,]+)", (ROOT / "Dockerfile").read_text())
    assert {extra for some in (default, *named) for extra in some.split(",")} <= set(known_extras())
    command = [word for name, argument in found if name in ("ENTRYPOINT", "CMD") for word in json.loads(argument)]
    assert command == ["dgpo-fast", "train"]
    (install,) = [argument for name, argument in found if name == "RUN" and "pip install" in argument]
    assert install == 'pip install ".[${EXTRAS}]"'
