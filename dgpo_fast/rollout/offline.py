"""Groups drawn once by the reference model, scored, and kept on disk for this run and others."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from dgpo_fast.config.options import Config
from dgpo_fast.distributed import ALONE, Processes, place
from dgpo_fast.distributed.guard import finite_remedy
from dgpo_fast.errors import UserError
from dgpo_fast.models.fingerprints import sampled_fingerprint
from dgpo_fast.prompts import Prompt
from dgpo_fast.prompts.dealing import GroupSampler
from dgpo_fast.prompts.prompt import digest
from dgpo_fast.records import JsonObject
from dgpo_fast.rewards import GroupScores
from dgpo_fast.rollout.group_folder import Drawing, GroupFolder, GroupPlace, Stored, load
from dgpo_fast.rollout.online import RolloutWorker
from dgpo_fast.rollout.source import Groups
from dgpo_fast.run.console import Console, duration
from dgpo_fast.run.depends import WEIGHTS

FORMAT = 2
# Rollout settings that do not change the images.
NO_CONDITION = ("groups", "batch_size")


class OfflineSource:
    """Groups of the reference model. Training repeats them, in a new order in every pass.

    Args:
        config: the run's; `data.folder` is checked at once.
        worker: draws and scores missing groups.
        prompts: the training prompts.
        model: fingerprints of what the reference model draws with.
        processes: they take turns drawing files, into a folder that all of them can access.

    Raises UserError if the folder's groups were drawn with other settings.
    """

    def __init__(
        self,
        config: Config,
        worker: RolloutWorker,
        prompts: list[Prompt],
        model: Mapping[str, str],
        processes: Processes = ALONE,
    ):
        self.config, self.worker, self.prompts, self.processes = config, worker, prompts, processes
        self.model = model
        self.wanted = self._wanted()
        self.earlier = {"model": sampled_fingerprint(worker.sampler.pipeline, with_text=True)}
        self.drawing_s = 0.0
        self.places: GroupSampler[GroupPlace] | None = None
        if config.data.folder:
            GroupFolder(Path(config.data.folder), self.earlier).drawing(self.wanted)

    def prepare(self, folder: Path, console: Console, should_stop: Callable[[], bool]) -> None:
        """Draws the groups that are missing."""
        home = GroupFolder(
            Path(self.config.data.folder) if self.config.data.folder else folder / "groups", self.earlier
        )
        with self.processes.together("the folder of offline groups"):
            if self.processes.first and home.drawing(self.wanted) is None:
                home.start(self.wanted)
        drawing = home.drawing(self.wanted)
        if drawing is None:
            raise UserError(
                f"{home.home}: process {self.processes.rank} does not see it; put --data.folder on a shared disk"
            )
        with self.processes.together("the offline groups"):
            done = self._draw_missing(home, drawing, console, should_stop)
        if self.processes.any(not done, "the offline groups"):
            return
        places, self.drawing_s, dropped = home.index(drawing)
        note = f"; {dropped} could not be scored" if dropped else ""
        size = self.config.rollout.group_size
        console.note(
            f"offline: {len(places)} groups of {size} images, drawn and scored in {duration(self.drawing_s)}, are in "
            f"{home.home}{note}"
        )
        self.places = GroupSampler(places, self.config.rollout.groups, self.config.seed, stream="offline groups")

    def prompts_of(self, iterations: range) -> list[Prompt]:
        """See `Source.prompts_of`."""
        return self._dealer(self.wanted).all_drawn(range(len(self.wanted.files)))

    def collect(self, iteration: int) -> list[Groups]:
        """See `Source.collect`."""
        assert self.places is not None, "prepare comes first"
        with self.worker.phases("load"):
            stored = [load(where) for where in self.places.draw(iteration)]
            size = self.config.rollout.group_size
            share = place(len(stored), size, self.processes.count)[self.processes.rank]
            mine = [stored[group].x0[first % size : first % size + end - first] for group, first, end in share.parts]
            x0 = torch.cat(mine).to(self.worker.models.device)
        with self.worker.phases("encode"):
            text = self.worker.texts([stored[position // size].prompt for position in range(share.start, share.stop)])
        return [Groups([group.prompt for group in stored], text, x0, _scores(stored), share)]

    def summary(self) -> JsonObject:
        """See `Source.summary`."""
        groups = len(self.places.items) if self.places else 0
        drawn = groups * self.config.rollout.group_size
        return {"source": "offline", "drawing_s": self.drawing_s, "drawn_images": drawn}

    def _wanted(self) -> Drawing:
        rollout = asdict(self.config.rollout)
        conditions = {
            "format": FORMAT,
            **{"model" if name == WEIGHTS else name: found for name, found in self.model.items()},
            "prompts": digest(self.prompts),
            "rewards": list(self.config.rewards),
            **self.worker.rewards.reward.contents,
            **{f"rollout.{name}": rollout[name] for name in rollout if name not in NO_CONDITION},
        }
        return Drawing(conditions, self.config.data.offline_groups, self.config.rollout.groups, self.config.seed)

    def _dealer(self, drawing: Drawing) -> GroupSampler[Prompt]:
        return GroupSampler(self.prompts, drawing.file_groups, drawing.seed)

    def _draw_missing(
        self, home: GroupFolder, drawing: Drawing, console: Console, should_stop: Callable[[], bool]
    ) -> bool:
        """Draws file after file. False if it was asked to stop before the last one."""
        mine = range(self.processes.rank, len(drawing.files), self.processes.count)
        missing = deque(number for number in mine if not home.path(number).exists())
        if not missing:
            return True
        lost = 0
        with console.track(f"offline: drawing {drawing.groups} groups from the reference model") as on_step:
            while missing:
                if should_stop():
                    return False
                scores = self._draw_file(home, drawing, missing[0])
                if not scores.finite.any():
                    raise UserError(
                        f"{home.home}: every group of a file has pictures that are not finite; the first: "
                        f"{scores.failures[0]}: {finite_remedy(self.worker.models.dtype, begun=False)}"
                    )
                for line in scores.failures:
                    console.note(f"offline: group dropped: {line}")
                if scores.valid.any():
                    lost = 0
                    missing.popleft()
                    on_step(1 - len(missing) / len(mine))
                    continue
                lost += 1
                if lost >= self.config.max_lost_iterations:
                    raise UserError(
                        f"{home.home}: no group of {lost} files in a row could be scored; fix the reward "
                        f"and --resume. The last failure: {scores.failures[-1]}"
                    )
                missing.rotate(-1)  # a reward that is unavailable for a while may be back after the other files
        return True

    def _draw_file(self, home: GroupFolder, drawing: Drawing, number: int) -> GroupScores:
        """Draws and scores the groups of one file, which is written if any of them could be scored."""
        started = time.perf_counter()
        prompts = self._dealer(drawing).draw(number)
        prompts = prompts[: len(drawing.files[number])]
        weights = self.worker.models.initial_weights()
        groups = self.worker.draw_groups(prompts, weights, seed=drawing.seed, number=number)
        if groups.scores.valid.any():
            home.write(number, groups, time.perf_counter() - started)
        return groups.scores


def _scores(stored: list[Stored]) -> GroupScores:
    """Scores of P groups, with NaN if a part of the reward says nothing of a group."""
    names = dict.fromkeys(name for group in stored for name in group.parts)
    empty = np.full_like(stored[0].rewards, np.nan)
    return GroupScores(
        rewards=np.stack([group.rewards for group in stored]),
        parts={name: np.stack([group.parts.get(name, empty) for group in stored]) for name in names},
        valid=np.ones(len(stored), bool),
        failures=[],
        faults=np.zeros((len(stored), len(empty)), np.uint8),
    )
