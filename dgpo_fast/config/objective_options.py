"""Settings of the objectives: from rewards to a gradient."""

from math import inf
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from dgpo_fast.config.bounds import STRICT, Count, Guidance, Names, NonNegative, Positive

Levels = Literal["grid", "strata", "uniform", "linear", "logit_normal"]
"""How noise levels to train at are drawn."""
Keys = Literal["sample", "group"]
"""What has a training noise of its own."""


def grid_steps(levels: Levels, steps: int) -> range | None:
    """Of a rollout's grid of `steps`, those that `levels` draws from; None if it draws from all σ in (0, 1)."""
    if levels == "grid":
        return range(max(steps - 1, 1))
    return range(1, max(9 * steps // 10, 2)) if levels == "strata" else None


@dataclass(kw_only=True, config=STRICT)
class Advantage:
    """How rewards become advantages. The advantages of a group sum to zero, unless some are clamped."""

    of: Literal["sum", "each"] = "sum"
    """sum: the weighted sum of the rewards becomes advantages. each: each reward does on its own, and the advantage is
    their weighted sum, so that no reward drowns another by its scale; a reward that is equal in a group adds 0 there
    (after GDPO). A group above `clamp` is then scaled down as a whole, and its advantages still sum to zero."""
    std: Literal["group", "global", "off"] = "group"
    """Standard deviation that rewards are divided by. group: that of the prompt's own group. global: that of all
    images of the iteration. off: rewards are not divided."""
    clamp: Positive | None = 5.0
    """Advantages are clamped to [−clamp, clamp]. None: they are not clamped."""
    scale: Positive = 1.0
    """Advantages are multiplied by this after they are clamped."""
    keep: Count | None = None
    """k: train on k images of each group, an even number. All images are drawn and scored, and advantages are those
    among all of them; the forward passes of the others are left out of training. None: train on all images."""
    keep_by: Literal["extremes", "draw"] = "extremes"
    """Which k images are kept. extremes: the k/2 best and the k/2 worst, with their advantages centred again. draw: k/2
    of the better ones and k/2 of the worse ones, drawn with a chance that grows as their advantage and weighted, so
    that the mean of the advantages times anything is right on average."""

    @property
    def bound(self) -> float:
        """The largest advantage."""
        return inf if self.clamp is None else self.clamp * self.scale


@dataclass(kw_only=True, config=STRICT)
class Regulariser:
    """What holds the policy back beside an objective's own terms. For any shipped objective."""

    norm_hinge: NonNegative = 0.0
    """Weight of max(0, ‖v‖/‖v_ref‖ − 1)², the mean over samples and noise levels: it keeps velocities from growing
    longer than the base model's, with the KL term's guidance. After NormGuard; its exact form is inferred
    (docs/reward_hacking.md)."""
    kl_growth: NonNegative = 0.0
    """Growth of the KL term's weight with the distance from what it holds the policy to: at a distance D, which is the
    KL term of an image at a noise level, the weight is kl_weight · (1 + kl_growth · D). With 20 it has doubled at
    D = 0.05. `kl` in the metrics shows usual distances. 0: the weight does not grow."""
    kl_gate: Names = ()
    """Rewards, of those in `rewards`, that are to agree with what is trained. An image's KL weight is kl_weight times
    the share of its group by which the advantage ranks it higher than these rewards do on average, and 0 if it does
    not. A reward of weight 0 is scored but not trained on: `--rewards ocr pickscore=0 --regulariser.kl-gate
    pickscore`. None: all images have the whole weight. After GARDO; its form is inferred (docs/reward_hacking.md)."""


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
    """Guidance scale g of the base model in the KL term (`kl_cfg` in the released code): v_neg + g·(v_cond − v_neg),
    also for a family whose own number begins at 0. Above 1, guidance is distilled into the policy."""
    guided_reference: bool = False
    """If `kl_guidance_scale` is above 1, the base model's guided prediction is the reference in the group score too, as
    in the released code. False: the reference in the group score is its unguided prediction. No effect with
    `reference: ema`, since θ_old predicts without guidance."""
    clip_range: Positive | None = 0.01
    """PPO-style clip on exp(d_old − d_policy). None: no clip, and no forward pass of θ_old for it."""
    timesteps: Count = 4
    """M: training timesteps per iteration, drawn without replacement from the rollout's sigma grid."""
    high_noise_steps: Count | None = 5
    """Timestep clip: train only on the N noisiest steps of the rollout's sigma grid. None: train on all steps. No
    effect with `lowest_sigma`."""
    lowest_sigma: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Train at noise levels that need not lie on the rollout's grid: σ in [lowest_sigma, 1], one from each of M equal
    parts, drawn for each group. 0: at all levels, without a timestep clip. None: at steps of the grid."""
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
    ratio: Literal["gaussian", "squared", "guard"] = "gaussian"
    """Logarithm of the probability ratio of a step. gaussian: of the step's Gaussian. squared: without the division by
    2·std², as Flow-CPS. guard: mean (z·Δμ) with the step's noise z, whose mean is 0 at the first update, and the loss
    of a step divided by its length, as GRPO-Guard. The clip range has another meaning with each."""
    steps: Count | None = None
    """Train on N of the steps with noise, drawn anew in each iteration. None: on all of them."""
    kl_weight: NonNegative = 0.04
    """Weight of the KL divergence between the policy's and the reference's steps."""
    unconditional_gradient: bool = True
    """If rollouts are guided, back-propagate through the policy's unconditional velocity too. False: treat it as a
    constant, as the released code does; its forward pass then needs no backward pass."""
    optimizer_steps: Count = 2
    """Optimizer steps per iteration. The iteration's groups are split evenly over them."""


@dataclass(kw_only=True, config=STRICT)
class NFT:
    """The DiffusionNFT objective: a regression away from θ_old, towards good images and away from bad ones. θ_old draws
    the rollouts (`ema.switch_ema_ref` 0)."""

    beta: Positive = 1.0
    """β: the velocity that is learned lies up to 1/β times as far from θ_old's as the image's own does."""
    adaptive_weight: bool = True
    """Divide each squared error by the mean absolute error of its prediction of x0, as the released code does."""
    adv_mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = "all"
    """What becomes of advantages. all: nothing. positive_only, negative_only: the others become 0. one_only: 1 if they
    are positive, else 0. binary: their sign."""
    kl_weight: NonNegative = 1e-4
    """Weight of the KL term: the mean squared distance between the velocities of the policy and the frozen base
    model."""
    kl_weight_worst: NonNegative | None = None
    """Weight of the KL term for the worst images. In between it grows with the advantage, up to `kl_weight` for the
    best. None: `kl_weight` for all."""
    levels: Levels = "grid"
    """Noise levels to train at. grid: steps of the rollout's sigma grid but the last one. strata: one step from each of
    M equal parts of the grid, without its first step and the last tenth. uniform: σ in [0.2, 1], one from each of M
    equal parts. linear: σ in [0, 1] with a density that grows as σ. logit_normal: logit-normal, one from each of M
    parts of equal weight, and shifted as the rollout's grid. The last three differ between images."""
    timesteps: Count | None = None
    """M: noise levels per image and iteration. None: all that `levels` grid or strata has."""
    noise: Keys = "sample"
    """Training noise. sample: each image has its own. group: the images of a group share it, as in DGPO."""
    optimizer_steps: Count = 1
    """Optimizer steps per iteration. The iteration's groups are split evenly over them."""


@dataclass(kw_only=True, config=STRICT)
class AWM:
    """The AWM objective: flow matching on the policy's own images, weighted by the advantage. The policy draws the
    rollouts (`ema.switch_ema_ref` none)."""

    weighting: Literal["uniform", "sigma", "sigma2", "huber", "ghuber"] = "ghuber"
    """What stands for the log-probability of an image with the denoising loss d. uniform: −d. sigma: −σ·d. sigma2:
    −σ²·d. huber: −σ·√d. ghuber: −σ·d^p / p."""
    ghuber_power: Annotated[float, Field(gt=0, le=1)] = 0.25
    """p of the `ghuber` weighting."""
    kl_weight: NonNegative = 0.001
    """Weight of the KL term: the mean squared distance between the velocities of the policy and the frozen base
    model."""
    kl_weight_worst: NonNegative | None = None
    """Weight of the KL term for the worst images. In between it grows with the advantage, up to `kl_weight` for the
    best. None: `kl_weight` for all."""
    ema_weight: NonNegative = 1.0
    """Weight of the mean squared distance between the velocities of the policy and θ_old."""
    clip_range: Positive | None = None
    """PPO clip on exp of the difference of log-probabilities between the policy and θ_old, which must then draw the
    rollouts (`ema.switch_ema_ref` 0). None: no clip."""
    ratio: Literal["level", "mean"] = "level"
    """What a clipped ratio is of. level: of an image at one noise level. mean: of an image, from the mean of its
    log-probabilities over the noise levels; needs a second pass over them. Without a clip, both are the same."""
    levels: Levels = "strata"
    """Noise levels to train at, as in `nft.levels`."""
    timesteps: Count = 6
    """M: noise levels per image and iteration."""
    noise: Keys = "sample"
    """Training noise. sample: each image has its own. group: the images of a group share it, as in DGPO."""


@dataclass(kw_only=True, config=STRICT)
class RAM:
    """The RAM objective: a regression from the base model's velocity towards good images, and away from bad ones."""

    multiplier: Positive = 100.0
    """m: how far the velocity is to move from the base model's, for an advantage of 1."""
    residual: Literal["old", "policy"] = "old"
    """Whose error the move is along. old: θ_old's, which must draw the rollouts (`ema.switch_ema_ref` 0). policy: the
    policy's own, without a gradient; needs no forward pass of θ_old."""
    levels: Levels = "linear"
    """Noise levels to train at, as in `nft.levels`."""
    timesteps: Count = 8
    """M: noise levels per image and iteration."""
    noise: Keys = "sample"
    """Training noise. sample: each image has its own. group: the images of a group share it, as in DGPO."""


@dataclass(kw_only=True, config=STRICT)
class CRD:
    """The CRD objective: the policy's implicit rewards, centred in each group, are to equal the real ones."""

    beta: Positive = 1.0
    """β: implicit rewards are to be 1/β times the real ones. The first gradient does not depend on it."""
    loss: Literal["mse", "bce"] = "mse"
    """Distance between implicit and real rewards: their mean squared difference, or the cross-entropy of their
    sigmoids."""
    temperature: NonNegative | None = None
    """Temperature T of a group's mean, by which rewards are centred. None: all images count alike. T: one mean in which
    the better images count more, by softmax (r/T), and one with softmax (−r/T), with half of the loss each. 0: the mean
    of the images with positive advantages, and of those with negative ones."""
    adaptive_weight: bool = True
    """Divide each denoising loss by the mean absolute error of its prediction."""
    kl_weight: NonNegative = 0.1
    """Weight of the KL term for the best images: the mean squared distance between the velocities of the policy and
    the frozen base model."""
    kl_weight_worst: NonNegative = 1e-4
    """Weight of the KL term for the worst images. In between it grows with the advantage."""
    kl_guidance_scale: Guidance = 4.5
    """Guidance scale of the base model in the KL term. Above 1, guidance is distilled into the policy."""
    levels: Levels = "grid"
    """Noise levels to train at, as in `nft.levels`."""
    timesteps: Count | None = None
    """M: noise levels per image and iteration. None: all that `levels` grid or strata has."""
    noise: Keys = "sample"
    """Training noise. sample: each image has its own. group: the images of a group share it, as in DGPO."""
    optimizer_steps: Count = 1
    """Optimizer steps per iteration. The iteration's groups are split evenly over them."""


@dataclass(kw_only=True, config=STRICT)
class KTO:
    """The KTO objective: single pictures that people like or dislike (`data.source` preferences)."""

    beta: Positive = 100.0
    """β, the strength of the preference. With a large β, pictures that are already well told apart from the others add
    little to the gradient."""
    disliked_weight: Positive = 1.0
    """Weight of a disliked picture's loss; a liked one has 1. If there are n times more dislikes than likes, 1/n."""
    levels: Levels = "uniform"
    """Noise levels to train at, as in `nft.levels`."""
    timesteps: Count = 4
    """M: noise levels per image and iteration."""
    noise: Keys = "sample"
    """Training noise. sample: each image has its own. group: as sample, since each image is alone."""
