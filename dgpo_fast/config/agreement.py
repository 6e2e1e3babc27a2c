"""What must hold between settings; each check raises ValueError in one line that names them and the remedy."""

from typing import Literal, Protocol

from dgpo_fast.config.objective_options import Levels, grid_steps


class RolloutSettings(Protocol):
    """Of `options.Rollout`, what is checked."""

    num_inference_steps: int
    noise_level: float
    noise_kind: Literal["sde", "constant", "cps"]
    noise_steps: int | None
    noise_among: int | None
    share_initial_noise: bool


class AverageSettings(Protocol):
    """Of `options.EMA`, what is checked."""

    switch_ema_ref: int | None
    rollout_decay_per_step: float | None


class AdvantageSettings(Protocol):
    """Of `objective_options.Advantage`, what is checked."""

    of: Literal["sum", "each"]
    std: Literal["group", "global", "off"]
    clamp: float | None
    keep: int | None


class LevelSettings(Protocol):
    """Of an objective that draws noise levels, what is checked."""

    levels: Levels

    @property
    def timesteps(self) -> int | None: ...


class DataSettings(Protocol):
    """Of `options.Data`, what is checked."""

    source: Literal["online", "offline", "preferences"]
    preferences: str | None
    noise_passes: int | None


def check_data(objective: str, data: DataSettings, advantage: AdvantageSettings) -> None:
    """Of what is learned from."""
    judged, source = data.source == "preferences", f"data.source is {data.source}"
    if judged and data.preferences is None:
        raise ValueError(
            f"{source} but data.preferences is none: name a .jsonl file or a folder, as in --data.preferences my_votes"
        )
    for name, given in {"preferences": data.preferences, "noise_passes": data.noise_passes}.items():
        if given is not None and not judged:
            raise ValueError(f"data.{name} is {given} but {source}: use --data.source preferences")
    if objective == "kto" and not judged:
        raise ValueError(f"objective kto learns from likes and dislikes but {source}: use --data.source preferences")
    if judged and advantage.of == "each":
        raise ValueError("advantage.of is each but preferences are no rewards: use --advantage.of sum")
    if judged and advantage.keep is not None:
        raise ValueError(f"advantage.keep is {advantage.keep} but judged groups have any size: leave it out")


def steps_with_noise(rollout: RolloutSettings) -> int:
    """How many steps of a rollout with noise can be learned from."""
    return rollout.noise_steps or rollout.noise_among or max(rollout.num_inference_steps - 1, 1)


def check_noise(rollout: RolloutSettings) -> None:
    """Of rollouts with noise."""
    if rollout.noise_kind == "cps" and rollout.noise_level > 1:
        raise ValueError(
            f"rollout.noise_level is {rollout.noise_level:g} but rollout.noise_kind cps takes at most 1, where all "
            "noise is replaced: lower it"
        )
    given = {"noise_steps": rollout.noise_steps, "noise_among": rollout.noise_among}
    given["share_initial_noise"] = rollout.share_initial_noise or None
    for name, value in given.items():
        if rollout.noise_level == 0 and value is not None:
            raise ValueError(
                f"rollout.{name} is {str(value).lower()} but rollout.noise_level is 0: give it some, as in "
                "--rollout.solver euler --rollout.noise-level 0.7"
            )
    most = max(rollout.num_inference_steps - 1, 1)
    among = rollout.noise_among or most
    if among > most:
        raise ValueError(
            f"rollout.noise_among is {among} but the last of {rollout.num_inference_steps} steps is not learned from: "
            f"use at most {most}, or raise rollout.num_inference_steps"
        )
    if rollout.noise_steps is not None and rollout.noise_steps > among:
        raise ValueError(
            f"rollout.noise_steps is {rollout.noise_steps} but the steps with noise lie among the first {among} "
            "(rollout.noise_among): lower it or raise that"
        )


def check_averages(ema: AverageSettings) -> None:
    """Of the weights that draw the rollouts."""
    if ema.rollout_decay_per_step is not None and ema.switch_ema_ref is not None:
        raise ValueError(
            f"ema.rollout_decay_per_step is {ema.rollout_decay_per_step:g} and ema.switch_ema_ref is "
            f"{ema.switch_ema_ref}: only one average can draw the rollouts; use --ema.switch-ema-ref none"
        )


