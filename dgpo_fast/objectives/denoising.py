"""What objectives share that are a mean over samples and noise levels.

At a level σ an image x0 becomes x_t = (1 − σ)·x0 + σ·ε, and its own velocity is v* = ε − x0. Frozen weights predict
there first, several levels in full batches; then the policy learns in micro-batches of any size. Four objectives are
regressions of the policy's velocity to a fixed one, a step from an anchor towards an image's own velocity or away from
it:

    mean (v − stop[anchor + k·(v* − v_b)])²

With k = 1 and anchor = v_b, this is d = mean (v − v*)²; with k = 0, it is a pull to the anchor.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Protocol

import torch
from dgpo_kernels import group_noise, philox_normal
from torch import Tensor

from dgpo_fast.config.agreement import LevelSettings
from dgpo_fast.config.objective_options import Keys, grid_steps
from dgpo_fast.config.options import Config
from dgpo_fast.errors import UserError
from dgpo_fast.models.family import Guidance
from dgpo_fast.models.forward import batch_slices, guided, predict, predict_pair, wide
from dgpo_fast.models.policy import PolicyModels, Weights, autocast
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.objectives.batch import Batch, add_metrics
from dgpo_fast.objectives.drift import DRIFT, drift_sums, mean_square, norm_hinge
from dgpo_fast.objectives.equal_groups import zero_gradients
from dgpo_fast.objectives.kl_term import weighed
from dgpo_fast.objectives.levels import Inputs, Level, frozen_batch, predict_levels
from dgpo_fast.objectives.noise_levels import NoiseLevels
from dgpo_fast.objectives.protocol import Objective
from dgpo_fast.records import Metrics
from dgpo_fast.seeds import stream_seed


@dataclass(frozen=True)
class Noised:
    """Samples at one noise level, and what frozen weights predict there. No tensor has a gradient.

    Attributes:
        batch: the B samples.
        inputs: what the transformers read, a row a sample.
        sigma: (B,).
        weight: (B,) fp32, 0 for padding.
        key: (B,) int64, of the noise.
        seed, draw: () int64 each, of the noise.
        predicted: (B, …) by name: `ref_v` is the base's velocity, with guidance if the objective has it, `base_v` the
            one without, if `ref_v` has guidance, and `old_v` θ_old's.
    """

    batch: Batch
    inputs: Inputs
    sigma: Tensor
    weight: Tensor
    key: Tensor
    seed: Tensor
    draw: Tensor
    predicted: Mapping[str, Tensor]

    @cached_property
    def target_v(self) -> Tensor:
        """v* = ε − x0, (B, C, H, W)."""
        x0 = self.batch.x0
        return philox_normal(tuple(x0.shape[1:]), self.key, seed=self.seed, draw=self.draw, dtype=x0.dtype) - x0

    @property
    def base_v(self) -> Tensor | None:
        """The base's velocity without guidance, (B, C, H, W); None if it was not predicted."""
        return self.predicted.get("base_v", self.predicted.get("ref_v"))

    def velocity(self, name: str) -> Tensor:
        """`predicted[name]` in fp32, or wider."""
        return wide(self.predicted[name])

    def __len__(self) -> int:
        return len(self.key)

    def __getitem__(self, rows: slice) -> "Noised":
        """Some of the samples."""
        return replace(
            self,
            batch=self.batch[rows],
            inputs=self.inputs[rows],
            sigma=self.sigma[rows],
            weight=self.weight[rows],
            key=self.key[rows],
            predicted={name: tensor[rows] for name, tensor in self.predicted.items()},
        )


Losses = Callable[[Tensor, Noised], dict[str, Tensor]]
"""(policy_v (B, C, H, W) in fp32 or wider, the B samples) → (B,) each: `loss`, which is differentiated, and metrics."""


class Settings(LevelSettings, Protocol):
    """What the settings of each of these objectives have."""

    noise: Keys


class KLSettings(Protocol):
    """What the settings of those with a KL term have."""

    kl_weight: float

    @property
    def kl_weight_worst(self) -> float | None: ...


