"""What is compared: each system as the settings of a run, and how large the runs are."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from dgpo_fast.config import recipes
from dgpo_fast.config.options import Config


@dataclass(frozen=True)
class System:
    """One system of the comparison.

    Attributes:
        name: as files and settings call it.
        label: as figures and tables call it.
        recipe: what its settings start from.
        lr: learning rate in the middle of its search.
        patience: how many times as long as the others' its runs are, where it takes long to show what it can reach.
    """

    name: str
    label: str
    recipe: Callable[[], Config]
    lr: float
    patience: float = 1.0

    @property
    def offline(self) -> bool:
        """Whether it trains on data drawn once."""
        return self.recipe().data.source == "offline"


SYSTEMS = {
    system.name: system
    for system in (
        System("dgpo", "DGPO", recipes.tiny_shapes, 2e-4),
        System("dgpo-offline", "DGPO, offline", recipes.tiny_shapes_offline, 2e-4),
        System("dpo", "Diffusion-DPO", recipes.tiny_shapes_diffusion_dpo, 2e-4),
        System("dpo-offline", "Diffusion-DPO, offline", recipes.tiny_shapes_diffusion_dpo_offline, 2e-4),
        System("flow-grpo", "Flow-GRPO", recipes.tiny_shapes_flow_grpo, 1e-4, patience=3.0),
        System("dgpo-sde", "DGPO, SDE rollout", recipes.tiny_shapes_sde, 2e-4),
        System("dgpo-no-clip", "DGPO, no timestep clip", recipes.tiny_shapes_no_timestep_clip, 2e-4),
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
    """

    groups: int = 16
    group_size: int = 16
    steps: int = 8
    offline_groups: int = 320
    images: int = 512
    diversity_prompts: int = 32
    signs: int = 64


QUICK = Scale(groups=4, group_size=4, steps=4, offline_groups=8, images=24, diversity_prompts=3, signs=3)
NORMAL = Scale()
LONG = Scale(groups=24, group_size=16, offline_groups=1024, images=1536, diversity_prompts=96, signs=256)


def configuration(
    system: System, scale: Scale, *, lr: float, groups: int, seed: int, evaluation_seed: int, device: str
) -> Config:
    """Settings of one run of `system`: its recipe, with everything that is not the system's own made the same for all.

    Guidance is left out everywhere, in rollouts, evaluations and the KL term: what a guided reference teaches without
    any reward would hide what the systems learn from theirs.
    """
    config = system.recipe()
    offline_groups = scale.offline_groups
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
        data=replace(config.data, offline_groups=offline_groups),
        dgpo=replace(
            config.dgpo,
            kl_weight=0.02,
            kl_guidance_scale=1.0,
            timesteps=min(config.dgpo.timesteps, scale.steps - 1),
            high_noise_steps=None if config.dgpo.high_noise_steps is None else scale.steps - 1,
        ),
        optimizer=replace(config.optimizer, lr=lr, lr_decay="none"),
        evaluation=replace(
            config.evaluation,
            images=scale.images,
            num_inference_steps=scale.steps,
            guidance_scale=1.0,
            seed=evaluation_seed,
            every=0,
        ),
        checkpoint=replace(config.checkpoint, keep=1),
    )
