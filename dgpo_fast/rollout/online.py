"""Groups drawn in the iteration that learns from them."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dgpo_fast.distributed import ALONE, Processes, place
from dgpo_fast.distributed.batch_part import filled
from dgpo_fast.models.forward import batch_slices
from dgpo_fast.models.latents import Pictures
from dgpo_fast.models.policy import PolicyModels, Weights
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.models.work import WorkMeter
from dgpo_fast.prompts import Prompt
from dgpo_fast.prompts.dealing import GroupSampler, spread
from dgpo_fast.records import JsonObject
from dgpo_fast.rewards import RewardPool
from dgpo_fast.rewards.gather import gather_scores
from dgpo_fast.rewards.pool.pool import Scoring
from dgpo_fast.rollout.draw import Draw
from dgpo_fast.rollout.noisy_steps import RolloutNoise
from dgpo_fast.rollout.sampler import Sampler
from dgpo_fast.rollout.source import Groups
from dgpo_fast.rollout.step_noise import StepNoise, joined
from dgpo_fast.run.console import Console
from dgpo_fast.run.metrics import Phases
from dgpo_fast.seeds import stream_seed


@dataclass(eq=False, kw_only=True)
class RolloutWorker:
    """Draws, decodes and scores groups with given weights.

    Attributes:
        group_size: images of each prompt.
        models: its behaviour copy draws.
        sampler: draws with that copy.
        draw: how.
        rewards: score the images.
        noise: where noise is shared and moved, and whether steps with noise are kept.
        phases: seconds of each part go there.
        work: what the forwards do is counted there.
    """

    group_size: int
    models: PolicyModels
    sampler: Sampler
    draw: Draw
    rewards: RewardPool
    noise: RolloutNoise
    phases: Phases
    work: WorkMeter

    def texts(self, prompts: Sequence[Prompt]) -> TextEmbeds:
        """What the transformer reads of `prompts`, a row each, as the objective needs it."""
        text = self.sampler.encoder([prompt.text for prompt in prompts], [prompt.negative for prompt in prompts])
        return text.with_embedded(self.draw.guidance.embedded)

    def draw_groups(
        self, prompts: Sequence[Prompt], weights: Weights, *, seed: int, number: int, processes: Processes = ALONE
    ) -> Groups:
        """One group of each prompt by `weights`; the noise is a function of (seed, number, position) alone.

        Each of `processes` draws and scores its share; all of them must call this together.
        """
        size = self.group_size
        shares = place(len(prompts), size, processes.count)
        share, ranges = shares[processes.rank], [range(each.start, each.stop) for each in shares]
        positions = filled(ranges, processes.rank, sharded=self.models.shards is not None)
        scoring = self.rewards.start([prompts[position // size] for position in share.pieces], share.piece_size)
        with self.phases("encode"):
            text = self.texts([prompts[position // size] for position in positions])
        with self.phases("rollout"):
            self.models.load_behaviour(weights)
        if self.noise.window is not None:
            self.noise.window.place(number)
        samples = torch.tensor(positions, device=self.models.device)
        starts = samples // size * size if self.noise.share_initial else samples
        latents, noises, waiting = [], [], deque()  # type: ignore[var-annotated]
        for rows in batch_slices(len(positions), self.draw.batch_size):
            with self.phases("rollout"):
                noises.append(self._step_noise(samples[rows], seed, number))
                x0 = self.sampler.latents(
                    text[rows],
                    starts[rows],
                    self.draw,
                    seed=stream_seed(seed, "initial noise"),
                    number=number,
                    step_noise=noises[-1],
                )
            x0 = x0[: max(len(share) - rows.start, 0)]
            self.work.sampled(text[rows], self.draw.forwards, useful=len(x0))
            if len(x0) == 0:
                continue
            latents.append(x0)
            waiting.append(self.sampler.start_decoding(x0))
            # If images are decoded beside the next batch's rollout, they are asked for after it.
            if len(waiting) > self.sampler.decodes_ahead:
                self._score(waiting.popleft(), scoring)
        while waiting:
            self._score(waiting.popleft(), scoring)
        with self.phases("reward"):
            mine = scoring.result()
        scores = gather_scores(mine, share, prompts, processes, f"the rewards of draw {number + 1}")
        metrics = {"reward_busy_s": scoring.busy_s, "reward_wait_s": scoring.wait_s}
        own, transitions = slice(0, len(share)), joined(noises)
        transitions = None if transitions is None else transitions[own]
        return Groups(list(prompts), text[own], torch.cat(latents), scores, share, transitions, metrics)

    def _score(self, decoding: Callable[[], Pictures], scoring: Scoring) -> None:
        with self.phases("decode"):
            pictures = decoding()
        self.work.decoded(len(pictures.images))
        with self.phases("reward"):
            scoring.add(*pictures)  # scored beside the rollout of the next batch

    def _step_noise(self, samples: torch.Tensor, seed: int, number: int) -> StepNoise | None:
        if self.draw.schedule.noise is None:
            return None
        return StepNoise(samples, seed=stream_seed(seed, "step noise"), draw=number, keep=self.noise.keep_steps)


@dataclass(eq=False)
class OnlineSource:
    """Groups of each iteration's prompts, drawn with the current result of `weights()`."""

    worker: RolloutWorker
    prompts: GroupSampler[Prompt]
    seed: int
    weights: Callable[[], Weights]
    processes: Processes = ALONE

    def prepare(self, folder: Path, console: Console, should_stop: Callable[[], bool]) -> None:
        """Does nothing: groups are drawn in their iteration."""

    def prompts_of(self, iterations: range) -> list[Prompt]:
        """See `Source.prompts_of`."""
        return self.prompts.all_drawn(iterations)

    def collect(self, iteration: int) -> list[Groups]:
        """See `Source.collect`."""
        prompts = spread(self.prompts.draw(iteration), lambda prompt: tuple(self.worker.rewards.reward.chosen(prompt)))
        return [
            self.worker.draw_groups(prompts, self.weights(), seed=self.seed, number=iteration, processes=self.processes)
        ]

    def summary(self) -> JsonObject:
        """See `Source.summary`."""
        return {"source": "online", "drawing_s": 0.0}
