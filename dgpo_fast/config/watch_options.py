"""Settings of the looks at fixed prompts during training, and of what they warn of."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from dgpo_fast.config.bounds import STRICT, Count, Names, Positive

Change = Annotated[float, Field(gt=0, lt=1)] | None
"""A share of the base model's. None: no rule."""
Factor = Annotated[float, Field(gt=1, allow_inf_nan=False)] | None
"""Above 1. None: no rule."""


@dataclass(kw_only=True, config=STRICT)
class Watch:
    """A look at the same held-out prompts, from the same noise, every N iterations: a strip of pictures
    (`progress.png`), their reward, and signs of reward hacking against the base model's own pictures."""

    every: Annotated[int, Field(ge=0)] = 5
    """Look every N iterations. 0: never."""
    prompts: Count = 8
    """Held-out prompts that are drawn, or all if there are fewer."""
    images_per_prompt: Annotated[int, Field(ge=2)] = 4
    """Images of each prompt. Their differences are the diversity."""
    rewards: Names = ()
    """Rewards that are not trained on, named as `rewards` are. Each is scored in every look; it is a sign of hacking if
    its mean falls below the base model's while the trained reward is above. The threshold is twice the half width of
    the 95 % interval of the paired difference."""
    rules: Literal["off", "warn", "stop"] = "warn"
    """What happens if a threshold below is passed in `in_a_row` looks. off: nothing. warn: one line, with a picture.
    stop: the run ends with the weights of the last good checkpoint. The last checkpoint before the first such look is
    kept with warn and stop."""
    in_a_row: Count = 1
    """Looks in a row that must agree. If more than one, the others follow in the next iterations."""
    together: Positive | None = 1.0
    """Largest sum of signs: the root of the sum of their squares, where each is 1 at its threshold, and 0 like the base
    model. So several smaller changes are an alarm as one large one is. The grid does not count, and of `rewards` the
    worst. None: each sign counts alone."""
    norm_ratio: Factor = 1.05
    """Largest norm of the policy's velocities over the base model's, with the guidance that a KL term distils."""
    edges: Change = 0.3
    """Change x of the edge density: below 1 − x, or above 1 / (1 − x), times the base model's."""
    colours: Change = 0.4
    """Loss x of the entropy of colours: below 1 − x times the base model's. More is no sign."""
    brightness: Change = 0.4
    """Change of the mean brightness, as of `edges`."""
    saturation: Change = 0.4
    """Change of the mean saturation, as of `edges`."""
    dark: Change = 0.2
    """Growth of the share of dark pixels: a difference, not a ratio."""
    diversity: Change = 0.4
    """Loss of the distance between the images of a prompt, as of `colours`."""
    grid: Factor = 3.0
    """Largest growth of a frequency of a periodic grid in the spectrum, over the base model's."""
