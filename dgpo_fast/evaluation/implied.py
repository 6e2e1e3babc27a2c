"""Held-out preferences: how often a model's own preferences are those of people.

What a model prefers needs no reward. With d the mean squared error of a velocity v for the noised picture
x_t = (1 − σ)·x0 + σ·ε, mean (v − (ε − x0))², a picture's implied reward is the mean over fixed noise levels of

    d_base − d_policy

as in the losses of Diffusion-DPO and DGPO: how much likelier training has made the picture. The pictures of a prompt
share their noise. Before training, all implied rewards are 0.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from dgpo_kernels import group_noise, philox_normal
from torch import Tensor

from dgpo_fast.evaluation.statistics import Mean, mean_with_ci95
from dgpo_fast.models.forward import batch_slices, predict, wide
from dgpo_fast.models.policy import PolicyModels, Weights
from dgpo_fast.prompts.preferences import JudgedGroup
from dgpo_fast.records import JsonObject
from dgpo_fast.rollout.judged import JudgedSource
from dgpo_fast.seeds import stream_seed

LEVELS = 8
"""Noise levels, in the middles of equal parts of [0, 1]."""


class ImpliedPreferences:
    """What weights prefer among the held-out pictures of `source`, beside what people said.

    The behaviour copy is left with the weights that were asked for.

    Args:
        source: with its pictures encoded.
        models: the run's.
        seed: of the noise, as that of evaluations.
    """

    def __init__(self, source: JudgedSource, models: PolicyModels, seed: int):
        self.source, self.models, self.seed = source, models, stream_seed(seed, "held-out preferences")
        self._base: Tensor | None = None

    def summary(self, weights: Weights) -> JsonObject:
        """`agreement` with people, as it is known; empty if nothing is held out that prefers anything."""
        self.models.load_behaviour(weights)
        if self._base is None:
            self._base = self._errors(self.models.base)
        rewards = (self._base - self._errors(self.models.behaviour)).mean(1).cpu().numpy()
        return agreement(self.source.held_out, rewards)

    @torch.no_grad()
    def _errors(self, transformer: torch.nn.Module) -> Tensor:
        """d of each held-out picture at each noise level, (N, LEVELS) fp32."""
        worker, groups = self.source.worker, self.source.held_out
        images = [image for group in groups for image in group.images]
        prompts = [group.prompt for group in groups for _ in group.images]
        numbers = [number for number, group in enumerate(groups) for _ in group.images]
        found = torch.zeros(len(images), LEVELS, device=self.models.device)
        for rows in batch_slices(len(images), worker.draw.batch_size):
            x0, key = self.source.latents(images[rows]), torch.tensor(numbers[rows], device=self.models.device)
            text = worker.texts(prompts[rows])
            for level in range(LEVELS):
                sigma = torch.full((), (level + 0.5) / LEVELS, device=x0.device)
                x_t = group_noise(x0, sigma, key, seed=self.seed, draw=level)
                target_v = philox_normal(tuple(x0.shape[1:]), key, seed=self.seed, draw=level) - x0
                velocity = wide(predict(transformer, x_t, 1000 * sigma, text))
                found[rows, level] = (velocity - target_v).square().flatten(1).mean(1)
        return found


def agreement(groups: Sequence[JudgedGroup], rewards: np.ndarray) -> JsonObject:
    """How often implied rewards order pictures as people did; equal ones count half.

    `accuracy` is of all pairs of pictures of one prompt that were judged differently. `likes_auc`, if there are likes,
    is of all pairs of a liked and a disliked picture, of whatever prompts. Both have 95 % intervals, for which prompts
    are independent (`statistics.mean_with_ci95`).

    Args:
        groups: judged pictures.
        rewards: (N,) implied, in their order.
    """
    right, prompts, start = [], [], 0
    likes: dict[float, list[float]] = {1.0: [], -1.0: []}
    of: dict[float, list[str]] = {1.0: [], -1.0: []}
    for group in groups:
        own, said = rewards[start : start + len(group.images)], np.array(group.scores)
        start += len(own)
        better, worse = np.nonzero(said[:, None] > said)
        right += list(_right(own[better], own[worse]))
        prompts += [group.prompt] * len(better)
        for sign in likes:
            chosen = own[sign * said > 0] if group.kind == "like" else own[:0]
            likes[sign] += list(chosen)
            of[sign] += [group.prompt.text] * len(chosen)
    found: JsonObject = {}
    if right:
        mean = Mean.of(np.array(right), prompts)
        found = {"accuracy": mean.mean, "accuracy_ci95": mean.ci95, "pairs": mean.images, "prompts": mean.prompts}
    if likes[1.0] and likes[-1.0]:
        table = _right(np.array(likes[1.0])[:, None], np.array(likes[-1.0]))
        sides = [mean_with_ci95(table.mean(1), of[1.0]), mean_with_ci95(table.mean(0), of[-1.0])]
        half = math.hypot(*((high - low) / 2 for _, (low, high) in sides))
        auc = float(table.mean())
        found |= {"likes_auc": auc, "likes_auc_ci95": [auc - half, auc + half], "liked": len(table)}
        found |= {"disliked": table.shape[1]}
    return found


def told(found: JsonObject) -> str:
    """`agreement` as a line for the terminal."""
    parts = []
    for name, of in (
        ("accuracy", "{pairs} pairs of {prompts} prompts"),
        ("likes_auc", "{liked} likes × {disliked} dislikes"),
    ):
        if name in found:
            low, high = found[f"{name}_ci95"]
            interval = f" ({100 * low:.1f} to {100 * high:.1f})" if math.isfinite(low) else ""  # one prompt has none
            parts.append(f"{100 * found[name]:.1f} %{interval} of {of.format(**found)}")
    return f"held-out preferences: the model agrees with {' and '.join(parts)}; 50 % is chance"


def _right(better: np.ndarray, worse: np.ndarray) -> np.ndarray:
    right: np.ndarray = (better > worse) + 0.5 * (better == worse)
    return right
