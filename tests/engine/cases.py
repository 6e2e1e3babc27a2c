"""One pipeline's rollout and training step, with any of the engine's savings, in any dtype."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgpo_fast.config.objective_options import AWM, CRD, DGPO, NFT, RAM, DiffusionDPO, FlowGRPO
from dgpo_fast.config.options import EMA, Config, Engine, Policy, Rollout
from dgpo_fast.engine import Engine as RunEngine
from dgpo_fast.engine.checkpointing import checkpoint_blocks
from dgpo_fast.models.family import Guidance
from dgpo_fast.models.forward import batch_slices
from dgpo_fast.models.loading import load_pipeline
from dgpo_fast.models.policy import PolicyModels
from dgpo_fast.models.prompt_encoder import PromptEncoder
from dgpo_fast.models.quantised import SAME, quantise_blocks
from dgpo_fast.objectives.batch import Batch
from dgpo_fast.objectives.drift import as_numbers
from dgpo_fast.objectives.registry import load_objective
from dgpo_fast.rollout.draw import Draw
from dgpo_fast.rollout.sampler import Sampler
from dgpo_fast.rollout.schedule import make_schedule
from dgpo_fast.rollout.step_noise import StepNoise, Transitions, gaussian_log_prob, joined
from dgpo_fast.seeds import stream_seed

CPU = torch.device("cpu")
PROMPTS = ["a cat", "two birds", "a house"]
GROUPS, SIZE = 3, 4

OFF: dict[str, Any] = {
    "compile": "off",
    "cuda_graphs": "off",
    "attention": "native",
    "linear": "torch",
    "epilogue": "off",
    "decoder": "plain",
    "batch_timesteps": False,
    "share_first_level": "off",
    "skip_equal_groups": False,
    "checkpointing": "none",
}


def make_config(train: str = "lora", objective: str = "dgpo", **engine: Any) -> Config:
    """A run with a partial last batch everywhere and, of the engine's savings, those named.

    "flow_grpo, detached" is Flow-GRPO without the gradient of the unconditional velocity.
    """
    objective, _, detached = objective.partition(", ")
    noise: dict[str, Any] = {"solver": "euler", "noise_level": 0.7} if objective == "flow_grpo" else {}
    return Config(
        objective=objective,
        rollout=Rollout(
            group_size=SIZE,
            groups=GROUPS,
            num_inference_steps=4,
            max_sequence_length=9,
            batch_size=5,
            guidance_scale=3.0,
            shift=3.0,
            **noise,
        ),
        dgpo=DGPO(beta=100.0, clip_range=0.01, kl_weight=0.5, kl_guidance_scale=2.0, timesteps=2, high_noise_steps=3),
        diffusion_dpo=DiffusionDPO(beta=10.0, timesteps=3),
        flow_grpo=FlowGRPO(clip_range=0.05, kl_weight=0.0, unconditional_gradient=not detached, optimizer_steps=1),
        nft=NFT(kl_weight=0.1, timesteps=3),
        awm=AWM(kl_weight=0.0, ema_weight=0.0, timesteps=2),
        ram=RAM(multiplier=2.0, timesteps=3),
        crd=CRD(kl_guidance_scale=2.0, timesteps=3),
        ema=EMA(switch_ema_ref=0 if objective in ("nft", "ram") else None),
        policy=Policy(train=train, lora_rank=4, lora_alpha=8.0, micro_batch=8),  # type: ignore[arg-type]
        engine=Engine(**{**OFF, **engine}),
    )


class EngineCase:
    """A policy that has moved away from its base and from θ_old, readied by the engine, and scored groups.

    The second group's rewards are equal. Weights, latents and noise are the same for all settings and dtypes.

    Args:
        folder: of the pipeline; "tiny" is the shipped one.
        config: see `make_config`.
        dtype: of everything.
        device: of everything.
    """

    def __init__(
        self, folder: Path | str, config: Config, dtype: torch.dtype = torch.float32, device: torch.device = CPU
    ):
        if folder == "tiny":
            config = replace(config, rollout=replace(config.rollout, max_sequence_length=0))
        self.config, self.dtype, self.device = config, dtype, device
        self.pipeline = load_pipeline(str(folder), revision=None, device=device, dtype=dtype)
        if config.policy.base_precision != SAME:
            quantise_blocks(self.pipeline.transformer, config.policy.base_precision, device)
        self.models = PolicyModels(self.pipeline.transformer, config.policy, seed=0)
        if dtype == torch.float64:
            self.models.policy.double()
            for weight in self.models.weights.values():
                weight.grad_dtype = dtype
        if config.engine.checkpointing != "none":
            checkpoint_blocks(self.models.policy, config.engine.checkpointing)
        self.notes: list[str] = []
        self.encoder = PromptEncoder(self.pipeline, config.rollout.max_sequence_length)
        text_tokens = self.encoder.text_tokens()
        self.engine = RunEngine(config, self.models, self.pipeline, text_tokens, self.notes.append)
        rollout = config.rollout
        schedule = make_schedule(rollout.solver, 4, 3.0, rollout.noise_level).to(device)
        self.draw = Draw(schedule, Guidance(rollout.guidance_scale), rollout.batch_size)
        self.sampler = Sampler(
            self.pipeline,
            self.engine.rollout_transformer,
            self.encoder,
            resolution=rollout.resolution,
            solve=self.engine.solve,
            decode=self.engine.decoder.start,
        )
        self._move_weights()

    def _move_weights(self) -> None:
        generator = torch.Generator().manual_seed(1)
        base = {n: w.detach().float().cpu() for n, w in self.models.weights.items()}
        spread = {n: 0.05 * w.std() if self.config.policy.train == "full" else 0.05 for n, w in base.items()}
        self.old = {n: w + spread[n] * torch.randn(w.shape, generator=generator) for n, w in base.items()}
        self.new = {n: w + spread[n] * torch.randn(w.shape, generator=generator) for n, w in self.old.items()}
        self.models.load_weights(self.new)

    def rollout(self, prompts: list[str] | None = None, number: int = 0, keep: bool = False) -> Tensor:
        """x0 of seven samples drawn by the policy's weights: a whole batch of five and a partial one.

        A rollout with noise that is to `keep` its steps leaves them in `transitions`.
        """
        self.models.load_behaviour(self.new)
        prompts = prompts or PROMPTS
        text = self.encoder([prompts[n % len(prompts)] for n in range(7)])
        samples, x0 = torch.arange(7, device=self.device), []
        noises: list[StepNoise | None] = []
        for rows in batch_slices(7, self.draw.batch_size):
            is_noisy = self.draw.schedule.noise is not None
            noises.append(StepNoise(samples[rows] + 100 * number, seed=5, draw=number, keep=keep) if is_noisy else None)
            drawn = self.sampler.latents(
                text[rows], samples[rows], self.draw, seed=3, number=number, step_noise=noises[-1]
            )
            x0.append(drawn)
        self.transitions = joined(noises)
        return torch.cat(x0)

    def batch(self) -> Batch:
        """Three groups at one noise level or another, of which the second prefers nothing."""
        generator = torch.Generator().manual_seed(2)
        advantage = torch.randn(GROUPS, SIZE, generator=generator)
        advantage = advantage - advantage.mean(1, keepdim=True)
        advantage[1] = 0
        x0 = torch.randn(GROUPS * SIZE, *self.sampler.shape, generator=generator).to(self.device, self._state_dtype)
        return Batch(
            iteration=7,
            x0=x0,
            text=self.encoder(PROMPTS).repeat_interleave(SIZE),
            advantage=advantage.flatten().to(self.device),
            group_index=torch.arange(GROUPS, device=self.device).repeat_interleave(SIZE),
            sample_index=torch.arange(GROUPS * SIZE, device=self.device),
            group_size=SIZE,
            schedule=self.draw.schedule,
            transitions=self._transitions(x0) if self.draw.schedule.noise is not None else None,
        )

    def _transitions(self, x: Tensor) -> Transitions:
        """Steps from `x` by noise alone: as if a policy had drawn them whose velocity is 0."""
        assert self.draw.schedule.noise is not None
        generator, states, log_prob = torch.Generator().manual_seed(3), [x], []
        for gain, std in self.draw.schedule.noise:
            z = torch.randn(x.shape, generator=generator).to(x)
            states.append(states[-1] + gain * states[-1] + std * z)
            log_prob.append(gaussian_log_prob(z, std))
        return Transitions(torch.stack(states), torch.stack(log_prob))

    def gradient(self) -> tuple[Tensor, Tensor]:
        """The loss, and all of the policy's gradient as one vector; fp64."""
        for weight in self.models.weights.values():
            weight.grad = None
        metrics = load_objective(self.config).accumulate(self.batch(), self.models, self.old)
        self.metrics = as_numbers(metrics)
        gradient = torch.cat([weight.grad.flatten() for weight in self.models.weights.values()])  # type: ignore[union-attr]
        return metrics["loss"].double(), gradient.double()

    @property
    def _state_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def noise_seed(config: Config) -> int:
    """Of the training noise of a run with `config`."""
    return stream_seed(config.seed, "training noise")
