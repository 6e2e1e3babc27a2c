"""Named starting points. Each is a function that returns a `Config`; most derive from another one.

The `sd35m-*` recipes carry the values of the DGPO release for Stable Diffusion 3.5-Medium at 512×512. Where the
release's README and its configuration disagree, the configuration counts.
"""

import difflib
from collections.abc import Callable
from dataclasses import replace

from dgpo_fast.config import DGPO, EMA, Advantage, Config, Evaluation, Optimizer, Policy, Rollout
from dgpo_fast.errors import UserError


def tiny_shapes() -> Config:
    """Coloured shapes; minutes on two CPU cores."""
    return Config(
        recipe="tiny-shapes",
        model="tiny",
        prompts="tiny-shapes",
        rewards=("shapes",),
        iterations=70,
        rollout=Rollout(
            group_size=16,
            groups=16,
            num_inference_steps=8,
            guidance_scale=1.0,
            max_sequence_length=0,
            batch_size=128,
        ),
        # The KL term's guided reference teaches the unguided policy what guidance knows, as in the cfg-free recipes.
        dgpo=DGPO(beta=30.0, kl_weight=0.1, kl_guidance_scale=3.0, clip_range=None, timesteps=4, high_noise_steps=7),
        policy=Policy(train="full", micro_batch=128),
        optimizer=Optimizer(lr=2e-4),
        ema=EMA(eval_decay_max=0.9, eval_every=1),
        evaluation=Evaluation(images=512, num_inference_steps=8, guidance_scale=1.0),
    )


def tiny_ocr() -> Config:
    """Words on signs, read by a real OCR engine."""
    return replace(tiny_shapes(), recipe="tiny-ocr", prompts="tiny-signs", rewards=("ocr",))


def sd35m_geneval() -> Config:
    """SD3.5-Medium on GenEval: objects, counts, colours, positions."""
    return Config(
        recipe="sd35m-geneval",
        model="stabilityai/stable-diffusion-3.5-medium",
        prompts="geneval",
        rewards=("geneval-hf",),
        iterations=1000,
        rollout=Rollout(group_size=16, groups=8, guidance_scale=4.5, shift=3.0, resolution=512),
        dgpo=DGPO(beta=100.0, kl_weight=0.02, clip_range=0.01, timesteps=4, high_noise_steps=5),
        evaluation=Evaluation(images=512, num_inference_steps=14, guidance_scale=4.5),
    )


def sd35m_ocr() -> Config:
    """SD3.5-Medium writing readable text."""
    base = sd35m_geneval()
    return replace(
        base,
        recipe="sd35m-ocr",
        prompts="signs",
        rewards=("ocr",),
        advantage=Advantage(std="global"),
        dgpo=replace(base.dgpo, high_noise_steps=7),
        ema=replace(base.ema, switch_ema_ref=200),
    )


def sd35m_pickscore() -> Config:
    """SD3.5-Medium on human preference (PickScore)."""
    base = sd35m_ocr()
    return replace(
        base,
        recipe="sd35m-pickscore",
        prompts="geneval",
        rewards=("pickscore",),
        rollout=replace(base.rollout, group_size=24),
        dgpo=replace(base.dgpo, beta=10.0, kl_weight=0.001, clip_range=0.05),
        policy=replace(base.policy, micro_batch=24),
    )


def sd35m_cfgfree() -> Config:
    """SD3.5-Medium trained to need no guidance."""
    base = sd35m_geneval()
    return replace(
        base,
        recipe="sd35m-cfgfree",
        rollout=replace(base.rollout, guidance_scale=1.0),
        dgpo=replace(base.dgpo, kl_guidance_scale=4.5),
        evaluation=replace(base.evaluation, num_inference_steps=10, guidance_scale=1.0),
    )


def sd35m_cfgfree_ema() -> Config:
    """As sd35m-cfgfree, with θ_old as the reference."""
    base = sd35m_cfgfree()
    return replace(
        base,
        recipe="sd35m-cfgfree-ema",
        dgpo=replace(base.dgpo, beta=2000.0, kl_weight=0.001, kl_guidance_scale=1.0, reference="ema"),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    "tiny-shapes": tiny_shapes,
    "tiny-ocr": tiny_ocr,
    "sd35m-geneval": sd35m_geneval,
    "sd35m-ocr": sd35m_ocr,
    "sd35m-pickscore": sd35m_pickscore,
    "sd35m-cfgfree": sd35m_cfgfree,
    "sd35m-cfgfree-ema": sd35m_cfgfree_ema,
}


def get_recipe(name: str) -> Config:
    """The recipe called `name`. Raises UserError with the nearest name."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"the recipes are {', '.join(RECIPES)}"
        raise UserError(f"unknown recipe '{name}': {hint}")
    return RECIPES[name]()


def markdown_table() -> str:
    """The recipes side by side, as the README shows them: `python -m dgpo_fast.recipes`."""
    columns = [
        "recipe",
        "rewards",
        "P × G",
        "steps, guidance",
        "trained on",
        "β",
        "KL weight, guidance",
        "clip",
        "std",
        "lr",
    ]
    rows = [columns, ["---"] * len(columns)]
    for name, recipe in RECIPES.items():
        c = recipe()
        first = f"{c.dgpo.timesteps} of the first {c.dgpo.high_noise_steps or c.rollout.num_inference_steps}"
        rows.append([
            f"`{name}`",
            ", ".join(f"`{reward}`" for reward in c.rewards),
            f"{c.rollout.groups} × {c.rollout.group_size}",
            f"{c.rollout.num_inference_steps}, {c.rollout.guidance_scale:g}",
            f"{first} steps, {c.policy.train}" + (f" r{c.policy.lora_rank}" if c.policy.train == "lora" else ""),
            f"{c.dgpo.beta:g}" + (", EMA reference" if c.dgpo.reference == "ema" else ""),
            f"{c.dgpo.kl_weight:g}, {c.dgpo.kl_guidance_scale:g}",
            "off" if c.dgpo.clip_range is None else f"{c.dgpo.clip_range:g}",
            c.advantage.std,
            f"{c.optimizer.lr:g}",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(markdown_table())
