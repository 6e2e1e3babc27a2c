"""How far trained weights are from the base: what separates a system that learns faster from one that moves further."""

import torch
from dgpo_kernels import group_noise
from torch import Tensor

from dgpo_fast.models.forward import predict
from dgpo_fast.models.policy import Weights
from dgpo_fast.prompts import in_turn
from dgpo_fast.rollout.sampler import initial_noise, sample_latents
from dgpo_fast.seeds import stream_seed
from dgpo_fast.trainer import Trainer

SIGMAS = (0.9, 0.7, 0.5, 0.3, 0.1)


class DistanceFromBase:
    """mean (v − v_base)² over the base's own pictures of held-out prompts, at fixed noise levels and noise.

    Args:
        trainer: whose base and policy are compared.
        images: how many pictures, the tags of their prompts in turn.
    """

    @torch.no_grad()
    def __init__(self, trainer: Trainer, images: int):
        self.models, sampler = trainer.models, trainer.sampler
        number, seed = torch.arange(images, device=sampler.device), stream_seed(0, "distance")
        prompts = in_turn(trainer.prompts.held_out, lambda prompt: prompt.tag, images)
        self.text = sampler.encoder([prompt.text for prompt in prompts])
        self.text = self.text.with_embedded(trainer.eval_draw.guidance.embedded)
        noise = initial_noise(sampler.shape, number, seed=seed, draw=0)
        x0 = sample_latents(self.models.base, noise, self.text, trainer.eval_draw)
        sigmas = [torch.full((images,), sigma, device=sampler.device) for sigma in SIGMAS]
        self.inputs = [
            (group_noise(x0, sigma, number, seed=seed, draw=1 + level), 1000 * sigma)
            for level, sigma in enumerate(sigmas)
        ]
        self.base_v = self._velocities(self.models.base)

    @torch.no_grad()
    def of(self, weights: Weights) -> float:
        """That of `weights`; the behaviour copy is left with them."""
        self.models.load_behaviour(weights)
        return float((self._velocities(self.models.behaviour) - self.base_v).square().mean())

    def _velocities(self, transformer: torch.nn.Module) -> Tensor:
        """(levels, B, C, H, W) fp32."""
        return torch.stack([predict(transformer, x_t, timestep, self.text).float() for x_t, timestep in self.inputs])
