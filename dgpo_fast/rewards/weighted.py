"""Several rewards as one weighted sum, scored group by group, with failures kept apart from low scores."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from dgpo_fast.errors import UserError
from dgpo_fast.prompts.prompt import Prompt, shorten
from dgpo_fast.prompts.unread import unread_keys
from dgpo_fast.rewards import golden
from dgpo_fast.rewards.device import on_device
from dgpo_fast.rewards.protocol import REWARD_KEY, Reward, not_finite
from dgpo_fast.rewards.registry import fingerprint, is_own, load_reward, parse_specs
from dgpo_fast.user_code import call, told
from dgpo_fast.wording import FAULTS, counted

if TYPE_CHECKING:
    import torch

CONTENT = "content of "
"""Begins the key under which a folder of scores keeps the fingerprint of a reward."""
Answer = dict[str, np.ndarray] | str
"""One reward's scores of a group, under its name, and its parts, under `name/part`, each float32 (G,); or one line on
what went wrong."""


@dataclass(frozen=True)
class GroupScores:
    """Scores of P groups of G images.

    Attributes:
        rewards: float32 (P, G), the weighted sums; NaN in groups that are not valid.
        parts: each reward's own score, unweighted, under its name, and its named parts as `name/part`; float32 (P, G),
            NaN if there is none, as for a prompt that other rewards were chosen for.
        valid: bool (P,), False if a reward failed or a picture is not finite: such a group must not be trained on, nor
            counted in a mean.
        failures: one line per failure.
        faults: uint8 (P, G), what is wrong with each picture: an index of `wording.FAULTS`, 0 if it is finite. No
            reward sees a group with a picture that is not.
    """

    rewards: np.ndarray
    parts: dict[str, np.ndarray]
    valid: np.ndarray
    failures: list[str]
    faults: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        """bool (P,), whether all pictures of a group are."""
        finite: np.ndarray = np.logical_and.reduce(self.faults == 0, axis=1)
        return finite


@dataclass(frozen=True)
class WeightedReward:
    """The weighted sum of rewards, `rewards` and `weights` by name; made by `load_rewards`.

    A prompt whose metadata names rewards under "reward", one or a list of them, is scored by these alone. `sources`
    are the names or paths that rewards were loaded from, and `fingerprints` tells apart rewards with the same name.
    """

    rewards: dict[str, Reward]
    weights: dict[str, float]
    sources: dict[str, str] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)

    @property
    def contents(self) -> dict[str, str]:
        """Fingerprints that stored scores must have to be those of the same rewards, by their names in messages."""
        return {f"{CONTENT}{self.sources[name]}": found for name, found in self.fingerprints.items()}

    def check_prompts(self, prompts: Sequence[Prompt]) -> list[str]:
        """Has every reward check its prompts. Raises UserError, one line naming the prompt, if one cannot be scored.

        Returns lines that the user should read: on keys that nothing reads, and what the rewards say.
        """
        reads = [getattr(reward, "metadata_keys", None) for reward in self.rewards.values()]
        known = None if None in reads else list(itertools.chain.from_iterable(reads))  # type: ignore[arg-type]
        lines = [] if known is None else unread_keys(prompts, known)
        chosen = [self.chosen(prompt) for prompt in prompts]
        for name, reward in self.rewards.items():
            check = getattr(reward, "check_prompts", None)
            if check is not None:
                mine = [prompt for prompt, names in zip(prompts, chosen, strict=True) if name in names]
                line = call(f"reward {name!r}", "cannot check the prompts", check, mine)
                lines += [f"reward {name!r}: {line}"] if isinstance(line, str) else []
        return lines

    def try_out(self, prompts: Sequence[Prompt], sizes: Mapping[int, tuple[int, int]]) -> None:
        """Tests each of the user's own rewards with coloured squares, for the first prompt that it is chosen for.

        A wrong answer is then found before a model is loaded. Rewards with `needs_real_pictures` are skipped.

        Args:
            prompts: those of the run.
            sizes: number of pictures that a reward gets at a time → their (height, width) in pixels.

        Raises UserError, one line, if a reward fails on them.
        """
        for name, reward in self.rewards.items():
            prompt = next((one for one in prompts if name in self.chosen(one)), None)
            if prompt is None or not is_own(reward) or getattr(reward, "needs_real_pictures", False):
                continue
            for count, size in sizes.items():
                squares = golden.squares(*size)
                answer = score_group(name, reward, squares[np.arange(count) % len(squares)], prompt)
                if isinstance(answer, str):
                    raise UserError(
                        f"reward {name!r}, tried out on {counted(count, 'coloured square')} for {_named(prompt)}: "
                        f"{answer}: fix it, or set needs_real_pictures = True in it if it cannot score such pictures "
                        "(docs/rewards.md)"
                    )

    @property
    def dependent_images(self) -> str | None:
        """The first reward whose score of a picture may depend on the others of its group; None if there is none."""
        return next((n for n, one in self.rewards.items() if not getattr(one, "independent_images", False)), None)

    def check_processes(self, processes: int, groups: int) -> None:
        """Raises UserError if this many processes would split groups that a reward must see whole."""
        name = self.dependent_images
        if groups < processes and name is not None:
            raise UserError(
                f"reward {name!r} may compare the pictures of a group, and {processes} processes would cut {groups} "
                f"groups into parts: use --rollout.groups {processes} or more, or set independent_images = True in "
                "the reward if it scores each picture on its own (docs/rewards.md)"
            )

    def score_groups(
        self, images: np.ndarray, prompts: Sequence[Prompt], group_size: int, faults: np.ndarray | None = None
    ) -> GroupScores:
        """Scores P groups of G images, calling each reward once per group that it is chosen for.

        Args:
            images: uint8 (P·G, H, W, 3), RGB; the G images of a prompt lie together.
            prompts: P prompts.
            group_size: G ≥ 1.
            faults: uint8 (P·G,), see `GroupScores`; None if all images are finite.

        A reward that raises, or returns another number of scores, or one that is not finite, invalidates its group.
        A UserError means that the set-up is wrong, and is raised. ValueError is raised for wrong arguments.
        """
        require_pictures(images)
        if group_size < 1 or len(images) != len(prompts) * group_size:
            raise ValueError(f"got {len(images)} images for {len(prompts)} prompts of {group_size} images each")
        chosen = [self.chosen(prompt) for prompt in prompts]
        groups = [images[index * group_size : (index + 1) * group_size] for index in range(len(prompts))]
        faults = np.zeros(len(images), np.uint8) if faults is None else faults
        faults = faults.reshape(len(prompts), group_size)
        asked = [[] if wrong.any() else names for names, wrong in zip(chosen, faults, strict=True)]
        return self.combine(self._answers(groups, prompts, asked), prompts, faults)

    def combine(
        self, answers: Mapping[tuple[int, str], Answer], prompts: Sequence[Prompt], faults: np.ndarray
    ) -> GroupScores:
        """Weighted sums of the rewards' answers for P groups of G images.

        Args:
            answers: by the group's index and the reward's name, for each reward that is chosen for the group's prompt;
                none for a group with a picture that is not finite.
            prompts: P prompts.
            faults: uint8 (P, G), see `GroupScores`.
        """
        shape = faults.shape
        rewards = np.full(shape, np.nan, np.float32)
        parts = {name: np.full(shape, np.nan, np.float32) for name in self.rewards}
        valid = np.zeros(len(prompts), bool)
        failures: list[str] = []
        for index, prompt in enumerate(prompts):
            if faults[index].any():
                continue
            names = self.chosen(prompt)
            scored, failed = _merge({name: answers[index, name] for name in names}, prompt)
            if not failed:
                total = self._weighted_sum(scored, names)
                if np.isfinite(total).all():
                    rewards[index], valid[index] = total, True
                else:
                    failed = [f"{_named(prompt)}: the weighted sum of the rewards exceeds float32"]
            failures += failed
            for name, values in scored.items():
                parts.setdefault(name, np.full(shape, np.nan, np.float32))[index] = values
        return GroupScores(rewards=rewards, parts=parts, valid=valid, failures=failures, faults=faults)

    def _answers(
        self, groups: Sequence[np.ndarray], prompts: Sequence[Prompt], chosen: Sequence[list[str]]
    ) -> dict[tuple[int, str], Answer]:
        """Each reward's answer for each group that it is chosen for.

        Rewards that wait for another machine (`groups_at_once`) start first, several groups at a time, while this
        thread runs the others.
        """
        asked = [(index, name) for index, names in enumerate(chosen) for name in names]
        waiting = {name: getattr(self.rewards[name], "groups_at_once", 1) for name in self.rewards}
        pools = {name: ThreadPoolExecutor(count) for name, count in waiting.items() if count > 1}

        def ask(index: int, name: str) -> Answer:
            return score_group(name, self.rewards[name], groups[index], prompts[index])

        try:
            remote = {key: pools[key[1]].submit(ask, *key) for key in asked if key[1] in pools}
            local = {key: ask(*key) for key in asked if key not in remote}
            return local | {key: future.result() for key, future in remote.items()}
        finally:
            for pool in pools.values():
                pool.shutdown(wait=False, cancel_futures=True)

    def chosen(self, prompt: Prompt) -> list[str]:
        """The rewards that score a prompt: those that its metadata names, or all. Raises UserError for unknown ones."""
        wanted = prompt.metadata.get(REWARD_KEY)
        if wanted is None:
            return list(self.rewards)
        names = [wanted] if isinstance(wanted, str) else wanted
        known = ", ".join(self.rewards)
        place = prompt.origin or shorten(prompt.text)
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise UserError(f'{place}: "{REWARD_KEY}" is no name and no list of names: use {known}')
        unknown = next((name for name in names if name not in self.rewards), None)
        if unknown is not None:
            raise UserError(f"{place}: no reward {unknown!r} in this run: use {known}, or add it to --rewards")
        if not any(self.weights[name] for name in names):
            raise UserError(f"{place}: its rewards ({', '.join(names)}) all have the weight 0: give one a weight")
        return [name for name in self.rewards if name in names]

    def _weighted_sum(self, scored: dict[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
        """float32 (G,); infinite if the sum is too large for it."""
        with np.errstate(over="ignore"):
            terms = [self.weights[name] * scored[name].astype(np.float64) for name in names]
            return np.sum(terms, axis=0).astype(np.float32)


def load_rewards(specs: Sequence[str], device: torch.device | None = None) -> WeightedReward:
    """Loads and self-tests rewards given as `name`, `name=weight`, `module:attribute=weight`… (`registry.parse_spec`).

    Args:
        specs: one for each reward.
        device: the `torch.device` of rewards with a model; by default this process's GPU, else the CPU.

    Raises:
        UserError: one line, for a reward that is unknown, named twice or does not work here, or a malformed weight.
    """
    parsed = parse_specs(specs)
    weights = {spec.name: spec.weight for spec in parsed}
    if len(weights) < len(parsed):
        names = [spec.name for spec in parsed]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"reward {twice!r} is named twice: name it once, with its weight")
    if not any(weights.values()):
        raise UserError("no reward has a weight: name at least one, for example shapes or ocr=0.5")
    with on_device(device):
        rewards = {spec.name: load_reward(spec.name, spec.source) for spec in parsed}
    found = {spec.name: fingerprint(spec.source, rewards[spec.name]) for spec in parsed}
    fingerprints = {name: one for name, one in found.items() if one is not None}
    return WeightedReward(rewards, weights, {spec.name: spec.source for spec in parsed}, fingerprints)


def scored_by_all(prompt: Prompt) -> Prompt:
    """`prompt` without its own choice of rewards."""
    return replace(prompt, metadata={key: value for key, value in prompt.metadata.items() if key != REWARD_KEY})


def picture_failures(faults: np.ndarray, prompts: Sequence[Prompt]) -> list[str]:
    """A line for each group that has a picture which is not finite.

    Args:
        faults: uint8 (P, G), see `GroupScores`. With G = 1, pictures have the numbers of their groups, from 0.
        prompts: P prompts.
    """
    lines = []
    for index, (prompt, wrong) in enumerate(zip(prompts, faults, strict=True)):
        bad = np.flatnonzero(wrong)
        if len(bad) and len(wrong) == 1:
            lines.append(f"picture {index}: {FAULTS[wrong[0]]} ({_named(prompt)})")
        elif len(bad):
            more = f" ({len(bad) - 1} more of the group are not finite)" if len(bad) > 1 else ""
            lines.append(f"{_named(prompt)}: picture {bad[0] + 1} of {len(wrong)}: {FAULTS[wrong[bad[0]]]}{more}")
    return lines


def require_pictures(images: np.ndarray) -> None:
    """Raises ValueError unless `images` is uint8 (B, H, W, 3)."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 (B, H, W, 3), got {images.dtype} {images.shape}")


