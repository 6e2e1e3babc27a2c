"""What is compared: each system as the settings of a run, and how large the runs are."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from dgpo_fast.config import recipes
from dgpo_fast.config.objective_options import Advantage, grid_steps
from dgpo_fast.config.options import Config


@dataclass(frozen=True)
class System:
    """One system of the comparison.

    Attributes:
        name: as files and settings call it.
        label: as figures and tables call it.
        recipe: what its settings start from.
        lr: learning rate in the middle of its search.
        own: its own setting in the search, beside learning rate and groups.
    """

    name: str
    label: str
    recipe: Callable[[], Config]
    lr: float
    own: str = "dgpo.beta"

    @property
    def offline(self) -> bool:
        """Whether it trains on data drawn once."""
        return self.recipe().data.source == "offline"


def keeping(images: int, by: Literal["extremes", "draw"]) -> Config:
    """DGPO on `images` of each group of 16."""
    base = recipes.tiny_shapes()
    return replace(base, advantage=replace(base.advantage, keep=images, keep_by=by))


def at_levels_from(sigma: float) -> Config:
    """DGPO at noise levels in [`sigma`, 1] that do not lie on the rollout's grid."""
    base = recipes.tiny_shapes()
    return replace(base, dgpo=replace(base.dgpo, lowest_sigma=sigma))


SYSTEMS = {
    system.name: system
    for system in (
        System("dgpo", "DGPO", recipes.tiny_shapes, 2e-4),
        System("nft", "DiffusionNFT", recipes.tiny_shapes_nft, 2e-4, "nft.beta"),
        System("awm", "AWM", recipes.tiny_shapes_awm, 2e-4, "awm.ema_weight"),
        System("ram", "RAM", recipes.tiny_shapes_ram, 2e-4, "ram.multiplier"),
        System("crd", "CRD", recipes.tiny_shapes_crd, 2e-4, "crd.beta"),
        System("flow-grpo", "Flow-GRPO", recipes.tiny_shapes_flow_grpo, 1e-4, "flow_grpo.clip_range"),
        System(
            "flow-grpo-fast",
            "Flow-GRPO, window and CPS",
            recipes.tiny_shapes_flow_grpo_fast,
            1e-4,
            "flow_grpo.clip_range",
        ),
        System("dpo", "Diffusion-DPO", recipes.tiny_shapes_diffusion_dpo, 2e-4, "diffusion_dpo.beta"),
        System("dgpo-offline", "DGPO, offline", recipes.tiny_shapes_offline, 2e-4),
        System(
            "dpo-offline",
            "Diffusion-DPO, offline",
            recipes.tiny_shapes_diffusion_dpo_offline,
            2e-4,
            "diffusion_dpo.beta",
        ),
        System("dgpo-sde", "DGPO, SDE rollout", recipes.tiny_shapes_sde, 2e-4),
        System("dgpo-no-clip", "DGPO, no timestep clip", recipes.tiny_shapes_no_timestep_clip, 2e-4),
        System("dgpo-high-noise", "DGPO, σ in [0.5, 1]", partial(at_levels_from, 0.5), 2e-4),
        System("dgpo-all-noise", "DGPO, σ in [0, 1]", partial(at_levels_from, 0.0), 2e-4),
        System("dgpo-half", "DGPO, 8 extremes of 16", partial(keeping, 8, "extremes"), 2e-4),
        System("dgpo-quarter", "DGPO, 4 extremes of 16", partial(keeping, 4, "extremes"), 2e-4),
        System("dgpo-half-drawn", "DGPO, 8 drawn of 16", partial(keeping, 8, "draw"), 2e-4),
    )
}


@dataclass(frozen=True)
class Scale:
    """How large the runs are.

    Attributes:
        groups, group_size, steps: of the rollouts.
        offline_groups: drawn once for the offline systems.
        images: of an evaluation.
        diversity_prompts: held-out prompts whose groups of 8 images are compared with one another.
        signs: held-out signs that are read.
        distance_images: pictures at which the distance from the base is measured.
        evaluation_steps: solver steps of evaluations; None: as many as of the rollouts.
    """

    groups: int = 16
    group_size: int = 16
    steps: int = 8
    offline_groups: int = 320
    images: int = 512
    diversity_prompts: int = 32
    signs: int = 64
    distance_images: int = 64
    evaluation_steps: int | None = None


QUICK = Scale(
    groups=4, group_size=4, steps=4, offline_groups=8, images=24, diversity_prompts=3, signs=3, distance_images=4
)
NORMAL = Scale()
LONG = Scale(groups=24, group_size=16, offline_groups=1024, images=1536, diversity_prompts=96, signs=256)


def configuration(
    system: System,
    scale: Scale,
    *,
    lr: float,
    groups: int,
    seed: int,
    evaluation_seed: int,
    device: str,
    factor: float = 1.0,
) -> Config:
    """Settings of one run of `system`: its recipe, with everything that is not the system's own made the same for all.

    `factor` multiplies the system's own setting. Guidance is left out everywhere, in rollouts, evaluations and KL
    terms: what a guided reference teaches without any reward would hide what the systems learn from theirs.
    """
    config = with_factor(system.recipe(), system.own, factor)
    return replace(
        config,
        device=device,
        seed=seed,
        reward_workers=0,
        rollout=replace(
            config.rollout,
            groups=groups,
            group_size=scale.group_size,
            num_inference_steps=scale.steps,
            guidance_scale=1.0,
        ),
        advantage=_kept(config, scale),
        data=replace(config.data, offline_groups=scale.offline_groups),
        dgpo=replace(
            config.dgpo,
            kl_weight=0.02,
            kl_guidance_scale=1.0,
            timesteps=min(config.dgpo.timesteps, scale.steps - 1),
            high_noise_steps=None if config.dgpo.high_noise_steps is None else scale.steps - 1,
        ),
        nft=_on_grid(config.nft, scale.steps),
        awm=_on_grid(config.awm, scale.steps),
        crd=replace(_on_grid(config.crd, scale.steps), kl_guidance_scale=1.0),
        optimizer=replace(config.optimizer, lr=lr, lr_decay="none"),
        evaluation=replace(
            config.evaluation,
            images=scale.images,
            num_inference_steps=scale.evaluation_steps or scale.steps,
            guidance_scale=1.0,
            seed=evaluation_seed,
            every=0,
        ),
        checkpoint=replace(config.checkpoint, keep=1),
    )


def with_factor(config: Config, name: str, factor: float) -> Config:
    """`config` with its setting `name`, as "dgpo.beta", times `factor`."""
    group, field = name.split(".")
    settings = getattr(config, group)
    return replace(config, **{group: replace(settings, **{field: factor * getattr(settings, field)})})


def _kept(config: Config, scale: Scale) -> Advantage:
    """The same share of a group as the recipe keeps, and two images at least."""
    keep = config.advantage.keep
    if keep is None:
        return config.advantage
    return replace(config.advantage, keep=max(2, keep * scale.group_size // config.rollout.group_size))


def _on_grid(settings: Any, steps: int) -> Any:
    """An objective's settings with no more levels than a grid of `steps` has."""
    available = grid_steps(settings.levels, steps)
    if available is None or settings.timesteps is None:
        return settings
    return replace(settings, timesteps=min(settings.timesteps, len(available)))
