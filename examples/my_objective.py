"""Reward-weighted denoising: the images of a group as training data, weighted by softmax(advantage / temperature)."""

import torch
from dgpo_kernels import group_noise, philox_normal

from dgpo_fast.config import Config
from dgpo_fast.models.forward import batch_slices, predict
from dgpo_fast.models.policy import PolicyModels, Weights, autocast
from dgpo_fast.objectives import Batch, Objective, add_metrics
from dgpo_fast.objectives.levels import draw_training_steps
from dgpo_fast.seeds import stream_seed


class RewardWeighted(Objective):
    def __init__(self, config: Config, temperature: float = 1.0):
        self.seed, self.micro_batch, self.temperature = config.seed, config.policy.micro_batch_size, temperature
        self.noise_seed = stream_seed(config.seed, "training noise")

    def accumulate(self, batch: Batch, models: PolicyModels, old: Weights) -> dict[str, torch.Tensor]:
        [step] = draw_training_steps(batch.iteration, count=1, among=batch.schedule.steps, seed=self.seed)
        key = {"seed": self.noise_seed, "draw": batch.iteration}
        x_t = group_noise(batch.x0, batch.schedule.sigmas[step], batch.group_index, **key)
        target_v = philox_normal(batch.x0.shape[1:], batch.group_index, **key) - batch.x0
        advantage = batch.part.advantage.reshape(batch.groups, batch.group_size)  # of all processes
        weight = torch.softmax(advantage / self.temperature, dim=1).flatten() / batch.groups
        weight = weight[batch.part.first :][: len(x_t)].to(x_t)  # of this process's samples
        metrics: dict[str, torch.Tensor] = {}
        for rows in batch_slices(len(x_t), self.micro_batch):
            with autocast(models):
                policy_v = predict(models.policy, x_t[rows], batch.schedule.timesteps[step], batch.text[rows])
            error = (policy_v.float() - target_v[rows]).square().mean((1, 2, 3))
            loss = (weight[rows] * error).sum()
            loss.backward()
            add_metrics(metrics, {"loss": loss}, 1.0)
        return metrics
