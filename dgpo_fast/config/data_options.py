"""Settings of where training groups come from."""

from typing import Literal

from pydantic.dataclasses import dataclass

from dgpo_fast.config.bounds import STRICT, Count, PathText


@dataclass(kw_only=True, config=STRICT)
class Data:
    """Where the training groups come from."""

    source: Literal["online", "offline", "preferences"] = "online"
    """online: the behaviour weights draw new groups in every iteration. offline: the base model draws all
    groups once, before training. preferences: pictures that people have judged; none are drawn."""
    preferences: PathText | None = None
    """Judged pictures to learn from: a .jsonl file with one judgement a line, or a folder (docs/preferences.md). A
    fifth of their prompts is held out. `prompts` is then not read, and `rewards` only score the pictures of
    evaluations."""
    noise_passes: Count | None = None
    """K: only the first K passes over the preferences have noise of their own. Later passes repeat them, and read what
    the base model predicted then from CPU memory. None: every pass has new noise."""
    offline_groups: Count = 1024
    """Number of groups that an offline run draws. Training repeats them as often as needed."""
    folder: PathText | None = None
    """Folder of the offline groups, or of the encoded pictures of preferences. Other runs can reuse them. None: a
    folder inside the run's folder."""
