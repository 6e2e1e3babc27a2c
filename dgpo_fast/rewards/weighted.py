"""Several rewards as one weighted sum, scored group by group, with failures kept apart from low scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dgpo_fast.errors import UserError
from dgpo_fast.prompts.prompt import Prompt, shorten
from dgpo_fast.rewards.protocol import Reward
from dgpo_fast.rewards.registry import load_reward, parse_spec


@dataclass(frozen=True)
class GroupScores:
    """Scores of P groups of G images.

    Attributes:
        rewards: float32 (P, G), the weighted sums; NaN in groups that are not valid.
        parts: each reward's own score, unweighted, under its name, and its named parts as `name/part`; float32 (P, G),
            NaN where there is none.
        valid: bool (P,), False where a reward failed: such a group must not be trained on, nor counted in a mean.
        failures: one line per failure.
    """

    rewards: np.ndarray
    parts: dict[str, np.ndarray]
    valid: np.ndarray
    failures: list[str]


@dataclass(frozen=True)
class WeightedReward:
    """The weighted sum of rewards, `rewards` and `weights` by name; made by `load_rewards`."""

    rewards: dict[str, Reward]
    weights: dict[str, float]

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Lets every reward refuse prompts that it cannot score. Raises UserError, one line naming the prompt."""
        for reward in self.rewards.values():
            check = getattr(reward, "check_prompts", None)
            if check is not None:
                check(prompts)

    def score_groups(self, images: np.ndarray, prompts: Sequence[Prompt], group_size: int) -> GroupScores:
        """Scores P groups of G images, calling each reward once per group.

        Args:
            images: uint8 (P·G, H, W, 3), RGB; the G images of a prompt lie together.
            prompts: P prompts.
            group_size: G ≥ 1.

        A reward that raises, or returns another number of scores, or one that is not finite, invalidates its group.
        A UserError is no failure of a group but a wrong set-up, and is raised; so is ValueError for wrong arguments.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images must be uint8 (P·G, H, W, 3), got {images.dtype} {images.shape}")
        if group_size < 1 or len(images) != len(prompts) * group_size:
            raise ValueError(f"got {len(images)} images for {len(prompts)} prompts of {group_size} images each")
        shape = (len(prompts), group_size)
        rewards = np.full(shape, np.nan, np.float32)
        parts = {name: np.full(shape, np.nan, np.float32) for name in self.rewards}
        valid = np.zeros(len(prompts), bool)
        failures = []
        for index, prompt in enumerate(prompts):
            scored, failed = self._score_group(images[index * group_size : (index + 1) * group_size], prompt)
            failures += failed
            if not failed:
                rewards[index], valid[index] = self._weighted_sum(scored), True
            for name, values in scored.items():
                parts.setdefault(name, np.full(shape, np.nan, np.float32))[index] = values
        return GroupScores(rewards=rewards, parts=parts, valid=valid, failures=failures)

    def _score_group(self, images: np.ndarray, prompt: Prompt) -> tuple[dict[str, np.ndarray], list[str]]:
        """What every reward says of one prompt's images: scores and parts, each float32 (G,), and failures."""
        scored: dict[str, np.ndarray] = {}
        failures = []
        for name, reward in self.rewards.items():
            try:
                scored |= _score(name, reward, images, prompt)
            except UserError:
                raise
            except Exception as error:
                failures.append(f"reward {name!r}, {_named(prompt)}: {_one_line(error)}")
        if not failures and not np.isfinite(self._weighted_sum(scored)).all():
            failures.append(f"{_named(prompt)}: the weighted sum of the rewards exceeds float32")
        return scored, failures

    def _weighted_sum(self, scored: dict[str, np.ndarray]) -> np.ndarray:
        """float32 (G,); infinite where the sum is too large for it."""
        with np.errstate(over="ignore"):
            terms = [weight * scored[name].astype(np.float64) for name, weight in self.weights.items()]
            return np.sum(terms, axis=0).astype(np.float32)


def load_rewards(specs: Sequence[str]) -> WeightedReward:
    """Loads and self-tests rewards given as `name`, `name=weight` or `module:attribute=weight`.

    Raises:
        UserError: one line, for a reward that is unknown, named twice or does not work here, or a malformed weight.
    """
    parsed = [parse_spec(spec) for spec in specs]
    weights = dict(parsed)
    if len(weights) < len(parsed):
        names = [name for name, _ in parsed]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"reward {twice!r} is named twice: name it once, with its weight")
    if not any(weights.values()):
        raise UserError("no reward has a weight: name at least one, for example shapes or ocr=0.5")
    return WeightedReward({name: load_reward(name) for name in weights}, weights)


def _score(name: str, reward: Reward, images: np.ndarray, prompt: Prompt) -> dict[str, np.ndarray]:
    """One reward's scores, under `name`, and its parts, under `name/part`, each float32 (G,).

    Raises:
        ValueError: for a wrong shape or a score that is not finite; and whatever the reward raises.
    """
    size = len(images)
    # Copies, so that a reward that works in place harms neither the next reward nor the pictures that are shown.
    answer = reward(images.copy(), [prompt.text] * size, [dict(prompt.metadata) for _ in range(size)])
    scores, parts = answer if isinstance(answer, tuple) else (answer, {})
    scored = {name: _vector(scores, size, "scores")}
    if not np.isfinite(scored[name]).all():
        raise ValueError(f"non-finite score among {scored[name].tolist()}")
    for part, values in parts.items():
        scored[f"{name}/{part}"] = _vector(values, size, f"part {part!r}")
    return scored


def _vector(values: Any, size: int, what: str) -> np.ndarray:
    if hasattr(values, "detach"):  # what a reward model returns: a tensor on any device, of any float type
        values = values.detach().float().cpu()
    with np.errstate(over="ignore"):  # what overflows float32 becomes infinite, and is then refused by name
        vector = np.asarray(values, dtype=np.float32)
    if vector.shape != (size,):
        raise ValueError(f"{what} of shape {vector.shape}, expected {(size,)}")
    return vector


def _named(prompt: Prompt) -> str:
    return f"prompt {shorten(prompt.text)}" + (f" ({prompt.origin})" if prompt.origin else "")


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