def levels_at_once(config: Config, settings: Settings) -> int:
    """Noise levels that frozen weights predict together."""
    if not config.engine.batch_timesteps:
        return 1
    return settings.timesteps or len(grid_steps(settings.levels, config.rollout.num_inference_steps) or ())


class DenoisingObjective(Objective):
    """A mean over samples and noise levels of `losses`.

    Args:
        config: the run's.
        settings: the objective's.
        ref: whether the base predicts, with `guidance_scale`.
        old: whether θ_old predicts.
        guidance_scale: 1 for no guidance.
    """

    def __init__(self, config: Config, settings: Settings, *, ref: bool, old: bool, guidance_scale: float = 1.0):
        self.settings, self.old, self.guidance_scale = settings, old, guidance_scale
        self.norm_hinge, self.kl_growth = config.regulariser.norm_hinge, config.regulariser.kl_growth
        self.bound = config.advantage.bound
        self.ref = ref or self.norm_hinge > 0
        self.needs = self.traits(config)
        if settings.levels == "logit_normal" and config.rollout.shift is None:
            name = config.objective
            raise UserError(
                f"{name}.levels logit_normal shifts levels as the rollout's grid, and rollout.shift is none: give one"
            )
        self.levels = NoiseLevels(settings.levels, settings.timesteps, config.seed, config.rollout.shift)
        self.noise_seed = stream_seed(config.seed, "training noise")
        self.micro_batch, self.forward_batch = config.policy.micro_batch_size, config.rollout.batch_size
        self.frozen_batch = frozen_batch(config.rollout, pairs=self.needs.guided_base)

    @abstractmethod
    def losses(self, policy_v: Tensor, noised: Noised) -> dict[str, Tensor]:
        """See `Losses`."""

    def with_kl(self, found: dict[str, Tensor], policy_v: Tensor, noised: Noised, kl: KLSettings) -> dict[str, Tensor]:
        """`found` with `kl`, and in its `loss` with the weights of the settings `kl`, if the base predicts."""
        if not self.ref:
            return found
        each, batch = mean_square(policy_v - noised.velocity("ref_v")), noised.batch
        weight = kl_weights(batch.advantage, self.bound, kl.kl_weight, kl.kl_weight_worst)
        return found | {"loss": found["loss"] + weighed(each, weight, self.kl_growth, batch.kl_gate), "kl": each}

    def optimizer_batches(self, batch: Batch) -> Sequence[Batch]:
        """As many batches of whole groups as there are optimizer steps."""
        return batch.split(self.needs.optimizer_steps)

    def accumulate(self, batch: Batch, models: PolicyModels, old: Weights) -> dict[str, Tensor]:
        """See `Objective.accumulate`. Metrics are means over samples and noise levels."""
        if len(batch.x0) == 0:
            zero_gradients(models)
            return self.without_samples(batch)
        if self.old:
            models.load_behaviour(old)
        return self.learn(batch, models)

    def without_samples(self, batch: Batch) -> dict[str, Tensor]:
        """What a process does in place of `learn` that has no sample of `batch`."""
        return {}

    def learn(self, batch: Batch, models: PolicyModels) -> dict[str, Tensor]:
        """Adds the gradient of `batch`, and returns its part of the metrics."""
        levels = self.drawn_levels(batch)
        totals: Metrics = {}
        for noised in self._noised(batch, levels, models):
            add_metrics(totals, self.backward(noised, models, 1 / (batch.samples * len(levels))), 1.0)
        return totals

    def backward(self, noised: Noised, models: PolicyModels, scale: float) -> dict[str, Tensor]:
        """Adds the gradient of `scale` times the sum of the samples' losses; the metrics, summed and scaled alike."""
        return sweep(noised, models, scale, self.micro_batch, self.losses, self.norm_hinge)

    def drawn_levels(self, batch: Batch) -> list[Level]:
        """The noise levels of the iteration that `batch` is of."""
        return self.levels.draw(batch.iteration, batch.schedule, self._key(batch))

    def _key(self, batch: Batch) -> Tensor:
        return batch.sample_index if self.settings.noise == "sample" else batch.group_index

    def _noised(self, batch: Batch, levels: Sequence[Level], models: PolicyModels) -> Iterator[Noised]:
        """The samples of `batch` at each of `levels`."""
        key, weight = self._key(batch), batch.weight
        seed = torch.full((), self.noise_seed, device=key.device)
        forward = partial(self._predict, models)
        for slots in batch_slices(len(levels), self.needs.levels_at_once):
            some = levels[slots]
            draws = [torch.full((), level.draw, device=key.device) for level in some]
            inputs = [
                Inputs(group_noise(batch.x0, level.sigma, key, seed=seed, draw=draw), level.timestep, batch.text)
                for level, draw in zip(some, draws, strict=True)
            ]
            predictions = predict_levels(forward, inputs, self.frozen_batch)
            for level, draw, read, predicted in zip(some, draws, inputs, predictions, strict=True):
                sigma = level.sigma.to(batch.x0.dtype).expand(len(key))
                yield Noised(batch, read, sigma, weight, key, seed, draw, predicted)

    def _predict(self, models: PolicyModels, x_t: Tensor, timestep: Tensor, text: TextEmbeds) -> dict[str, Tensor]:
        found = {}
        if self.ref and Guidance(self.guidance_scale).pairs:
            found["base_v"], negative_v = predict_pair(models.base, x_t, timestep, text)
            found["ref_v"] = guided(models.base, found["base_v"], negative_v, self.guidance_scale)
        elif self.ref:
            found["ref_v"] = predict(models.base, x_t, timestep, text)
        if self.old:
            found["old_v"] = predict(models.behaviour, x_t, timestep, text)
        return found


