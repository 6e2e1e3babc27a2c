"""Flow-GRPO (arXiv 2505.05470): a policy gradient over every step of a rollout with noise.

A step goes from x to x' with the density of a Gaussian around μ(x) = x + b·v + a·x (`rollout/schedule.py`). With ℓ the
logarithm of that density, the *mean* over the latent's elements, ρ = exp(ℓ_policy − ℓ_rollout) and s the diffusion
coefficient of the SDE, the loss is the mean over samples and steps of

    max(−A·ρ, −A·clamp(ρ, 1 − c, 1 + c)) + kl_weight · mean (μ_policy − μ_reference)² / (2·s²)

`flow_grpo.ratio` gives two other forms of ln ρ, from the step's own noise z and x' = μ_rollout + c·z: "squared" is
c²·mean z² − mean (x' − μ_policy)² (Flow-CPS), and "guard" is mean (z·(μ_policy − μ_rollout)), with the loss of a step
divided by σ − σ_next (GRPO-Guard).

Every step but the last is trained, or those that have noise (`rollout/noisy_steps.py`), or some of them, with the
rollout's guidance; whether its unconditional velocity has a gradient is a
setting (`flow_grpo.unconditional_gradient`). An iteration's groups are split over several optimizer steps: from the
second one on, the policy has moved away from the one that drew them, and the ratio is not 1.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from dgpo_kernels import philox_normal
from diffusers import ModelMixin
from torch import Tensor

from dgpo_fast.config.agreement import steps_with_noise
from dgpo_fast.config.options import Config
from dgpo_fast.models.family import Guidance
from dgpo_fast.models.forward import batch_slices, guided, predict, predict_pair
from dgpo_fast.models.policy import PolicyModels, Weights, autocast
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.objectives.batch import Batch, add_metrics
from dgpo_fast.objectives.drift import drift_terms, mean_square
from dgpo_fast.objectives.equal_groups import sort_groups, zero_gradients
from dgpo_fast.objectives.kl_term import weighed
from dgpo_fast.objectives.levels import Inputs, frozen_batch, predict_levels
from dgpo_fast.objectives.protocol import Objective, Traits
from dgpo_fast.rollout.noisy_steps import noisy_steps
from dgpo_fast.rollout.step_noise import gaussian_log_prob
from dgpo_fast.seeds import stream_seed


class FlowGRPOObjective(Objective):
    """Flow-GRPO; the module's docstring has the loss."""

    @classmethod
    def traits(cls, config: Config) -> Traits:
        """See `Objective.traits`."""
        needs_pairs, whole = Guidance(config.rollout.guidance_scale).pairs, config.flow_grpo.unconditional_gradient
        return Traits(
            needs_transitions=True,
            levels_at_once=_trained_count(config) if config.engine.batch_timesteps else 1,
            guided_base=needs_pairs,
            guided_policy=needs_pairs and whole,
            frozen_policy=needs_pairs and not whole,
            optimizer_steps=config.flow_grpo.optimizer_steps,
            drawn_by="policy",
            norm_hinge=True,
            kl_term=config.flow_grpo.kl_weight > 0,
            shardable=True,
        )

    def __init__(self, config: Config):
        self.config, self.needs = config.flow_grpo, self.traits(config)
        self.norm_hinge, self.kl_growth = config.regulariser.norm_hinge, config.regulariser.kl_growth
        self.needs_base = self.config.kl_weight > 0 or self.norm_hinge > 0
        self.rollout, self.seed = config.rollout, config.seed
        self.guidance_scale = config.rollout.guidance_scale
        self.skip_equal_groups = config.engine.skip_equal_groups
        self.micro_batch = config.policy.micro_batch_size
        self.frozen_batch = frozen_batch(config.rollout, pairs=self.needs.guided_base)

    def optimizer_batches(self, batch: Batch) -> Sequence[Batch]:
        """`flow_grpo.optimizer_steps` batches of whole groups."""
        return batch.split(self.config.optimizer_steps)

    def accumulate(self, batch: Batch, models: PolicyModels, old: Weights) -> dict[str, Tensor]:
        """See `Objective.accumulate`.

        Metrics are means over samples and steps. A sample of advantage 0, whose ratio has no gradient, counts in
        `ratio_deviation` as 0.
        """
        learnt = self._learnt_from(batch)
        if learnt is None:
            zero_gradients(models)
            return {name: batch.x0.new_zeros(()) for name in ("loss", "clipped_fraction", "ratio_deviation")}
        steps = self._trained_steps(learnt.iteration)
        weight = learnt.weight
        totals: dict[str, Tensor] = {}
        for step, constant in zip(steps, self._constants(learnt, models, steps), strict=True):
            for rows in batch_slices(len(learnt.x0), self.micro_batch):
                share = (rows.stop - rows.start) / (learnt.samples * len(steps))
                of_rows = {name: velocity[rows] for name, velocity in constant.items()}
                metrics = self._loss(learnt[rows], models, step, of_rows, weight[rows])
                (share * metrics["loss"]).backward()
                add_metrics(totals, metrics, share)
        return totals

    def _trained_steps(self, iteration: int) -> list[int]:
        """Those of an iteration, in order."""
        steps = noisy_steps(self.rollout, self.seed, iteration)
        if self.config.steps is None:
            return list(steps)
        rng = np.random.default_rng([stream_seed(self.seed, "trained steps"), iteration])
        return sorted(steps.start + int(step) for step in rng.choice(len(steps), self.config.steps, replace=False))

    def _learnt_from(self, batch: Batch) -> Batch | None:
        """The groups that can change the gradient; None if there are none. What holds the policy at the base needs
        all."""
        if len(batch.x0) == 0:
            return None
        if self.needs_base or not self.skip_equal_groups:
            return batch
        return sort_groups(batch).preferring

    def _loss(
        self, batch: Batch, models: PolicyModels, step: int, constant: Mapping[str, Tensor], weight: Tensor
    ) -> dict[str, Tensor]:
        """The loss of step `step`, a mean over `batch`, and what to log of it.

        `constant` is what `_constants` gave for `batch` and `step`. Rows of `weight` (B,) 0 have advantage 0, so that
        the KL term alone must be told of them.
        """
        assert batch.transitions is not None and batch.schedule.noise is not None
        velocity = self._policy_v(batch, models, step, constant.get("negative_v"))
        mean = transition_mean(batch, step, velocity)
        ratio, clip = torch.exp(self._log_ratio(batch, step, mean)), self.config.clip_range
        unclipped, clipped = -batch.advantage * ratio, -batch.advantage * ratio.clamp(1 - clip, 1 + clip)
        loss = torch.maximum(unclipped, clipped).mean()
        if self.config.ratio == "guard":
            loss = loss / (batch.schedule.sigmas[step] - batch.schedule.sigmas[step + 1])
        metrics = {
            "loss": loss,
            "clipped_fraction": (clipped > unclipped).float().mean(),
            "ratio_deviation": ((ratio - 1).abs() * (batch.advantage != 0)).mean(),
        }
        if "ref_v" in constant:
            ref_mean = transition_mean(batch, step, constant["ref_v"])
            kl = mean_square(mean - ref_mean) / (2 * diffusion(batch, step).square())
            held = weighed(kl, self.config.kl_weight, self.kl_growth, batch.kl_gate)
            sigma, hinge = batch.schedule.sigmas[step], self.norm_hinge > 0
            both = constant["ref_v"], constant["ref_v"]
            drift = drift_terms(velocity, *both, sigma, samples=len(weight), hinge=hinge, weight=weight)
            metrics |= {"loss": metrics["loss"] + (weight * held).mean(), "kl": (weight * kl).mean(), **drift}
            if hinge:
                metrics["loss"] = metrics["loss"] + self.norm_hinge * drift["norm_hinge"]
        return metrics

    def _log_ratio(self, batch: Batch, step: int, mean: Tensor) -> Tensor:
        """ln ρ of step `step`, (B,), by the policy's `mean` (B, C, H, W) of it."""
        assert batch.transitions is not None and batch.schedule.noise is not None
        after, std = batch.transitions.states[step + 1], batch.schedule.noise[step, 1]
        if self.config.ratio == "gaussian":
            return gaussian_log_prob((after - mean) / std, std) - batch.transitions.log_prob[step]
        seed, draw = stream_seed(self.seed, "step noise"), batch.iteration * batch.schedule.steps + step
        z = philox_normal(tuple(after.shape[1:]), batch.sample_index, seed=seed, draw=draw, dtype=after.dtype)
        if self.config.ratio == "guard":
            return (z * (mean - (after - std * z))).flatten(1).mean(1)
        return (std * z).square().flatten(1).mean(1) - (after - mean).square().flatten(1).mean(1)

    def _policy_v(self, batch: Batch, models: PolicyModels, step: int, negative_v: Tensor | None) -> Tensor:
        """With the rollout's guidance, (B, C, H, W); `negative_v` is its negative part, if that is a constant."""
        x, timestep = batch.transitions.states[step], batch.schedule.timesteps[step]  # type: ignore[union-attr]
        with autocast(models):
            if negative_v is None:
                return self._velocity(models.policy, x, timestep, batch.text)
            conditional = predict(models.policy, x, timestep, batch.text)
            return guided(models.policy, conditional, negative_v, self.guidance_scale)

    def _constants(self, batch: Batch, models: PolicyModels, steps: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        """Velocities that have no gradient at one of `steps` after another, (B, C, H, W) each, if they are needed.

        `ref_v` is the reference's for the KL term, with the rollout's guidance; `negative_v` the policy's for the
        negative prompt, if that has no gradient. The policy's weights are the same at all steps, so all of them are
        predicted together.
        """
        assert batch.transitions is not None
        if not self.needs_base and not self.needs.frozen_policy:
            yield from ({} for _ in steps)
            return
        states, timesteps, forward = batch.transitions.states, batch.schedule.timesteps, partial(self._predict, models)
        for some in batch_slices(len(steps), self.needs.levels_at_once):
            levels = [Inputs(states[step], timesteps[step], batch.text) for step in steps[some]]
            yield from predict_levels(forward, levels, self.frozen_batch)

    def _predict(self, models: PolicyModels, x: Tensor, timestep: Tensor, text: TextEmbeds) -> dict[str, Tensor]:
        found = {}
        if self.needs_base:
            found["ref_v"] = self._velocity(models.base, x, timestep, text)
        if self.needs.frozen_policy:
            with autocast(models):
                found["negative_v"] = predict(models.policy, x, timestep, text.negative())
        return found

    def _velocity(self, transformer: ModelMixin, x: Tensor, timestep: Tensor, text: TextEmbeds) -> Tensor:
        """With the rollout's guidance, (B, C, H, W)."""
        if not Guidance(self.guidance_scale).pairs:
            return predict(transformer, x, timestep, text)
        return guided(transformer, *predict_pair(transformer, x, timestep, text), self.guidance_scale)


def _trained_count(config: Config) -> int:
    """Steps of an iteration that are trained."""
    return config.flow_grpo.steps or steps_with_noise(config.rollout)


def transition_mean(batch: Batch, step: int, velocity: Tensor) -> Tensor:
    """μ of step `step` from its state and `velocity` (B, C, H, W); fp32."""
    assert batch.transitions is not None and batch.schedule.noise is not None
    x = batch.transitions.states[step]
    return x + batch.schedule.coefficients[step, 0] * velocity.float() + batch.schedule.noise[step, 0] * x


def diffusion(batch: Batch, step: int) -> Tensor:
    """s, the SDE's diffusion coefficient at step `step`: a step's standard deviation is s·√(σ − σ_next)."""
    assert batch.schedule.noise is not None
    return batch.schedule.noise[step, 1] / (batch.schedule.sigmas[step] - batch.schedule.sigmas[step + 1]).sqrt()
