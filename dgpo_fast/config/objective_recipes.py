"""Recipes of the objectives that regress velocities: a recipe of another objective with their settings put in.

Values that are said to be a release's were read in its code or are quoted from it. None has been measured here on
SD3.5-Medium.
"""

from dataclasses import replace

from dgpo_fast.config.objective_options import AWM, CRD, NFT, RAM, Advantage
from dgpo_fast.config.options import EMA, Config

UNBOUNDED_NORM = 1e6
"""`optimizer.max_grad_norm` of a release that does not clip gradients."""


def small(base: Config, objective: str, ema: EMA) -> Config:
    """The small recipe `base` with another objective: averages are the release's, the learning rate `base`'s own."""
    ema = replace(ema, eval_decay_max=base.ema.eval_decay_max, eval_every=base.ema.eval_every)
    return replace(base, recipe=f"{base.recipe}-{objective}", objective=objective, ema=ema)


def nft_ema(ocr: bool = False) -> EMA:
    """θ_old of DiffusionNFT, which draws all rollouts: the release's decay types 1 and, for OCR, 2."""
    if ocr:
        return EMA(old_decay_per_step=0.0075, old_decay_delay=75, old_decay_max=0.999, switch_ema_ref=0)
    return EMA(old_decay_per_step=0.001, old_decay_max=0.5, switch_ema_ref=0)


def awm_ema() -> EMA:
    """θ_old of AWM, to which the policy is held; the policy itself draws."""
    return EMA(old_decay_per_step=0.001, old_decay_max=0.3, switch_ema_ref=None, eval_decay_max=0.99)


def ram_ema() -> EMA:
    """θ_old of RAM, which draws all rollouts."""
    return EMA(old_decay_per_step=0.01, old_decay_max=0.9, switch_ema_ref=0)


def crd_ema() -> EMA:
    """θ_old of CRD, and the average that draws its rollouts."""
    return EMA(
        old_decay_start=0.25,
        old_decay_per_step=0.005,
        old_decay_max=0.999,
        switch_ema_ref=None,
        rollout_decay_per_step=0.0075,
        rollout_decay_delay=75,
    )


def _unguided(base: Config, groups: int, steps: int = 10) -> Config:
    """What the releases of DiffusionNFT, AWM and CRD share: 24 images a group, no guidance anywhere, LoRA of rank 32,
    and rewards divided by their standard deviation over the iteration."""
    return replace(
        base,
        rollout=replace(base.rollout, group_size=24, groups=groups, num_inference_steps=steps, guidance_scale=1.0),
        advantage=Advantage(std="global"),
        policy=replace(base.policy, lora_rank=32, lora_alpha=64.0, micro_batch=24),
        evaluation=replace(base.evaluation, solver="euler", num_inference_steps=40, guidance_scale=1.0),
    )


def fast_flow_grpo(base: Config) -> Config:
    """`base`, a recipe of Flow-GRPO, with noise in a window of three steps, Flow-CPS and no KL term.

    The values are those of `geneval_sd3_fast_nocfg` in flow_grpo's config/grpo.py; its windows begin at one of the
    first five steps of ten, here at one of all that leave the last step out.
    """
    return replace(
        base,
        recipe=f"{base.recipe}-fast",
        rollout=replace(base.rollout, noise_kind="cps", noise_level=0.8, noise_steps=3),
        flow_grpo=replace(base.flow_grpo, ratio="squared", clip_range=1e-5, kl_weight=0.0, optimizer_steps=2),
        advantage=Advantage(std="global"),
    )


def sd35m_fast_flow_grpo(base: Config) -> Config:
    """`fast_flow_grpo` with the release's windows, and without guidance."""
    fast = fast_flow_grpo(base)
    return replace(
        fast,
        rollout=replace(fast.rollout, guidance_scale=1.0, noise_among=7),
        evaluation=replace(base.evaluation, guidance_scale=1.0),
    )


def sd35m_nft(base: Config, beta: float, ocr: bool = False) -> Config:
    """`base` with DiffusionNFT at the values of its release (config/nft.py, scripts/train_nft_sd3.py).

    Not the release's: bf16 in place of fp16, and DPM-Solver++(2M) in place of its solver of second order.
    """
    return replace(
        _unguided(base, groups=48),
        recipe=f"{base.recipe}-nft",
        objective="nft",
        nft=NFT(beta=beta, kl_weight=1e-4, optimizer_steps=2 if ocr else 1),
        ema=nft_ema(ocr),
    )


def sd35m_awm(base: Config, kl_weight: float) -> Config:
    """`base` with AWM at the values of its release (scripts/train_sd3_awm.py).

    Not the release's: DPM-Solver++(2M) in place of SA-Solver; one draw of levels for all images of an iteration; the
    first two iterations are trained on. For PickScore, the release's levels also have the first step.
    """
    shared = _unguided(base, groups=72, steps=14)
    return replace(
        shared,
        recipe=f"{base.recipe}-awm",
        objective="awm",
        # Clamped to [−5, 5], then scaled to [−1, 1].
        advantage=replace(shared.advantage, clamp=5.0, scale=0.2),
        awm=AWM(kl_weight=kl_weight),
        ema=awm_ema(),
    )


def sd35m_ram(base: Config, multiplier: float) -> Config:
    """`base` with RAM: m, steps, levels, learning rate and averages as quoted from its release by ports.

    Inferred: 24 images in each of 48 groups, and `base`'s LoRA.
    """
    return replace(
        base,
        recipe=f"{base.recipe}-ram",
        objective="ram",
        rollout=replace(base.rollout, group_size=24, groups=48, solver="euler", num_inference_steps=20),
        advantage=Advantage(std="global", clamp=None),
        ram=RAM(multiplier=multiplier),
        policy=replace(base.policy, micro_batch=24),
        optimizer=replace(base.optimizer, max_grad_norm=UNBOUNDED_NORM),
        ema=ram_ema(),
    )


def sd35m_crd(base: Config) -> Config:
    """`base` with CRD at the values that its first author's port quotes from the paper's table for OCR.

    β is not given there; the first gradient does not depend on it.
    """
    return replace(
        _unguided(base, groups=48),
        recipe=f"{base.recipe}-crd",
        objective="crd",
        crd=CRD(optimizer_steps=2),
        ema=crd_ema(),
    )
