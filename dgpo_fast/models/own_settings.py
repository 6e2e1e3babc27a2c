"""What a model's own files say of drawing, beside what is asked for.

Their shift and image size are the defaults. What else in them changes images, and is not read, is refused or said.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from dgpo_fast.config.bounds import size_of
from dgpo_fast.config.options import Config
from dgpo_fast.config.recipes import RECIPES
from dgpo_fast.errors import UserError
from dgpo_fast.models.family import Family, Grid
from dgpo_fast.models.latents import latent_shape
from dgpo_fast.wording import size_in_words

TRAIN_TIMESTEPS = 1000
DEFAULT_STEPS = 10
"""For what does not depend on the number of steps."""
BY_IMAGE_SIZE = "use_dynamic_shifting"
UNREAD = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
    "shift_terminal",
)
"""Of a scheduler: other grids and steps than those of `solver`."""


def with_own_shift(config: Config, family: Family, note: Callable[[str], None]) -> Config:
    """A run's `config` with the model's own shift, if it has none and the model's file has one. Notes what differs from
    the model's own settings, and sizes of images that differ.

    Raises UserError as `fill_in_shift`.
    """
    rollout = config.rollout
    shift = fill_in_shift(rollout.shift, family, "rollout.shift")
    differing = differences(
        family,
        shift=shift,
        resolution=rollout.resolution,
        max_sequence_length=rollout.max_sequence_length,
        prefix="rollout.",
        recipe=config.recipe,
    )
    for line in filter(None, (*differing, sizes_note(config, family))):
        note(line)
    return replace(config, rollout=replace(rollout, shift=shift))


def fill_in_shift(shift: float | None, family: Family, setting: str) -> float | None:
    """`shift`, the value of `setting`, or the model's own if it is None; None if its family makes the grid.

    Raises UserError for a scheduler that is not of flow matching with 1000 training timesteps, and if the model's own
    shift is needed, but depends on the size of the image in a way that its family does not know, or is not a number in
    (0, 100].
    """
    scheduler, file = family.architecture.scheduler, family.architecture.scheduler_file
    kind, prediction = scheduler.get("_class_name", "FlowMatch"), scheduler.get("prediction_type")
    if not ("FlowMatch" in kind or prediction == "flow_prediction" or scheduler.get("use_flow_sigmas")):
        raise UserError(f"{file}: {kind}: only models of flow matching can be drawn")
    timesteps = scheduler.get("num_train_timesteps", TRAIN_TIMESTEPS)
    if timesteps != TRAIN_TIMESTEPS:
        raise UserError(f"{file}: num_train_timesteps {timesteps}: only models with {TRAIN_TIMESTEPS} can be drawn")
    if shift is not None:
        return shift
    remedy, by_size = f"give one, as in --{setting} 3", scheduler.get(BY_IMAGE_SIZE)
    if _makes_own_grid(family):
        return None
    if by_size:
        raise UserError(f"{file}: a shift by image size ({BY_IMAGE_SIZE}) is not computed here; {remedy}")
    own = family.architecture.shift
    if isinstance(own, bool) or not isinstance(own, int | float) or not 0 < own <= 100:
        raise UserError(f"{file}: shift {own!r} is not a number in (0, 100]; {remedy}")
    return float(own)


def own_grid(family: Family, shift: float | None, steps: int, resolution: int | str | None) -> Grid:
    """The grid of `steps` steps for pictures of `resolution`.

    Args:
        family: of the model.
        shift: in the place of the model's own; None: that.
        steps: of the solver.
        resolution: as the setting.

    Raises UserError if the model cannot draw that.
    """
    grid = family.grid(steps, latent_shape(family, resolution))
    return grid if shift is None else replace(grid, shift=shift)


def in_plain_numbers(config: Config, family: Family) -> Config:
    """`config` as objectives and the engine read it: guidance as g of v_neg + g·(v_cond − v_neg), 1 if the negative
    prompt is not predicted, the shift of the rollout's own grid, and both sizes of images."""
    rollout, evaluation = config.rollout, config.evaluation
    grid = own_grid(family, rollout.shift, rollout.num_inference_steps, rollout.resolution)
    _shown_shape(family, config)  # raises if the model cannot draw that
    scale, shown = (family.guidance(of.guidance_scale).scale for of in (rollout, evaluation))
    sizes = [f"{height}x{width}" for height, width in image_sizes(family, config)]
    return replace(
        config,
        rollout=replace(rollout, guidance_scale=scale, shift=grid.shift, resolution=sizes[0]),
        evaluation=replace(evaluation, guidance_scale=shown, resolution=sizes[1]),
    )


