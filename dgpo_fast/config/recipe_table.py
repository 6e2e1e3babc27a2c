"""The tables of recipes in the documents."""

from collections.abc import Iterable, Sequence

from dgpo_fast.config.objective_options import AWM, CRD, KTO, NFT, RAM
from dgpo_fast.config.options import Config
from dgpo_fast.config.recipes import RECIPES, prompts_note

MOST_USED = (
    "tiny-shapes",
    "tiny-ocr",
    "tiny-shapes-offline",
    "tiny-shapes-diffusion-dpo",
    "tiny-shapes-flow-grpo",
    "sd35m-geneval",
    "sd35m-ocr",
    "sd35m-pickscore",
    "sd35m-cfgfree",
    "sd35m-cfgfree-ema",
)
SHORT = ("recipe", "objective", "prompts", "rewards", "P × G", "rollout steps, guidance", "training timesteps, weights")


def markdown_table(names: Iterable[str] = RECIPES, columns: Sequence[str] | None = None) -> str:
    """Recipes side by side, as docs/recipes.md shows them: `python -m dgpo_fast.recipes`.

    Args:
        names: of the recipes, one a row.
        columns: some of them, by their titles; all by default.
    """
    rows = [_cells(name, RECIPES[name]()) for name in names]
    columns = columns or list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def short_table() -> str:
    """The recipes that are used most, as the README shows them."""
    return markdown_table(MOST_USED, SHORT)


def _cells(name: str, config: Config) -> dict[str, str]:
    """A recipe's row by the titles of its columns."""
    rollout, policy = config.rollout, config.policy
    timesteps, beta, kl, clip = _objective_cells(config)
    rank = f" r{policy.lora_rank}" if policy.train == "lora" else ""
    noise = f", noise {rollout.noise_level:g}" if rollout.noise_level else ""
    return {
        "recipe": f"`{name}`",
        "objective": f"`{config.objective}`" + (", offline" if config.data.source == "offline" else ""),
        "prompts": f"`{config.prompts}`" + (" in place of Pick-a-Pic" if prompts_note(config) else ""),
        "rewards": ", ".join(f"`{reward}`" for reward in config.rewards),
        "P × G": f"{rollout.groups} × {rollout.group_size}",
        "rollout steps, guidance": f"{rollout.num_inference_steps}, {rollout.guidance_scale:g}{noise}",
        "training timesteps, weights": f"{timesteps}, {policy.train}" + rank,
        "β": beta,
        "KL weight, guidance": kl,
        "clip": clip,
        "std": config.advantage.std,
        "lr": f"{config.optimizer.lr:g}",
    }


def _objective_cells(config: Config) -> tuple[str, str, str, str]:
    """Training timesteps, β, KL weight and guidance, clip."""
    rows = {
        "diffusion_dpo": _dpo_cells,
        "flow_grpo": _grpo_cells,
        "nft": _nft_cells,
        "awm": _awm_cells,
        "ram": _ram_cells,
        "crd": _crd_cells,
        "kto": _kto_cells,
    }
    return rows.get(config.objective, _dgpo_cells)(config)


def _dgpo_cells(config: Config) -> tuple[str, str, str, str]:
    dgpo = config.dgpo
    return (
        f"{dgpo.timesteps} of the first {dgpo.high_noise_steps or config.rollout.num_inference_steps} steps",
        f"{dgpo.beta:g}" + (", EMA reference" if dgpo.reference == "ema" else ""),
        f"{dgpo.kl_weight:g}, {dgpo.kl_guidance_scale:g}",
        "off" if dgpo.clip_range is None else f"{dgpo.clip_range:g}",
    )


def _dpo_cells(config: Config) -> tuple[str, str, str, str]:
    dpo = config.diffusion_dpo
    return f"{dpo.timesteps} logit-normal levels", f"{dpo.beta:g}", "", ""


def _grpo_cells(config: Config) -> tuple[str, str, str, str]:
    grpo, noise_steps = config.flow_grpo, config.rollout.noise_steps
    trained = "all steps but the last" if noise_steps is None else f"{noise_steps} steps with noise"
    steps = f"{trained}, {grpo.optimizer_steps} optimizer steps"
    return steps, "", f"{grpo.kl_weight:g}, {config.rollout.guidance_scale:g}", f"{grpo.clip_range:g}"


def _levels(config: Config, settings: NFT | AWM | RAM | CRD | KTO, optimizer_steps: int = 1) -> str:
    count = settings.timesteps or config.rollout.num_inference_steps - 1
    steps = f", {optimizer_steps} optimizer steps" if optimizer_steps > 1 else ""
    return f"{count} `{settings.levels}` levels{steps}"


def _nft_cells(config: Config) -> tuple[str, str, str, str]:
    nft = config.nft
    return _levels(config, nft, nft.optimizer_steps), f"{nft.beta:g}", f"{nft.kl_weight:g}, 1", ""


def _awm_cells(config: Config) -> tuple[str, str, str, str]:
    awm = config.awm
    clip = "off" if awm.clip_range is None else f"{awm.clip_range:g}"
    return _levels(config, awm), "", f"{awm.kl_weight:g}, 1; {awm.ema_weight:g} to θ_old", clip


def _ram_cells(config: Config) -> tuple[str, str, str, str]:
    return _levels(config, config.ram), f"m {config.ram.multiplier:g}", "", ""


def _kto_cells(config: Config) -> tuple[str, str, str, str]:
    return _levels(config, config.kto), f"{config.kto.beta:g}", "", ""


def _crd_cells(config: Config) -> tuple[str, str, str, str]:
    crd = config.crd
    kl = f"{crd.kl_weight_worst:g} to {crd.kl_weight:g}, {crd.kl_guidance_scale:g}"
    return _levels(config, crd, crd.optimizer_steps), f"{crd.beta:g}", kl, ""
