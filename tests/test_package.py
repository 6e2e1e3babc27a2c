"""The package as it is published: a source archive, the wheel built from it, and what is in both."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"dgpo_fast": ROOT / "dgpo_fast", "dgpo_kernels": ROOT / "kernels" / "dgpo_kernels"}


def files() -> set[str]:
    """Every file of the packages, as it is called in a wheel."""
    return {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_a_wheel_has_all_that_the_package_needs(tmp_path: Path) -> None:
    """One build for all of it: the archive, the wheel made from that, its metadata, and a command out of it."""
    source, wheel = tmp_path / "source", tmp_path / "wheel"
    for name in ("dgpo_fast", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    built = subprocess.run(build, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert built.returncode == 0, built.stdout
    (archive,) = tmp_path.glob("dgpo_fast-*.tar.gz")
    with tarfile.open(archive) as tar:
        assert not [name for name in tar.getnames() if re.match(r"[^/]+/(tests|benchmarks)", name)]
    with zipfile.ZipFile(*tmp_path.glob("dgpo_fast-*.whl")) as zipped:
        zipped.extractall(wheel)
    (information,) = wheel.glob("*.dist-info")
    found = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith(information.name)} == files()
    assert {"dgpo_fast/py.typed", "dgpo_kernels/py.typed", f"{information.name}/licenses/LICENSE"} <= found

    package = Distribution.at(information)
    assert {script.name: script.value for script in package.entry_points} == {"dgpo-fast": "dgpo_fast.__main__:main"}
    needed = [re.split(r"[<>= ;]", line)[0] for line in package.requires or () if "extra ==" not in line]
    assert {"torch", "diffusers", "pydantic"} <= set(needed) and len(needed) == len(set(needed))

    away = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(wheel)}, "text": True}
    where = "import dgpo_fast, dgpo_kernels; print(dgpo_fast.__file__, dgpo_kernels.__file__)"
    places = subprocess.check_output([sys.executable, "-c", where], **away).split()
    assert places == [str(wheel / name / "__init__.py") for name in PACKAGES]
    shown = subprocess.check_output([sys.executable, "-m", "dgpo_fast", "train", "--help"], **away)
    assert "  --rollout.group-size INT [default: 16]\n      " in shown
