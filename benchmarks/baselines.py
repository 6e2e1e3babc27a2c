"""How else one could train: the baselines of `throughput.py`, each written out plainly.

* **A**, reference-style: fp32 weights under bf16 autocast, LoRA as adapters in every forward, an fp32 decoder, θ_old in
  CPU memory and swapped in and out at each micro-batch and timestep, prompts encoded for each image.
* **B**, bf16 eager: all weights in bf16 on the device, θ_old a model of its own, an encoding for each prompt; trained
  weights have an fp32 master, and gradients add up in fp32.
* **C**: `torch.compile` on B's blocks and decoder, and nothing else.
* **C′**: C with merged copies. Rollouts and θ_old compute with copies of the weights in which the LoRA is merged, once
  an iteration, and the reference with weights that have none. The policy that learns keeps its adapters. If all weights
  are trained, nothing is merged: C′ is C.

All walk through the steps of diffusers' scheduler in Python, and predict with the reference and with θ_old one
micro-batch and timestep at a time. In an fp32 run A has no autocast and B's weights are fp32.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from benchmarks.rewards import Brightness
from dgpo_fast.config.options import Config
from dgpo_fast.models.family import family_of
from dgpo_fast.models.loading import reads_no_text
from dgpo_fast.models.policy import with_lora
from dgpo_fast.rollout.schedule import make_scheduler
from dgpo_fast.run.metrics import Phases


@dataclass(frozen=True)
class Text:
    """Encoded prompts: (B, T, D) tokens and (B, E) pooled."""

    prompt: Tensor
    pooled: Tensor

    def __getitem__(self, rows: slice) -> "Text":
        return Text(self.prompt[rows], self.pooled[rows])


@dataclass(frozen=True)
class Inputs:
    """What is random in one iteration.

    Attributes:
        prompts: B texts, those of a group together.
        noise: (B, C, H, W) fp32 at σ = 1.
        sigmas, timesteps: of the M training timesteps.
        training_noise: for each of them (B, C, H, W) fp32, equal within a group.
    """

    prompts: Sequence[str]
    noise: Tensor
    sigmas: Sequence[float]
    timesteps: Sequence[float]
    training_noise: Sequence[Tensor]


class Baseline(ABC):
    """One way to run an iteration; subclasses say in which precision, and where θ_old is.

    Args:
        pipeline: its text encoders are used as they are.
        base: the reference's weights by name.
        weights: those that training begins with, by name.
        config: the run's settings.
        dtype: the run's.

    Attributes:
        policy: what learns.
        vae: decodes.
        micro_batch: samples of a training forward and backward, whole groups.
    """

    policy: SD3Transformer2DModel
    vae: AutoencoderKL
    autocast_dtype: torch.dtype | None = None

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        base: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        config: Config,
        dtype: torch.dtype,
    ):
        self.pipeline, self.config, self.dtype = pipeline, config, dtype
        self.device = next(iter(base.values())).device
        group = config.rollout.group_size
        self.micro_batch = max(config.policy.micro_batch_size // group, 1) * group
        self.phases = Phases(self.device)
        self.make_models(base)
        self.weights = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(weights[name])
        self.make_optimizer()

    @property
    def drawing(self) -> SD3Transformer2DModel:
        """What draws the rollouts: the policy, or a copy that predicts as it does."""
        return self.policy

    @abstractmethod
    def make_models(self, base: Mapping[str, Tensor]) -> None:
        """Sets `policy`, its trained weights alone requiring a gradient, and `vae`."""

    @abstractmethod
    def make_optimizer(self) -> None:
        """Called once `weights` are there."""

    @abstractmethod
    def set_old(self, old: Mapping[str, Tensor]) -> None:
        """Overwrites θ_old."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Text:
        """B texts → B rows."""

    @abstractmethod
    def reference(self, x_t: Tensor, timestep: Tensor, text: Text, empty: Text) -> tuple[Tensor, Tensor]:
        """The reference's velocities: for the group score, and for the KL term."""

    @abstractmethod
    def old(self, x_t: Tensor, timestep: Tensor, text: Text) -> Tensor:
        """θ_old's velocity."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradient."""

    @abstractmethod
    def gradient(self) -> Mapping[str, Tensor]:
        """What has been added up."""

    @abstractmethod
    def clear_gradient(self) -> None:
        """Forgets it."""

    @abstractmethod
    def update(self) -> None:
        """Clips the gradient, takes the optimizer's step, forgets the gradient, and moves θ_old."""

    def iteration(self, inputs: Inputs, reward: Brightness) -> dict[str, float]:
        """Everything once; seconds by phase."""
        with self.phases("encode"):
            text, empty = self.encode(inputs.prompts), self.encode([""])
        with self.phases("rollout"):
            x0 = self.rollout(inputs.noise, text, empty)
        with self.phases("decode"):
            images = self.decode(x0)
        with self.phases("reward"):
            scores = torch.from_numpy(reward(images, inputs.prompts, [{}] * len(images)))
            groups = scores.reshape(-1, self.config.rollout.group_size)
            scaled = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, correction=0, keepdim=True) + 1e-4)
            advantage = scaled.flatten().float().to(self.device)
        with self.phases("train"):
            self.accumulate(x0, advantage, text, empty, inputs)
        with self.phases("optimizer"):
            self.update()
        return {name.removesuffix("_s"): seconds for name, seconds in self.phases.take().items()}

    def velocity(self, transformer: SD3Transformer2DModel, x_t: Tensor, timestep: Tensor, text: Text) -> Tensor:
        """(B, C, H, W), fp32 or more."""
        dtype, on = transformer.dtype, self.autocast_dtype is not None
        # Around each forward alone: autocast remembers the weights that it has cast, and those of A are swapped.
        with torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=on):
            v = transformer(
                hidden_states=x_t.to(dtype),
                timestep=timestep.expand(len(x_t)),
                encoder_hidden_states=text.prompt.to(dtype),
                pooled_projections=text.pooled.to(dtype),
                return_dict=False,
            )[0]
        return v.to(torch.promote_types(v.dtype, torch.float32))

    def velocity_pair(
        self, transformer: SD3Transformer2DModel, x_t: Tensor, timestep: Tensor, text: Text, empty: Text
    ) -> tuple[Tensor, Tensor]:
        """With the prompts, and with the empty one."""
        rows = len(x_t)
        both = Text(
            torch.cat([text.prompt, empty.prompt.expand(rows, -1, -1)]),
            torch.cat([text.pooled, empty.pooled.expand(rows, -1)]),
        )
        conditional, unconditional = self.velocity(transformer, torch.cat([x_t, x_t]), timestep, both).chunk(2)
        return conditional, unconditional

    @torch.no_grad()
    def rollout(self, noise: Tensor, text: Text, empty: Text) -> Tensor:
        """x0 (B, C, H, W) fp32 by the policy."""
        settings = self.config.rollout
        chunks = []
        for start in range(0, len(noise), settings.batch_size):
            rows = slice(start, start + settings.batch_size)
            scheduler = make_scheduler(settings.solver, settings.grid_shift)
            scheduler.set_timesteps(settings.num_inference_steps, device=self.device)
            x = noise[rows]
            for timestep in scheduler.timesteps:
                if settings.guidance_scale > 1:
                    conditional, unconditional = self.velocity_pair(self.drawing, x, timestep, text[rows], empty)
                    v = unconditional + settings.guidance_scale * (conditional - unconditional)
                else:
                    v = self.velocity(self.drawing, x, timestep, text[rows])
                x = scheduler.step(v, timestep, x, return_dict=False)[0]
            chunks.append(x)
        return torch.cat(chunks)

    @torch.no_grad()
    def decode(self, x0: Tensor) -> np.ndarray:
        """uint8 (B, height, width, 3)."""
        images = []
        for latents in x0.split(self.config.rollout.batch_size):
            scaled = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
            pixels = self.vae.decode(scaled.to(self.vae.dtype), return_dict=False)[0].float()
            images.append(((pixels * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
        return torch.cat(images).numpy()

    def accumulate(self, x0: Tensor, advantage: Tensor, text: Text, empty: Text, inputs: Inputs) -> None:
        """Adds the gradient of all micro-batches, which are whole groups, and timesteps."""
        size, count = self.micro_batch, len(inputs.sigmas)
        for slot in range(count):
            timestep = torch.tensor(inputs.timesteps[slot], device=self.device)
            for start in range(0, len(x0), size):
                rows = slice(start, start + size)
                noise = inputs.training_noise[slot][rows]
                x_t = (1 - inputs.sigmas[slot]) * x0[rows] + inputs.sigmas[slot] * noise
                with torch.no_grad():
                    ref_v, kl_v = self.reference(x_t, timestep, text[rows], empty)
                    clips = self.config.dgpo.clip_range is not None
                    old_v = self.old(x_t, timestep, text[rows]) if clips else None
                policy_v = self.velocity(self.policy, x_t, timestep, text[rows])
                loss = self.loss(policy_v, ref_v, kl_v, old_v, noise - x0[rows], advantage[rows])
                self.backward(loss * len(policy_v) / len(x0) / count)

    def loss(
        self, policy_v: Tensor, ref_v: Tensor, kl_v: Tensor, old_v: Tensor | None, target: Tensor, advantage: Tensor
    ) -> Tensor:
        """Of one micro-batch; its gradient is the published one."""
        settings, size = self.config.dgpo, self.config.rollout.group_size
        d_policy, d_ref = ((v - target).square().mean((1, 2, 3)) for v in (policy_v, ref_v))
        weighted = (advantage * (d_policy - d_ref)).detach().reshape(-1, size)
        weight = torch.sigmoid(settings.beta * weighted.mean(1)).repeat_interleave(size)
        if old_v is not None and settings.clip_range is not None:
            ratio = torch.exp((old_v - target).square().mean((1, 2, 3)) - d_policy)
            clipped = torch.where(advantage > 0, ratio > 1 + settings.clip_range, ratio < 1 - settings.clip_range)
            d_policy = torch.where(clipped, d_policy.detach(), d_policy)
        kl = (policy_v - kl_v).square().mean((1, 2, 3))
        return (weight * advantage * d_policy + settings.kl_weight * kl).mean()

    def _reference_by(
        self, transformer: SD3Transformer2DModel, x_t: Tensor, timestep: Tensor, text: Text, empty: Text
    ) -> tuple[Tensor, Tensor]:
        scale = self.config.dgpo.kl_guidance_scale
        if scale > 1:
            conditional, unconditional = self.velocity_pair(transformer, x_t, timestep, text, empty)
            guided = unconditional + scale * (conditional - unconditional)
            return guided if self.config.dgpo.guided_reference else conditional, guided
        ref_v = self.velocity(transformer, x_t, timestep, text)
        return ref_v, ref_v

    def _encode(self, prompts: Sequence[str]) -> Text:
        length = self.config.rollout.max_sequence_length
        if reads_no_text(self.pipeline):
            family, like = family_of(self.pipeline.transformer), next(self.pipeline.transformer.parameters())
            rows = family.stack([family.random_condition(prompt, length) for prompt in prompts], 0)
            return Text(**{name: row.to(like) for name, row in rows.items()})
        prompt, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), None, None, do_classifier_free_guidance=False, device=self.device, max_sequence_length=length
        )
        return Text(prompt, pooled)

    def _transformer(self, base: Mapping[str, Tensor], dtype: torch.dtype, own: bool) -> SD3Transformer2DModel:
        """The reference in `dtype`; with `own` memory, or in that of `base` where the dtype is its."""
        with torch.device("meta"):
            transformer = family_of(self.pipeline.transformer).build_transformer()
        transformer.load_state_dict({name: t.detach().to(dtype, copy=own) for name, t in base.items()}, assign=True)
        return transformer.requires_grad_(False).eval()

    def _trained(self, base: Mapping[str, Tensor], dtype: torch.dtype) -> SD3Transformer2DModel:
        if self.config.policy.train == "full":
            return self._transformer(base, dtype, own=True).requires_grad_(True)
        adapted = with_lora(self._transformer(base, dtype, own=False), self.config.policy, seed=0)
        for parameter in adapted.parameters():
            parameter.data = parameter.data.to(dtype)
        return adapted

    def _decay(self) -> float:
        return self.config.ema.old_decay_max

    def _adamw(self, weights: Sequence[Tensor], fused: bool) -> torch.optim.AdamW:
        settings = self.config.optimizer
        return torch.optim.AdamW(
            list(weights),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=fused,
        )


class ReferenceStyle(Baseline):
    """A. With `exact`, its arithmetic is all in that dtype: the oracle that gradients are compared with."""

    exact: torch.dtype | None = None

    def make_models(self, base: Mapping[str, Tensor]) -> None:
        dtype = self.exact or torch.float32
        self.autocast_dtype = torch.bfloat16 if self.dtype == torch.bfloat16 and self.exact is None else None
        self.policy = self._trained(base, dtype)
        self.full = self.config.policy.train == "full"
        self.ref = self._transformer(base, dtype, own=False) if self.full else self.policy
        self.vae = copy.deepcopy(self.pipeline.vae).float()

    def make_optimizer(self) -> None:
        self.optimizer = self._adamw(list(self.weights.values()), fused=False)
        self.set_old(self.weights)

    def set_old(self, old: Mapping[str, Tensor]) -> None:
        self.old_weights = {
            name: old[name].detach().to("cpu", weight.dtype, copy=True) for name, weight in self.weights.items()
        }

    def encode(self, prompts: Sequence[str]) -> Text:
        with torch.no_grad():
            return self._encode(prompts)

    def reference(self, x_t: Tensor, timestep: Tensor, text: Text, empty: Text) -> tuple[Tensor, Tensor]:
        if not self.full:
            self.policy.disable_adapters()
        try:
            return self._reference_by(self.ref, x_t, timestep, text, empty)
        finally:
            if not self.full:
                self.policy.enable_adapters()

    def old(self, x_t: Tensor, timestep: Tensor, text: Text) -> Tensor:
        kept = {name: weight.detach().cpu().clone() for name, weight in self.weights.items()}
        try:
            self._load(self.old_weights)
            return self.velocity(self.policy, x_t, timestep, text)
        finally:
            self._load(kept)

    @torch.no_grad()
    def _load(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(weights[name])

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def gradient(self) -> Mapping[str, Tensor]:
        return {name: weight.grad for name, weight in self.weights.items()}

    def clear_gradient(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), self.config.optimizer.max_grad_norm)
        self.optimizer.step()
        self.clear_gradient()
        for name, average in self.old_weights.items():
            average.lerp_(self.weights[name].detach().cpu(), 1 - self._decay())


class Oracle(ReferenceStyle):
    """A in fp64 for runs in fp32, and in fp32 for runs in bf16, with activations made again to save memory."""

    def make_models(self, base: Mapping[str, Tensor]) -> None:
        self.exact = torch.float32 if self.dtype == torch.bfloat16 else torch.float64
        super().make_models(base)
        self.policy.train().enable_gradient_checkpointing()