def require_trainable(config: Config, family: Family) -> None:
    """Raises UserError, one line, for a model that the settings of `config` cannot train."""
    if family.distilled and not config.policy.allow_distilled:
        raise UserError(
            f"model '{config.model}' is distilled to a few steps: a loss on noised images "
            "blurs what it draws; train the model that it was made from, or give --policy.allow-distilled"
        )
    embedded = family.guidance(config.rollout.guidance_scale).embedded
    if config.dgpo.kl_guidance_scale > 1 and embedded is not None:
        raise UserError(
            f"dgpo.kl_guidance_scale {config.dgpo.kl_guidance_scale:g}: this model reads its guidance as a number "
            "(rollout.guidance_scale), and has it already; use --dgpo.kl-guidance-scale 1"
        )


def _shown_shape(family: Family, config: Config) -> tuple[int, ...]:
    return latent_shape(family, config.evaluation_resolution, "evaluation.resolution")


def sizes_note(config: Config, family: Family) -> str:
    """What a run says that draws held-out images of another size than those that it learns from; else empty."""
    sizes = image_sizes(family, config)
    if sizes[0] == sizes[1]:
        return ""
    latents = latent_shape(family, config.rollout.resolution), _shown_shape(family, config)
    steps, shift = config.evaluation.num_inference_steps, config.rollout.shift
    learnt, shown = (
        f"{size_in_words(*size)} ({family.image_tokens(latent)} image tokens, "
        f"shift {shift or family.grid(steps, latent).shift:.3g})"
        for size, latent in zip(sizes, latents, strict=True)
    )
    return f"trained at {learnt}, evaluated at {shown}: the gain is what carries over to that size"


def image_sizes(family: Family, config: Config) -> tuple[tuple[int, int], tuple[int, int]]:
    """As `image_size`, of the images that a run learns from, and of held-out ones."""
    return image_size(family, config.rollout.resolution), image_size(family, config.evaluation_resolution)


def image_size(family: Family, resolution: int | str | None) -> tuple[int, int]:
    """(height, width) in pixels of the images that `resolution` asks for, which the model may not be able to draw."""
    return family.size if resolution is None else size_of(resolution)


def differences(
    family: Family,
    *,
    shift: float | None,
    resolution: int | str | None,
    max_sequence_length: int,
    prefix: str = "",
    recipe: str | None = None,
) -> Iterator[str]:
    """One line for each setting that differs from the model's own, and for what its scheduler has and is not read.

    Args:
        family: of the model.
        shift, resolution, max_sequence_length: the settings.
        prefix: of their names.
        recipe: that they may come from.
    """

    def setting(name: str, value: float | str) -> str:
        of_recipe = recipe in RECIPES and getattr(RECIPES[recipe]().rollout, name) == value
        return f"{prefix}{name} {_plain(value)}" + (f" (recipe {recipe})" if of_recipe else "")

    scheduler = family.architecture.scheduler
    if shift is not None and scheduler.get(BY_IMAGE_SIZE):
        yield f"{setting('shift', shift)}: the model's own depends on the image's size ({BY_IMAGE_SIZE})"
    elif shift is not None and shift != (own := _own_shift(family)):
        yield f"{setting('shift', shift)}: the model's own is {_plain(own)}"
    if resolution is not None and size_of(resolution) != family.size:
        words = "" if isinstance(resolution, int) else f", {size_in_words(*size_of(resolution))}"
        yield f"{setting('resolution', resolution)}{words}: the model's own is {size_in_words(*family.size)}"
    if about := family.about_length(max_sequence_length):
        yield f"{setting('max_sequence_length', max_sequence_length)}: {about}"
    read = ("shift_terminal",) if _default_grid(family).last is not None else ()
    unread = [f"{name} {scheduler[name]}" for name in UNREAD if scheduler.get(name) and name not in read]
    if unread:
        yield f"the model's own scheduler has {', '.join(unread)}, which is not read: {prefix}solver sets the steps"


def _makes_own_grid(family: Family) -> bool:
    return type(family).grid is not Family.grid


def _default_grid(family: Family) -> Grid:
    return family.grid(DEFAULT_STEPS, family.latent_shape(*family.size))


def _own_shift(family: Family) -> Any:
    """Of a model that has one shift for all sizes and steps, as its file or its family has it."""
    return _default_grid(family).shift if _makes_own_grid(family) else family.architecture.shift


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
