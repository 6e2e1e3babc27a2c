"""One iteration's groups and a trained policy, for tests of objectives."""

from dataclasses import replace
from pathlib import Path

import torch

from dgpo_fast.config.objective_options import DGPO
from dgpo_fast.config.options import Config, Policy, Rollout
from dgpo_fast.models.loading import load_pipeline
from dgpo_fast.models.policy import PolicyModels
from dgpo_fast.models.prompt_encoder import PromptEncoder
from dgpo_fast.objectives.batch import Batch
from dgpo_fast.objectives.drift import as_numbers
from dgpo_fast.objectives.registry import load_objective
from dgpo_fast.rollout.schedule import make_schedule

CPU = torch.device("cpu")
GROUPS, SIZE = 3, 4


def make_config(**dgpo: object) -> Config:
    """Settings of a run that could have made `Case`'s batch."""
    return Config(
        rollout=Rollout(group_size=SIZE, groups=GROUPS, num_inference_steps=6, max_sequence_length=9, batch_size=5),
        dgpo=DGPO(**{"timesteps": 3, "high_noise_steps": 4, **dgpo}),
        policy=Policy(lora_rank=4, lora_alpha=8.0, micro_batch=12),
    )


class Case:
    """A policy that has moved away from its base and from θ_old, with a batch of scored groups."""

    def __init__(self, folder: Path, config: Config):
        self.config = config
        pipeline = load_pipeline(str(folder), revision=None, device=CPU, dtype=torch.float32)
        self.models = PolicyModels(pipeline.transformer, config.policy, seed=0)
        generator = torch.manual_seed(1)
        old = {name: w + 0.05 * torch.randn(w.shape, generator=generator) for name, w in self.models.weights.items()}
        self.old = {name: w.detach() for name, w in old.items()}
        self.models.load_weights({n: w + 0.05 * torch.randn(w.shape, generator=generator) for n, w in self.old.items()})
        encoder = PromptEncoder(pipeline, config.rollout.max_sequence_length)
        advantage = torch.randn(GROUPS, SIZE, generator=generator)
        self.batch = Batch(
            iteration=7,
            x0=torch.randn(GROUPS * SIZE, 16, 8, 8, generator=generator),
            text=encoder(["a cat", "a dog", "a house"], ["", "a tree", "big"]).repeat_interleave(SIZE),
            advantage=(advantage - advantage.mean(1, keepdim=True)).flatten(),
            group_index=torch.arange(GROUPS).repeat_interleave(SIZE),
            sample_index=torch.arange(GROUPS * SIZE),
            group_size=SIZE,
            schedule=make_schedule("dpmpp_2m", 6, 3.0),
        )
        self.encoder = encoder

    def gradient(self, micro_batch: int) -> tuple[torch.Tensor, dict[str, float]]:
        """All of the policy's gradient as one vector, and the metrics as numbers that processes add up."""
        for weight in self.models.weights.values():
            weight.grad = None
        config = replace(self.config, policy=replace(self.config.policy, micro_batch=micro_batch))
        metrics = load_objective(config).accumulate(self.batch, self.models, self.old)
        return torch.cat([weight.grad.flatten() for weight in self.models.weights.values()]), as_numbers(metrics)