def sweep(
    noised: Noised, models: PolicyModels, scale: float, size: int, losses: Losses, hinge_weight: float
) -> dict[str, Tensor]:
    """Forward and backward of `noised` in micro-batches of `size`, with the norm hinge; see
    `DenoisingObjective.backward`."""
    totals: Metrics = {}
    for rows in batch_slices(len(noised), size):
        some = noised[rows]
        velocity, base_v = policy_v(models, some.inputs), some.base_v
        found = losses(velocity, some)
        if hinge_weight and base_v is not None:
            found["norm_hinge"] = norm_hinge(velocity, some.predicted["ref_v"])
            found["loss"] = found["loss"] + hinge_weight * found["norm_hinge"]
        summed = {name: (some.weight * value).sum() for name, value in found.items()}
        if base_v is not None:
            summed[DRIFT] = drift_sums(velocity, base_v, some.predicted["ref_v"], some.sigma, some.weight)
        (scale * summed["loss"]).backward()
        add_metrics(totals, summed, scale)
    return totals


def policy_v(models: PolicyModels, read: Inputs) -> Tensor:
    """The policy's velocity (B, C, H, W), in fp32 or wider."""
    with autocast(models):
        return wide(predict(models.policy, read.x_t, read.timestep, read.text))


def step_from(anchor: Tensor, k: float | Tensor, target_v: Tensor, from_v: Tensor) -> Tensor:
    """anchor + k·(v* − v_b), what a regression's policy is to predict; without a gradient.

    Args:
        anchor, target_v, from_v: (B, …) velocities; `from_v` is v_b.
        k: a number, or (B,).
    """
    if isinstance(k, Tensor):
        k = k.reshape(-1, *[1] * (anchor.dim() - 1))
    return (anchor + k * (target_v - from_v)).detach()


def mean_abs(difference: Tensor) -> Tensor:
    """(B,): the mean of each sample's absolute values; without a gradient."""
    return difference.detach().abs().flatten(1).mean(1)


def preference(advantage: Tensor, bound: float) -> Tensor:
    """Advantages in [−bound, bound] as a share in [0, 1], ½ for 0: r = A/(2·bound) + ½."""
    return (advantage / (2 * bound) + 0.5).clamp(0, 1)


def has_kl(kl: KLSettings) -> bool:
    """Whether a KL term has a weight above 0."""
    return max(kl.kl_weight, kl.kl_weight_worst or 0.0) > 0


def kl_weights(advantage: Tensor, bound: float, best: float, worst: float | None) -> float | Tensor:
    """Weight of each image's KL term: from `worst` for A = −bound to `best` for A = bound, or `best` for all."""
    return best if worst is None else worst + preference(advantage, bound) * (best - worst)
