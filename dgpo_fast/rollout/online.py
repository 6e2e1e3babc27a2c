"""Groups drawn in the iteration that learns from them."""

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dgpo_fast.distributed import ALONE, Processes, place
from dgpo_fast.models.forward import batch_slices
from dgpo_fast.models.policy import PolicyModels, Weights
from dgpo_fast.models.work import WorkMeter
from dgpo_fast.prompts import Prompt
from dgpo_fast.prompts.dealing import GroupSampler, spread
from dgpo_fast.rewards import RewardPool
from dgpo_fast.rewards.gather import gather_scores
from dgpo_fast.rewards.pool.pool import Scoring
from dgpo_fast.rollout.draw import Draw
from dgpo_fast.rollout.sampler import Sampler
from dgpo_fast.rollout.source import Groups
from dgpo_fast.rollout.step_noise import StepNoise, joined
from dgpo_fast.run.console import Console
from dgpo_fast.run.metrics import Phases
from dgpo_fast.seeds import stream_seed


class RolloutWorker:
    """Draws, decodes and scores groups with given weights.

    Args:
        group_size: images of each prompt.
        models: its behaviour copy draws.
        sampler: draws with that copy.
        draw: how.
        rewards: score the images.
        keep_transitions: whether every step of a rollout with noise is kept.
        phases: seconds of each part go there.
        work: what the forwards do is counted there.
    """

    def __init__(
        self,
        group_size: int,
        models: PolicyModels,
        sampler: Sampler,
        draw: Draw,
        rewards: RewardPool,
        *,
        keep_transitions: bool,
        phases: Phases,
        work: WorkMeter,
    ):
        self.group_size, self.models, self.sampler, self.draw = group_size, models, sampler, draw
        self.rewards, self.keep_transitions, self.phases, self.work = rewards, keep_transitions, phases, work

    def draw_groups(
        self, prompts: Sequence[Prompt], weights: Weights, *, seed: int, number: int, processes: Processes = ALONE
    ) -> Groups:
        """One group of each prompt by `weights`; the noise is a function of (seed, number, position) alone.

        Each of `processes` draws and scores its share; all of them must call this together.
        """
        size = self.group_size
        share = place(len(prompts), size, processes.count)[processes.rank]
        texts = [prompts[position // size].text for position in range(share.start, share.stop)]
        scoring = self.rewards.start([prompts[position // size] for position in share.pieces], share.piece_size)
        with self.phases("encode"):
            text = self.sampler.encoder(texts)
        with self.phases("rollout"):
            self.models.load_behaviour(weights)
        latents, noises, waiting = [], [], deque()  # type: ignore[var-annotated]
        for rows in batch_slices(len(texts), self.draw.batch_size):
            with self.phases("rollout"):
                samples = torch.arange(share.start + rows.start, share.start + rows.stop, device=self.models.device)
                noises.append(self._step_noise(samples, seed, number))
                x0 = self.sampler.latents(
                    text[rows],
                    samples,
                    self.draw,
                    seed=stream_seed(seed, "initial noise"),
                    number=number,
                    step_noise=noises[-1],
                )
            latents.append(x0)
            self.work.sampled(text[rows], self.draw.forwards)
            waiting.append(self.sampler.start_decoding(x0))
            # If images are decoded beside the next batch's rollout, they are asked for after it.
            if len(waiting) > self.sampler.decodes_ahead:
                self._score(waiting.popleft(), scoring)
        while waiting:
            self._score(waiting.popleft(), scoring)
        if self.models.shards is not None:
            most = max(map(len, place(len(prompts), size, processes.count)))
            with self.phases("rollout"):
                self.sampler.keep_up(len(texts), most, text, self.draw)
        with self.phases("reward"):
            mine = scoring.result()
        scores = gather_scores(mine, share, len(prompts), processes, f"the rewards of draw {number + 1}")
        metrics = {"reward_busy_s": scoring.busy_s, "reward_wait_s": scoring.wait_s}
        return Groups(list(prompts), text, torch.cat(latents), scores, share, joined(noises), metrics)

    def _score(self, decoding: Callable[[], np.ndarray], scoring: Scoring) -> None:
        with self.phases("decode"):
            images = decoding()
        self.work.decoded(len(images))
        with self.phases("reward"):
            scoring.add(images)  # scored beside the rollout of the next batch

    def _step_noise(self, samples: torch.Tensor, seed: int, number: int) -> StepNoise | None:
        if self.draw.schedule.noise is None:
            return None
        return StepNoise(samples, seed=stream_seed(seed, "step noise"), draw=number, keep=self.keep_transitions)


class OnlineSource:
    """Groups of each iteration's prompts, drawn with the current result of `weights()`."""

    def __init__(
        self,
        worker: RolloutWorker,
        prompts: GroupSampler[Prompt],
        seed: int,
        weights: Callable[[], Weights],
        processes: Processes = ALONE,
    ):
        self.worker, self.prompts, self.seed, self.weights = worker, prompts, seed, weights
        self.processes = processes

    def prepare(self, folder: Path, console: Console, should_stop: Callable[[], bool]) -> None:
        """Does nothing: groups are drawn in their iteration."""

    def prompts_of(self, iterations: range) -> list[Prompt]:
        """See `Source.prompts_of`."""
        return self.prompts.all_drawn(iterations)

    def collect(self, iteration: int) -> Groups:
        """See `Source.collect`."""
        prompts = spread(self.prompts.draw(iteration), lambda prompt: tuple(self.worker.rewards.reward.chosen(prompt)))
        return self.worker.draw_groups(
            prompts, self.weights(), seed=self.seed, number=iteration, processes=self.processes
        )

    def summary(self) -> dict[str, Any]:
        """See `Source.summary`."""
        return {"source": "online", "drawing_s": 0.0}