class _NoScores(Exception):
    """A reward returned something other than scores; the text says what."""


def score_group(name: str, reward: Reward, images: np.ndarray, prompt: Prompt) -> Answer:
    """The reward's answer for the images of one prompt, uint8 (G, H, W, 3).

    A UserError is raised, since it is not a failure of a group.
    """
    try:
        return _valid_scores(name, reward, images, prompt)
    except UserError:
        raise
    except _NoScores as error:
        return str(error)
    except (Exception, SystemExit) as error:  # a reward may not end the run, not even by sys.exit
        return told(error, limit=200)


def _valid_scores(name: str, reward: Reward, images: np.ndarray, prompt: Prompt) -> dict[str, np.ndarray]:
    """As `score_group`. Raises _NoScores, and whatever the reward raises."""
    size = len(images)
    # Copies, so that a reward that works in place harms neither the next reward nor the pictures that are shown.
    answer = reward(images.copy(), [prompt.text] * size, [dict(prompt.metadata) for _ in range(size)])
    if isinstance(answer, tuple) and not (len(answer) == 2 and isinstance(answer[1], Mapping)):
        raise _NoScores("must return scores, or (scores, dictionary of parts)")
    scores, parts = answer if isinstance(answer, tuple) else (answer, {})
    scored = {name: _vector(scores, size, "returned")}
    problem = not_finite(scored[name])
    if problem:
        raise _NoScores(f"{problem}: return a finite number, or raise where there is none")
    for part, values in parts.items():
        scored[f"{name}/{part}"] = _vector(values, size, f"part {part!r} is")
    return scored


