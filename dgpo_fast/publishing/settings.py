"""What `python -m dgpo_fast.export` writes, and where it goes."""

from pydantic.dataclasses import dataclass

from dgpo_fast.config.bounds import STRICT, PathText


@dataclass(kw_only=True, config=STRICT)
class ExportSettings:
    """What is written, and where it goes."""

    merged: bool = False
    """Write the whole pipeline, with the LoRA merged into it. A run with policy.train full always is one."""
    output: PathText | None = None
    """Folder to write, which must not exist yet. None: exports/NAME, after the run's name."""
    push: str | None = None
    """Name of the new model on the hub, `account/name`. None: nothing is uploaded."""
    private: bool = False
    """Make the model on the hub a private one."""
    dry_run: bool = False
    """With `push`: write the folder as it would be uploaded, and upload nothing. Needs no token."""
    base_model: str | None = None
    """Name on the hub, `account/name`, of the model that the run was trained from. None: the run's model, if that is
    such a name."""
    license: str | None = None
    """Licence of the base model by the hub's identifier, such as `apache-2.0`. None: the one that the model's own card
    names, in its folder or on the hub."""
