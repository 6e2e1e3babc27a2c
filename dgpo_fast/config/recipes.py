"""Recipes: functions that return a `Config`; most derive from another one.

Learning rates of the small recipes with other objectives or data are those of an earlier search; docs/comparison.md
has the present one.

The `sd35m-*` recipes have the values of the DGPO release for Stable Diffusion 3.5-Medium at 512×512, and its gradient
(docs/method.md). If the release's README and its configuration disagree, they follow the configuration. Those for
Flow-GRPO have the values and the gradient of that method's release. No values were released for Diffusion-DPO; its
recipes share DGPO's. Their micro-batch is what fits the GPU, which changes a gradient by rounding alone. Recipes of the
other objectives are in objective_recipes.py, those on other families of models in family_recipes.py.
"""

import difflib
from collections.abc import Callable
from dataclasses import replace
from functools import partial, update_wrapper

from dgpo_fast.config import objective_recipes
from dgpo_fast.config.data_options import Data
from dgpo_fast.config.family_recipes import OF_SD35M_OCR
from dgpo_fast.config.objective_options import AWM, CRD, DGPO, NFT, RAM, Advantage, FlowGRPO
from dgpo_fast.config.options import EMA, Config, Engine, Evaluation, Optimizer, Policy, Rollout
from dgpo_fast.config.reading import YAML
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
            group_size=16, groups=16, num_inference_steps=8, guidance_scale=1.0, max_sequence_length=0, batch_size=128
        ),
        # The KL term's guided reference teaches the unguided policy what guidance knows, as in the cfg-free recipes.
        dgpo=DGPO(beta=30.0, kl_weight=0.1, kl_guidance_scale=3.0, clip_range=None, timesteps=4, high_noise_steps=7),
        policy=Policy(train="full", micro_batch=128),
        optimizer=Optimizer(lr=3e-4, lr_decay="linear"),
        ema=EMA(eval_decay_max=0.9, eval_every=1),
        evaluation=Evaluation(images=512, num_inference_steps=8, guidance_scale=1.0),
        # Compiled blocks round differently: the results in the documents must not depend on a machine's compiler.
        engine=Engine(compile="off"),
    )


def tiny_ocr() -> Config:
    """Words on signs, read by a real OCR engine."""
    base = tiny_shapes()
    # What guidance knows of letters is less than what the reward teaches: its pull costs more than it gives.
    dgpo = replace(base.dgpo, kl_guidance_scale=1.0, kl_weight=0.003)
    return replace(base, recipe="tiny-ocr", prompts="tiny-signs", rewards=("ocr",), dgpo=dgpo)


def tiny_shapes_offline() -> Config:
    """As tiny-shapes, on groups that the reference model drew once."""
    base = tiny_shapes()
    return replace(
        base,
        recipe="tiny-shapes-offline",
        data=Data(source="offline", offline_groups=512),
        optimizer=replace(base.optimizer, lr=2e-4),
    )


def tiny_shapes_sde() -> Config:
    """As tiny-shapes, with noise in the rollouts."""
    base = tiny_shapes()
    return replace(base, recipe="tiny-shapes-sde", rollout=replace(base.rollout, solver="euler", noise_level=0.7))


def tiny_shapes_no_timestep_clip() -> Config:
    """As tiny-shapes, trained on all noise levels."""
    base = tiny_shapes()
    return replace(base, recipe="tiny-shapes-no-timestep-clip", dgpo=replace(base.dgpo, high_noise_steps=None))


def tiny_shapes_diffusion_dpo() -> Config:
    """Coloured shapes with Diffusion-DPO: the best and the worst image of each group."""
    base = tiny_shapes()
    return replace(
        base,
        recipe="tiny-shapes-diffusion-dpo",
        objective="diffusion_dpo",
        diffusion_dpo=replace(base.diffusion_dpo, beta=base.dgpo.beta),
        optimizer=replace(base.optimizer, lr=8e-5),
    )


def tiny_shapes_diffusion_dpo_offline() -> Config:
    """As tiny-shapes-diffusion-dpo, on groups that the reference model drew once."""
    base = tiny_shapes_diffusion_dpo()
    return replace(
        base,
        recipe="tiny-shapes-diffusion-dpo-offline",
        data=tiny_shapes_offline().data,
        optimizer=replace(base.optimizer, lr=3e-5),
    )


def tiny_shapes_flow_grpo() -> Config:
    """Coloured shapes with Flow-GRPO: a policy gradient over rollouts with noise."""
    return replace(
        tiny_shapes_sde(),
        recipe="tiny-shapes-flow-grpo",
        objective="flow_grpo",
        optimizer=replace(tiny_shapes().optimizer, lr=1e-4),
        ema=replace(tiny_shapes().ema, switch_ema_ref=None),
    )


def tiny_shapes_flow_grpo_fast() -> Config:
    """Coloured shapes with Flow-GRPO on three steps with noise."""
    return objective_recipes.fast_flow_grpo(tiny_shapes_flow_grpo())


