"""Recipes of the families beside Stable Diffusion 3: a recipe of SD3.5-Medium on another model.

Rewards, prompts and the values of DGPO are those of that recipe. How images are drawn is what Flow-Factory trains the
same model with in its examples (commit a0b2bc5), if it has one, else what the model's own pipeline does by default. No
value of DGPO was published for these models, and none of these recipes has been measured.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from dgpo_fast.config.options import Config


def of_family(
    base: Config,
    recipe: str,
    model: str,
    *,
    guidance_scale: float,
    resolution: int = 512,
    steps: int = 10,
    shown_steps: int = 28,
    solver: Literal["dpmpp_2m", "euler"] = "euler",
    max_sequence_length: int = 512,
) -> Config:
    """`base` on another model, whose own scheduler gives the grid.

    Args:
        base: of SD3.5-Medium.
        recipe: its name.
        model: on the hub.
        guidance_scale: the family's own number, in rollouts and in evaluations.
        resolution: of images to learn from, in pixels.
        steps: of a rollout.
        shown_steps: of an evaluation.
        solver: of both.
        max_sequence_length: of prompts, in tokens.
    """
    return replace(
        base,
        recipe=recipe,
        model=model,
        rollout=replace(
            base.rollout,
            guidance_scale=guidance_scale,
            resolution=resolution,
            num_inference_steps=steps,
            solver=solver,
            shift=None,
            max_sequence_length=max_sequence_length,
        ),
        # With Euler's grid, the timestep and σ agree.
        dgpo=replace(base.dgpo, training_sigma="timestep" if solver == "dpmpp_2m" else "grid"),
        policy=replace(base.policy, micro_batch="auto"),
        evaluation=replace(
            base.evaluation, guidance_scale=guidance_scale, num_inference_steps=shown_steps, solver=solver
        ),
    )


def flux1_dev(base: Config) -> Config:
    """FLUX.1-dev: 512 × 512, 10 steps, embedded guidance of 3.5, as in Flow-Factory."""
    return of_family(base, "flux1-dev-ocr", "black-forest-labs/FLUX.1-dev", guidance_scale=3.5)


def flux2_klein_base_4b(base: Config) -> Config:
    """FLUX.2-klein-base-4B: 384 × 384, 8 steps, guidance 4, as in Flow-Factory."""
    return of_family(
        base,
        "flux2-klein-base-4b-ocr",
        "black-forest-labs/FLUX.2-klein-base-4B",
        guidance_scale=4.0,
        resolution=384,
        steps=8,
    )


def flux2_dev(base: Config) -> Config:
    """FLUX.2-dev: 384 × 384, 10 steps, embedded guidance of 4, as in Flow-Factory."""
    return of_family(base, "flux2-dev-ocr", "black-forest-labs/FLUX.2-dev", guidance_scale=4.0, resolution=384)


def qwen_image(base: Config) -> Config:
    """Qwen-Image: 512 × 512, 10 steps, guidance 4, as in Flow-Factory."""
    return of_family(base, "qwen-image-ocr", "Qwen/Qwen-Image", guidance_scale=4.0)


def z_image(base: Config) -> Config:
    """Z-Image, the base model: 512 × 512, 10 steps, guidance 4, as in Flow-Factory."""
    return of_family(base, "z-image-ocr", "Tongyi-MAI/Z-Image", guidance_scale=4.0)


def sana_1600m(base: Config) -> Config:
    """SANA 1.6B at 512 × 512: guidance 4.5, DPM-Solver++, and 20 steps in evaluations, as its own pipeline."""
    return of_family(
        base,
        "sana-1600m-ocr",
        "Efficient-Large-Model/Sana_1600M_512px_diffusers",
        guidance_scale=4.5,
        shown_steps=20,
        solver="dpmpp_2m",
        max_sequence_length=300,
    )


def chroma1_hd(base: Config) -> Config:
    """Chroma1-HD: guidance 5, and 35 steps in evaluations, as its own pipeline."""
    return of_family(base, "chroma1-hd-ocr", "lodestones/Chroma1-HD", guidance_scale=5.0, shown_steps=35)


def lumina2(base: Config) -> Config:
    """Lumina-Image-2.0: guidance 4, 256 tokens, and 30 steps in evaluations, as its own pipeline."""
    return of_family(
        base, "lumina2-ocr", "Alpha-VLLM/Lumina-Image-2.0", guidance_scale=4.0, shown_steps=30, max_sequence_length=256
    )


def auraflow(base: Config) -> Config:
    """AuraFlow-v0.3: guidance 3.5, 256 tokens, and 50 steps in evaluations, as its own pipeline."""
    return of_family(
        base, "auraflow-ocr", "fal/AuraFlow-v0.3", guidance_scale=3.5, shown_steps=50, max_sequence_length=256
    )


def cogview4_6b(base: Config) -> Config:
    """CogView4-6B: guidance 5, and 50 steps in evaluations, as its own pipeline. It cuts prompts at 1,024 tokens; here
    at 256, which is more than these prompts have."""
    return of_family(
        base, "cogview4-6b-ocr", "THUDM/CogView4-6B", guidance_scale=5.0, shown_steps=50, max_sequence_length=256
    )


OF_SD35M_OCR: dict[str, Callable[[Config], Config]] = {
    "flux1-dev-ocr": flux1_dev,
    "flux2-klein-base-4b-ocr": flux2_klein_base_4b,
    "flux2-dev-ocr": flux2_dev,
    "qwen-image-ocr": qwen_image,
    "z-image-ocr": z_image,
    "sana-1600m-ocr": sana_1600m,
    "chroma1-hd-ocr": chroma1_hd,
    "lumina2-ocr": lumina2,
    "auraflow-ocr": auraflow,
    "cogview4-6b-ocr": cogview4_6b,
}
"""By the recipe's name: made of `sd35m-ocr`."""
