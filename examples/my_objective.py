"""Advantage-weighted regression: the images of a group as training data, each weighted by exp(advantage / temperature).

At one noise level an iteration, with x_t = (1 − σ)·x0 + σ·ε, the loss is the mean over samples of the weight times
|v(x_t) − (ε − x0)|².
"""

import torch
from dgpo_kernels import group_noise, philox_normal
from torch import Tensor

from dgpo_fast.config.options import Config
from dgpo_fast.models.forward import batch_slices, predict
from dgpo_fast.models.policy import PolicyModels, Weights, autocast
from dgpo_fast.objectives import Batch, Objective, add_metrics
from dgpo_fast.objectives.levels import draw_training_steps
from dgpo_fast.seeds import stream_seed


class RewardWeighted(Objective):
    """The objective of one run; see the module's text for the loss."""

    def __init__(self, config: Config, temperature: float = 1.0):
        self.seed, self.micro_batch, self.temperature = config.seed, config.policy.micro_batch_size, temperature
        self.noise_seed = stream_seed(config.seed, "training noise")

    def accumulate(self, batch: Batch, models: PolicyModels, old: Weights) -> dict[str, Tensor]:
        """See `Objective.accumulate`."""
        [step] = draw_training_steps(batch.iteration, count=1, among=batch.schedule.steps, seed=self.seed)
        sigma, timestep = batch.schedule.sigmas[step], batch.schedule.timesteps[step]
        x_t = group_noise(batch.x0, sigma, batch.group_index, seed=self.noise_seed, draw=batch.iteration)
        noise = philox_normal(batch.x0.shape[1:], batch.group_index, seed=self.noise_seed, draw=batch.iteration)
        target_v = noise - batch.x0
        weight = torch.exp(batch.advantage / self.temperature) / batch.samples  # of all processes
        metrics: dict[str, Tensor] = {}
        for rows in batch_slices(len(x_t), self.micro_batch):
            with autocast(models):
                policy_v = predict(models.policy, x_t[rows], timestep, batch.text[rows])
            error = (policy_v.float() - target_v[rows]).square().mean((1, 2, 3))
            loss = (weight[rows] * error).sum()
            loss.backward()
            add_metrics(metrics, {"loss": loss}, 1.0)
        return metrics
