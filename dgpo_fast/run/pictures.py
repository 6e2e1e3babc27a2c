"""Pictures in a run's folder: which there are, what they show, and which are new."""

from pathlib import Path

PICTURES = {
    "progress.png": "The same prompts after more and more iterations",
    "before_after.png": "Before and after training",
    "reward_curve.png": "Reward over the training",
}
"""By their files' names; what they show."""
MOST_ALARMS = 3
"""Pictures of alarms, the latest ones."""


def pictures_of(folder: Path) -> dict[str, str]:
    """The pictures that the run in `folder` has by now, and what they show."""
    alarms = sorted(path.name for path in folder.glob("alarm-*.png"))[-MOST_ALARMS:]
    shown = PICTURES | {name: f"Alarm after iteration {int(Path(name).stem.rpartition('-')[2])}" for name in alarms}
    return {name: what for name, what in shown.items() if (folder / name).is_file()}


class NewPictures:
    """Tells which of a run's pictures have been written since the last call.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._seen: dict[str, int] = {}

    def take(self) -> dict[str, Path]:
        """Name without its ending → file."""
        now = {name: (self._folder / name).stat().st_mtime_ns for name in pictures_of(self._folder)}
        new = {Path(name).stem: self._folder / name for name, time in now.items() if self._seen.get(name) != time}
        self._seen = now
        return new