def check_timesteps(objective: str, timesteps: int, available: int, limit: str) -> None:
    """Of the steps of the rollout's grid that an objective trains on; its setting `limit` says how many there are."""
    if timesteps > available:
        raise ValueError(
            f"{objective}.timesteps is {timesteps} but only {available} timesteps can be drawn "
            f"(rollout.num_inference_steps, {objective}.{limit}): lower it or raise those"
        )


def check_levels(objective: str, settings: LevelSettings, grid: int) -> None:
    """Of noise levels, for a rollout of `grid` steps."""
    steps = grid_steps(settings.levels, grid)
    if steps is None and settings.timesteps is None:
        raise ValueError(
            f"{objective}.timesteps is none but {objective}.levels {settings.levels} has no end: give a number, as 4"
        )
    if steps is not None and settings.timesteps is not None:
        check_timesteps(objective, settings.timesteps, len(steps), "levels")


def check_trained_steps(steps: int | None, rollout: RolloutSettings) -> None:
    """Of the steps of a rollout with noise that Flow-GRPO trains on."""
    available = steps_with_noise(rollout)
    if steps is not None and steps > available:
        raise ValueError(
            f"flow_grpo.steps is {steps} but only {available} steps have noise that can be learned from "
            "(rollout.noise_steps, rollout.noise_among): lower it or raise those"
        )


class PolicySettings(Protocol):
    """Of `options.Policy`, what is checked."""

    train: Literal["lora", "full"]
    base_precision: Literal["same", "int8", "nf4"]


class EngineSettings(Protocol):
    """Of `options.Engine`, what is checked."""

    rollout_precision: Literal["same", "fp8"]


def check_base(policy: PolicySettings, engine: EngineSettings) -> None:
    """Of a base in few bits."""
    if policy.base_precision == "same":
        return
    setting = f"policy.base_precision is {policy.base_precision}"
    if policy.train == "full":
        raise ValueError(
            f"{setting} but policy.train is full: only a frozen base is quantised; use --policy.train lora"
        )
    if engine.rollout_precision == "fp8":
        raise ValueError(
            f"{setting} but engine.rollout_precision is fp8: weights would be rounded twice; use "
            "--engine.rollout-precision same"
        )


class WatchSettings(Protocol):
    """Of `watch_options.Watch`, what is checked."""

    every: int
    rules: Literal["off", "warn", "stop"]
    rewards: tuple[str, ...]


def check_watch(watch: WatchSettings) -> None:
    """Of looks that something else asks for."""
    for name, is_set in {"rewards": bool(watch.rewards), "rules": watch.rules == "stop"}.items():
        if watch.every == 0 and is_set:
            raise ValueError(
                f"watch.{name} is given but watch.every is 0, so that there are no looks: use --watch.every 5"
            )


def check_advantage(objective: str, advantage: AdvantageSettings, group_size: int, *, bounded: bool) -> None:
    """Of advantages, which an objective may need to be `bounded`, and of the images of a group that are trained on."""
    if bounded and advantage.clamp is None:
        raise ValueError(
            f"advantage.clamp is none but objective {objective} maps [−clamp, clamp] to [0, 1]: give a number, "
            "as --advantage.clamp 5"
        )
    if advantage.of == "each" and advantage.std == "off":
        raise ValueError(
            "advantage.of is each but advantage.std is off: rewards that are not divided by their deviation are added "
            "as in --advantage.of sum; use --advantage.std group or global"
        )
    keep = advantage.keep
    if keep is None:
        return
    if objective == "diffusion_dpo":
        raise ValueError(
            f"advantage.keep is {keep} but objective diffusion_dpo always trains on the best and the worst image of a "
            "group: leave it out"
        )
    if keep > group_size:
        raise ValueError(
            f"advantage.keep is {keep} but a group has {group_size} images (rollout.group_size): lower it or raise that"
        )
    if keep % 2 and keep < group_size:
        raise ValueError(
            f"advantage.keep is {keep} but half of the kept images are better ones and half worse: use an even number"
        )
