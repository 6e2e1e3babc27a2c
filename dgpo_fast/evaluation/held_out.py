"""A run's own evaluations, always on the same held-out prompts and initial noise, so that before and after can be
compared."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dgpo_fast.distributed import ALONE, Processes, Share, SharedError
from dgpo_fast.distributed.batch_part import filled
from dgpo_fast.distributed.guard import finite_remedy
from dgpo_fast.distributed.placement import even_ranges
from dgpo_fast.evaluation.statistics import Mean
from dgpo_fast.models.latents import Pictures
from dgpo_fast.prompts import Prompt
from dgpo_fast.rewards import RewardPool, WeightedReward
from dgpo_fast.rewards.gather import gather_scores
from dgpo_fast.rewards.weighted import scored_by_all
from dgpo_fast.rollout.draw import Draw
from dgpo_fast.rollout.sampler import Sampler
from dgpo_fast.seeds import stream_seed

SHOWN_IMAGES = 24
WATCHED = "watch/"
"""Begins the names of rewards that are scored beside the trained ones."""


@dataclass(frozen=True)
class Evaluation:
    """Scored images of held-out prompts.

    Attributes:
        prompts: one per image.
        rewards: (N,) float, NaN if the reward failed.
        images: (N, H, W, 3) uint8; only the first ones if loaded from a file.
        parts: named parts of the reward, (N,) each.
        failures: one line per image that could not be scored.
        contents: fingerprints of the rewards (`WeightedReward.contents`); None if they are unknown, as in files of
            earlier versions.
        not_finite: how many images are not finite; they have no reward.
    """

    prompts: list[Prompt]
    rewards: np.ndarray
    images: np.ndarray
    parts: dict[str, np.ndarray]
    failures: list[str]
    contents: dict[str, str] | None = None
    not_finite: int = 0

    def summary(self) -> dict:
        """`reward_mean`, `reward_ci95`, `prompts`, `images`, `parts` and `tags`, as `summary.json` holds them."""
        return {
            **_scores(self.rewards, self.prompts),
            "images_failed": int((~np.isfinite(self.rewards)).sum()),
            "images_not_finite": self.not_finite,
            "parts": {name: _mean_of_finite(values) for name, values in self.parts.items()},
            "tags": self.by_tag(),
        }

    def gain(self, before: "Evaluation") -> dict | None:
        """The mean difference from `before`, picture by picture, with its interval, overall and per tag, as in
        `summary`; None if `before` has other prompts."""
        if [prompt.text for prompt in self.prompts] != [prompt.text for prompt in before.prompts]:
            return None
        gains = replace(self, rewards=self.rewards.astype(np.float64) - before.rewards)
        return {**_scores(gains.rewards, gains.prompts), "tags": gains.by_tag()}

    def some(self, rows: slice) -> "Evaluation":
        """Some of the images, of those that are here."""
        parts = {name: values[rows] for name, values in self.parts.items()}
        return replace(
            self, prompts=self.prompts[rows], rewards=self.rewards[rows], images=self.images[rows], parts=parts
        )

    def of_part(self, name: str) -> "Evaluation":
        """The same, with a part of the reward in its place."""
        return replace(self, rewards=self.parts[name])

    def save(self, path: Path, shown: int = SHOWN_IMAGES) -> None:
        """Writes the scores and the first images, by default those which the run's pictures show."""
        prompts = json.dumps([prompt.to_json() for prompt in self.prompts])
        arrays = {"prompts": np.array(prompts), "rewards": self.rewards, "images": self.images[:shown]}
        arrays |= {f"part:{name}": values for name, values in self.parts.items()}
        arrays["not_finite"] = np.array(self.not_finite)
        if self.contents is not None:
            arrays["contents"] = np.array(json.dumps(self.contents))
        np.savez_compressed(path, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        """What `save` wrote; only arrays and text are read, nothing is unpickled."""
        with np.load(path, allow_pickle=False) as file:
            parts = {name.removeprefix("part:"): file[name] for name in file.files if name.startswith("part:")}
            prompts = [Prompt.from_json(record) for record in json.loads(str(file["prompts"]))]
            contents = json.loads(str(file["contents"])) if "contents" in file.files else None
            not_finite = int(file["not_finite"]) if "not_finite" in file.files else 0
            return cls(prompts, file["rewards"], file["images"], parts, [], contents, not_finite)

    def by_tag(self) -> dict[str, dict]:
        """tag → `reward_mean`, `reward_ci95`, `prompts`, `images`."""
        rows: dict[str, list[int]] = defaultdict(list)
        for row, prompt in enumerate(self.prompts):
            rows[prompt.tag].append(row)
        return {
            tag: _scores(self.rewards[members], [self.prompts[row] for row in members])
            for tag, members in sorted(rows.items())
        }


def _scores(rewards: np.ndarray, prompts: Sequence[Prompt]) -> dict:
    """Their mean with its interval, and how many prompts and images it is of."""
    found = Mean.of(rewards, prompts)
    return {"reward_mean": found.mean, "reward_ci95": found.ci95, "prompts": found.prompts, "images": found.images}


def _first_images(images: np.ndarray, start: int, count: int, processes: Processes) -> np.ndarray:
    """The first `count` images on every process; alone, all. `images` begin at `start`."""
    if processes.count == 1:
        return images
    shown = torch.zeros(count, *images.shape[1:], dtype=torch.uint8)
    own = max(0, min(len(images), len(shown) - start))
    shown[start : start + own] = torch.from_numpy(images[:own])
    return processes.sum(shown, "the evaluation's images").numpy()


def _mean_of_finite(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else None


def evaluate(
    sampler: Sampler,
    chosen: list[Prompt],
    reward: WeightedReward | RewardPool,
    draw: Draw,
    seed: int,
    on_step: Callable[[float], None] | None = None,
    processes: Processes = ALONE,
    sharded: bool = False,
    remedy: str = "",
    begun: bool = False,
    beside: RewardPool | None = None,
    shown: int = SHOWN_IMAGES,
) -> Evaluation:
    """Draws an image of each of the `chosen` prompts with the sampler's weights and scores it, also by the rewards
    `beside`, whose names get `WATCHED` in front.

    Each of `processes` draws whole batches of `draw` if there is one for each, so that an image is the same to the last
    bit on any number of them; all of them get the scores of all images, and the first `shown` ones. If the sampler's
    weights are `sharded`, they compute equally often.

    Raises UserError if no image is finite, with what helps a model that has `begun` to be trained; or, which ends with
    `remedy`, if no image could be scored.
    """
    unit = draw.batch_size if len(chosen) >= draw.batch_size * processes.count else 1
    ranges = [range(*ends) for ends in even_ranges(len(chosen), processes.count, unit)]
    start, stop = ranges[processes.rank].start, ranges[processes.rank].stop
    drawn = [chosen[number] for number in filled(ranges, processes.rank, sharded=sharded)]
    pictures = draw_images(sampler, drawn, draw, first=start, seed=seed, on_step=on_step)
    images, faults = (part[: stop - start] for part in pictures)
    mine = reward.score_groups(images, chosen[start:stop], group_size=1, faults=faults)
    scores = gather_scores(mine, Share(start, stop, 1), chosen, processes, "the evaluation's rewards")
    parts = {name: values[:, 0] for name, values in scores.parts.items()}
    if beside is not None:
        asked = [scored_by_all(prompt) for prompt in chosen[start:stop]]
        mine = beside.score_groups(images, asked, group_size=1, faults=faults)
        watched = gather_scores(mine, Share(start, stop, 1), chosen, processes, "the rewards beside the evaluation's")
        parts |= {f"{WATCHED}{name}": values[:, 0] for name, values in watched.parts.items()}
    images = _first_images(images, start, min(shown, len(chosen)), processes)
    if not scores.finite.any():
        place = sampler.first_fault(chosen[0], draw, number=0, seed=stream_seed(seed, "evaluation"))
        raise SharedError(
            f"no image of the evaluation is finite; the first: {scores.failures[0]}{place}: "
            f"{finite_remedy(sampler.dtype, begun=begun)}"
        )
    if not scores.valid.any():
        raise SharedError(
            f"no image of the evaluation could be scored; the first failure: {scores.failures[0]}{remedy}"
        )
    rewards = reward if isinstance(reward, WeightedReward) else reward.reward
    contents = rewards.contents | ({} if beside is None else beside.reward.contents)
    not_finite = int((~scores.finite).sum())
    return Evaluation(chosen, scores.rewards[:, 0], images, parts, scores.failures, contents, not_finite)


def draw_images(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    draw: Draw,
    *,
    first: int,
    seed: int,
    on_step: Callable[[float], None] | None = None,
) -> Pictures:
    """Pictures of B prompts, from noise that only depends on `seed` and their numbers.

    Args:
        sampler: draws with its transformer's weights.
        draw: how.
        first: the number of the first image; the others follow.
        seed: of the evaluation.
        on_step: told the share done, in (0, 1].
    """
    texts, negative = [prompt.text for prompt in prompts], [prompt.negative for prompt in prompts]
    stream = stream_seed(seed, "evaluation")
    batches = sampler.batches(texts, draw, first=first, seed=stream, negative=negative, on_step=on_step)
    return sampler.decode(torch.cat(list(batches)))