def tiny_shapes_nft() -> Config:
    """Coloured shapes with DiffusionNFT: towards good images and away from bad ones."""
    base = objective_recipes.small(tiny_shapes(), "nft", objective_recipes.nft_ema())
    return replace(base, nft=NFT(beta=1.0, timesteps=4))


def tiny_shapes_awm() -> Config:
    """Coloured shapes with AWM: flow matching weighted by the advantage."""
    base = objective_recipes.small(tiny_shapes(), "awm", objective_recipes.awm_ema())
    return replace(base, awm=AWM(timesteps=4), advantage=Advantage(scale=0.2))


def tiny_shapes_ram() -> Config:
    """Coloured shapes with RAM: from the base model's velocity towards good images."""
    base = objective_recipes.small(tiny_shapes(), "ram", objective_recipes.ram_ema())
    return replace(base, ram=RAM(multiplier=100.0, timesteps=4), advantage=Advantage(std="global", clamp=None))


def tiny_shapes_crd() -> Config:
    """Coloured shapes with CRD: implicit rewards equal the real ones within a group."""
    base = objective_recipes.small(tiny_shapes(), "crd", objective_recipes.crd_ema())
    return replace(base, crd=CRD(kl_guidance_scale=3.0, timesteps=4))


def sd35m_geneval() -> Config:
    """SD3.5-Medium on GenEval: objects, counts, colours, positions."""
    return Config(
        recipe="sd35m-geneval",
        model="stabilityai/stable-diffusion-3.5-medium",
        prompts="geneval",
        rewards=("geneval-hf",),
        iterations=1000,
        rollout=Rollout(group_size=16, groups=8, guidance_scale=4.5, shift=3.0, resolution=512),
        dgpo=DGPO(
            beta=100.0,
            kl_weight=0.02,
            guided_reference=True,
            clip_range=0.01,
            timesteps=4,
            high_noise_steps=5,
            training_sigma="timestep",
        ),
        policy=Policy(micro_batch="auto"),
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
    """SD3.5-Medium on human preference (PickScore).

    The papers train it on Pick-a-Pic's prompts, which are not shipped; GenEval's replace them (`prompts_note`).
    """
    base = sd35m_ocr()
    return replace(
        base,
        recipe="sd35m-pickscore",
        prompts="geneval",
        rewards=("pickscore",),
        rollout=replace(base.rollout, group_size=24),
        dgpo=replace(base.dgpo, beta=10.0, kl_weight=0.001, clip_range=0.05),
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


def _flow_grpo(base: Config, kl_weight: float) -> Config:
    """`base` trained with Flow-GRPO at its released values."""
    return replace(
        base,
        recipe=f"{base.recipe}-flow-grpo",
        objective="flow_grpo",
        rollout=replace(base.rollout, group_size=24, groups=48, solver="euler", noise_level=0.7),
        flow_grpo=FlowGRPO(clip_range=1e-4, kl_weight=kl_weight, unconditional_gradient=False, optimizer_steps=2),
        # The policy itself draws: its ratio is 1 until the second optimizer step.
        ema=replace(base.ema, switch_ema_ref=None),
    )


def _diffusion_dpo(base: Config) -> Config:
    """`base` trained with Diffusion-DPO."""
    return replace(
        base,
        recipe=f"{base.recipe}-diffusion-dpo",
        objective="diffusion_dpo",
        diffusion_dpo=replace(base.diffusion_dpo, beta=base.dgpo.beta),
    )


def sd35m_geneval_flow_grpo() -> Config:
    """SD3.5-Medium on GenEval with Flow-GRPO."""
    return _flow_grpo(sd35m_geneval(), kl_weight=0.04)


def sd35m_ocr_flow_grpo() -> Config:
    """SD3.5-Medium writing readable text with Flow-GRPO."""
    return _flow_grpo(sd35m_ocr(), kl_weight=0.04)


def sd35m_pickscore_flow_grpo() -> Config:
    """SD3.5-Medium on human preference with Flow-GRPO."""
    return _flow_grpo(sd35m_pickscore(), kl_weight=0.01)


def sd35m_geneval_diffusion_dpo() -> Config:
    """SD3.5-Medium on GenEval with Diffusion-DPO."""
    return _diffusion_dpo(sd35m_geneval())


def sd35m_ocr_diffusion_dpo() -> Config:
    """SD3.5-Medium writing readable text with Diffusion-DPO."""
    return _diffusion_dpo(sd35m_ocr())


def sd35m_pickscore_diffusion_dpo() -> Config:
    """SD3.5-Medium on human preference with Diffusion-DPO."""
    return _diffusion_dpo(sd35m_pickscore())


def sd35m_geneval_flow_grpo_fast() -> Config:
    """SD3.5-Medium on GenEval with Flow-GRPO on three steps with noise, without guidance."""
    return objective_recipes.sd35m_fast_flow_grpo(sd35m_geneval_flow_grpo())


def sd35m_geneval_nft() -> Config:
    """SD3.5-Medium on GenEval with DiffusionNFT."""
    return objective_recipes.sd35m_nft(sd35m_geneval(), beta=1.0)


def sd35m_ocr_nft() -> Config:
    """SD3.5-Medium writing readable text with DiffusionNFT."""
    return objective_recipes.sd35m_nft(sd35m_ocr(), beta=0.1, ocr=True)


def sd35m_pickscore_nft() -> Config:
    """SD3.5-Medium on human preference with DiffusionNFT."""
    return objective_recipes.sd35m_nft(sd35m_pickscore(), beta=1.0)


def sd35m_geneval_awm() -> Config:
    """SD3.5-Medium on GenEval with AWM."""
    return objective_recipes.sd35m_awm(sd35m_geneval(), kl_weight=0.001)


def sd35m_ocr_awm() -> Config:
    """SD3.5-Medium writing readable text with AWM."""
    return objective_recipes.sd35m_awm(sd35m_ocr(), kl_weight=0.003)


def sd35m_pickscore_awm() -> Config:
    """SD3.5-Medium on human preference with AWM."""
    return objective_recipes.sd35m_awm(sd35m_pickscore(), kl_weight=0.0001)


def sd35m_geneval_ram() -> Config:
    """SD3.5-Medium on GenEval with RAM."""
    return objective_recipes.sd35m_ram(sd35m_geneval(), multiplier=100.0)


def sd35m_ocr_ram() -> Config:
    """SD3.5-Medium writing readable text with RAM."""
    return objective_recipes.sd35m_ram(sd35m_ocr(), multiplier=100.0)


def sd35m_pickscore_ram() -> Config:
    """SD3.5-Medium on human preference with RAM."""
    return objective_recipes.sd35m_ram(sd35m_pickscore(), multiplier=1000.0)


def sd35m_ocr_crd() -> Config:
    """SD3.5-Medium writing readable text with CRD."""
    return objective_recipes.sd35m_crd(sd35m_ocr())


_FUNCTIONS: tuple[Callable[[], Config], ...] = (
    tiny_shapes,
    tiny_ocr,
    tiny_shapes_offline,
    tiny_shapes_sde,
    tiny_shapes_no_timestep_clip,
    tiny_shapes_diffusion_dpo,
    tiny_shapes_diffusion_dpo_offline,
    tiny_shapes_flow_grpo,
    tiny_shapes_flow_grpo_fast,
    tiny_shapes_nft,
    tiny_shapes_awm,
    tiny_shapes_ram,
    tiny_shapes_crd,
    sd35m_geneval,
    sd35m_ocr,
    sd35m_pickscore,
    sd35m_cfgfree,
    sd35m_cfgfree_ema,
    sd35m_geneval_flow_grpo,
    sd35m_ocr_flow_grpo,
    sd35m_pickscore_flow_grpo,
    sd35m_geneval_diffusion_dpo,
    sd35m_ocr_diffusion_dpo,
    sd35m_pickscore_diffusion_dpo,
    sd35m_geneval_flow_grpo_fast,
    sd35m_geneval_nft,
    sd35m_ocr_nft,
    sd35m_pickscore_nft,
    sd35m_geneval_awm,
    sd35m_ocr_awm,
    sd35m_pickscore_awm,
    sd35m_geneval_ram,
    sd35m_ocr_ram,
    sd35m_pickscore_ram,
    sd35m_ocr_crd,
)


def _on_families() -> dict[str, Callable[[], Config]]:
    return {name: update_wrapper(partial(_made_of_sd35m_ocr, make), make) for name, make in OF_SD35M_OCR.items()}


def _made_of_sd35m_ocr(make: Callable[[Config], Config]) -> Config:
    return make(sd35m_ocr())


RECIPES = {function.__name__.replace("_", "-"): function for function in _FUNCTIONS} | _on_families()
"""Recipes by name: `tiny-shapes-offline` is `tiny_shapes_offline`."""
LISTED = "`python -m dgpo_fast.recipes` lists the recipes"


def get_recipe(name: str, origin: str | None = None) -> Config:
    """The recipe called `name`. Raises UserError with the nearest name, and with the file `origin` that asks for it."""
    if name not in RECIPES:
        if name.endswith(YAML):
            raise UserError(
                f"{origin + ': ' if origin else ''}recipe '{name}': only a shipped recipe may stand there, such as "
                f"tiny-shapes; {LISTED}"
            )
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean '{close[0]}'?" if close else LISTED
        raise UserError(f"{origin + ': ' if origin else ''}unknown recipe '{name}': {hint}")
    return RECIPES[name]()


def prompts_note(config: Config) -> str:
    """A note on the recipe's prompts, in one line; empty if there is none."""
    if not config.recipe.startswith("sd35m-pickscore") or config.prompts != "geneval":
        return ""
    return (
        f"prompts: the papers train {config.recipe} on Pick-a-Pic, which is not shipped; GenEval's generated prompts "
        "replace it, so results do not compare with the papers'. If you have Pick-a-Pic's prompts, use "
        "--prompts pickapic.txt"
    )
