"""What a model's own files say of drawing, beside what is asked for.

Their shift and image size are the defaults. What else in them changes images, and is not read, is refused or said.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from dgpo_fast.config.bounds import size_of
from dgpo_fast.config.options import Config
from dgpo_fast.config.recipes import RECIPES
from dgpo_fast.errors import UserError
from dgpo_fast.models.architecture import Architecture
from dgpo_fast.wording import size_in_words

TRAIN_TIMESTEPS = 1000
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


def with_own_shift(config: Config, architecture: Architecture, note: Callable[[str], None]) -> Config:
    """A run's `config` with the model's own shift, if it has none. Notes what differs from the model's own settings.

    Raises UserError as `fill_in_shift`.
    """
    rollout = config.rollout
    shift = fill_in_shift(rollout.shift, architecture, "rollout.shift")
    for line in differences(
        architecture,
        shift=shift,
        resolution=rollout.resolution,
        max_sequence_length=rollout.max_sequence_length,
        prefix="rollout.",
        recipe=config.recipe,
    ):
        note(line)
    return replace(config, rollout=replace(rollout, shift=shift))


def fill_in_shift(shift: float | None, architecture: Architecture, setting: str) -> float:
    """`shift`, the value of `setting`, or the model's own if it is None.

    Raises UserError for a scheduler that is not of flow matching with 1000 training timesteps, and if the model's own
    shift is needed but depends on the size of the image, or is not a number in (0, 100].
    """
    scheduler, file = architecture.scheduler, architecture.scheduler_file
    kind, prediction = scheduler.get("_class_name", "FlowMatch"), scheduler.get("prediction_type")
    if not ("FlowMatch" in kind or prediction == "flow_prediction" or scheduler.get("use_flow_sigmas")):
        raise UserError(f"{file}: {kind}: only models of flow matching can be drawn")
    timesteps = scheduler.get("num_train_timesteps", TRAIN_TIMESTEPS)
    if timesteps != TRAIN_TIMESTEPS:
        raise UserError(f"{file}: num_train_timesteps {timesteps}: only models with {TRAIN_TIMESTEPS} can be drawn")
    if shift is not None:
        return shift
    remedy = f"give one, as in --{setting} 3"
    if scheduler.get(BY_IMAGE_SIZE):
        raise UserError(f"{file}: a shift by image size ({BY_IMAGE_SIZE}) is not computed here; {remedy}")
    own = architecture.shift
    if isinstance(own, bool) or not isinstance(own, int | float) or not 0 < own <= 100:
        raise UserError(f"{file}: shift {own!r} is not a number in (0, 100]; {remedy}")
    return float(own)


def image_size(architecture: Architecture, resolution: int | str | None) -> tuple[int, int]:
    """(height, width) in pixels of the images that `resolution` asks for, which the model may not be able to draw."""
    return architecture.size if resolution is None else size_of(resolution)


def differences(
    architecture: Architecture,
    *,
    shift: float,
    resolution: int | str | None,
    max_sequence_length: int,
    prefix: str = "",
    recipe: str | None = None,
) -> Iterator[str]:
    """One line for each setting that differs from the model's own, and for what its scheduler has and is not read.

    Args:
        architecture: of the model.
        shift, resolution, max_sequence_length: the settings.
        prefix: of their names.
        recipe: that they may come from.
    """

    def setting(name: str, value: float | str) -> str:
        of_recipe = recipe in RECIPES and getattr(RECIPES[recipe]().rollout, name) == value
        return f"{prefix}{name} {_plain(value)}" + (f" (recipe {recipe})" if of_recipe else "")

    own, scheduler = architecture.shift, architecture.scheduler
    if scheduler.get(BY_IMAGE_SIZE):
        yield f"{setting('shift', shift)}: the model's own depends on the image's size ({BY_IMAGE_SIZE})"
    elif shift != own:
        yield f"{setting('shift', shift)}: the model's own is {_plain(own)}"
    if resolution is not None and size_of(resolution) != architecture.size:
        words = "" if isinstance(resolution, int) else f", {size_in_words(*size_of(resolution))}"
        yield f"{setting('resolution', resolution)}{words}: the model's own is {size_in_words(*architecture.size)}"
    if max_sequence_length > 0 and "text_encoder_3" not in architecture.text_encoders:
        yield (
            f"{setting('max_sequence_length', max_sequence_length)}: this model has no T5 encoder; zeros stand for its "
            "tokens, as in diffusers (0 leaves them out)"
        )
    unread = [f"{name} {scheduler[name]}" for name in UNREAD if scheduler.get(name)]
    if unread:
        yield f"the model's own scheduler has {', '.join(unread)}, which is not read: {prefix}solver sets the steps"


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
