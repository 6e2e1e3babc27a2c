"""Settings of the objectives: from rewards to a gradient."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from dgpo_fast.config.bounds import STRICT, Count, Guidance, NonNegative, Positive


@dataclass(kw_only=True, config=STRICT)
class Advantage:
    """How rewards become advantages. The advantages of a group sum to zero."""

    std: Literal["group", "global"] = "group"
    """Standard deviation that rewards are divided by. group: that of the prompt's own group. global: that of all
    images of the iteration."""
    clamp: Positive = 5.0
    """Advantages are clamped to [−clamp, clamp]."""


@dataclass(kw_only=True, config=STRICT)
class DGPO:
    """The DGPO objective."""

    beta: Positive = 100.0
    """β, the strength of the preference. With a large β, groups that are already well separated add little to the
    gradient."""
    kl_weight: NonNegative = 0.02
    """Weight of the KL term: the mean squared distance between the velocities of the policy and the frozen base
    model."""
    kl_guidance_scale: Guidance = 1.0
    """Guidance scale of the base model in the KL term (`kl_cfg` in the released code). Above 1, guidance is
    distilled into the policy."""
    guided_reference: bool = False
    """If `kl_guidance_scale` is above 1, the base model's guided prediction is the reference in the group score too, as
    in the released code. False: the reference in the group score is its unguided prediction. No effect with
    `reference: ema`, since θ_old predicts without guidance."""
    clip_range: Positive | None = 0.01
    """PPO-style clip on exp(d_old − d_policy). None: no clip, and no forward pass of θ_old for it."""
    timesteps: Count = 4
    """M: training timesteps per iteration, drawn without replacement from the rollout's sigma grid."""
    high_noise_steps: Count | None = 5
    """Timestep clip: train only on the N noisiest steps of the rollout's sigma grid. None: train on all steps."""
    training_sigma: Literal["grid", "timestep"] = "grid"
    """Noise level σ of the training latents. grid: that of the rollout's sigma grid. timestep: timestep / 1000, as in
    the released code. They differ with the `dpmpp_2m` solver, whose timesteps are 1000·σ rounded down."""
    reference: Literal["frozen", "ema"] = "frozen"
    """Reference in the group score. frozen: the base model. ema: θ_old, the fast moving average of the policy."""


@dataclass(kw_only=True, config=STRICT)
class DiffusionDPO:
    """The Diffusion-DPO objective: the best and the worst image of each group form a pair."""

    beta: Positive = 100.0
    """β, the strength of the preference. With a large β, pairs that are already well separated add little to the
    gradient."""
    timesteps: Count = 4
    """Noise levels per pair and iteration, drawn from a logit-normal distribution."""
    logit_mean: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """Mean of logit(σ)."""
    logit_std: Positive = 1.0
    """Standard deviation of logit(σ)."""


@dataclass(kw_only=True, config=STRICT)
class FlowGRPO:
    """The Flow-GRPO objective: a policy gradient over the steps of a stochastic rollout (`rollout.noise_level` > 0)."""

    clip_range: Positive = 1e-4
    """PPO clip on the probability ratio of each step. Log-probabilities are means over the latent's elements, so
    ratios stay close to 1."""
    kl_weight: NonNegative = 0.04
    """Weight of the KL divergence between the policy's and the reference's steps."""
    unconditional_gradient: bool = True
    """If rollouts are guided, back-propagate through the policy's unconditional velocity too. False: treat it as a
    constant, as the released code does; its forward pass then needs no backward pass."""
    optimizer_steps: Count = 2
    """Optimizer steps per iteration. The iteration's groups are split evenly over them."""
