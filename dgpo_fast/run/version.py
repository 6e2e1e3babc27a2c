"""Which code wrote a checkpoint."""

import functools
import hashlib
from pathlib import Path

import dgpo_kernels

import dgpo_fast


@functools.cache
def code_version() -> str:
    """`0.1.0+1a2b3c4d5e6f`: the package's version, and a digest of the source of this package and its kernels.

    The digest tells two states of a working copy apart, which a version number does not, and needs no git.
    """
    digest = hashlib.sha256()
    for package in (dgpo_fast, dgpo_kernels):
        folder = Path(str(package.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return f"{dgpo_fast.__version__}+{digest.hexdigest()[:12]}"