def _merge(answers: dict[str, Answer], prompt: Prompt) -> tuple[dict[str, np.ndarray], list[str]]:
    """The scores and parts of one prompt's group, and a line for each reward that failed."""
    scored: dict[str, np.ndarray] = {}
    failed = []
    for name, answer in answers.items():
        if isinstance(answer, dict):
            scored |= answer
        else:
            failed.append(f"reward {name!r}, {_named(prompt)}: {answer}")
    return scored, failed


def _vector(values: object, size: int, start: str) -> np.ndarray:
    """float32 (size,). Raises _NoScores, in a phrase that begins with `start`."""
    wanted = counted(size, "score")
    if values is None:
        raise _NoScores(f"{start} None instead of {wanted}")
    if _is_text(values):
        raise _NoScores(f"{start} text instead of {wanted}: make numbers of it")
    if hasattr(values, "detach"):  # what a reward model returns: a tensor on any device, of any float type
        values = values.detach().float().cpu()
    with np.errstate(over="ignore"):  # what overflows float32 becomes infinite, and is then refused by name
        vector = np.asarray(values, dtype=np.float32)
    if vector.ndim == 1 and len(vector) != size:
        raise _NoScores(f"{start} {counted(len(vector), 'score')} for {counted(size, 'picture')}")
    if vector.ndim != 1:
        kind = f"an array of shape {vector.shape}" if vector.ndim else "one number"
        raise _NoScores(f"{start} {kind} instead of {wanted}")
    return vector


def _is_text(values: object) -> bool:
    """Whether there is text among scores, which NumPy would read as numbers."""
    many = list(values.flat) if isinstance(values, np.ndarray) else values
    return isinstance(many, (str, bytes)) or (
        isinstance(many, (list, tuple)) and any(isinstance(one, (str, bytes)) for one in many)
    )


def _named(prompt: Prompt) -> str:
    return f"prompt {shorten(prompt.text)}" + (f" ({prompt.origin})" if prompt.origin else "")
