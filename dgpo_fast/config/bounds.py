"""Types of settings with their bounds."""

import os
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Guidance = Annotated[float, Field(ge=1, allow_inf_nan=False)]
PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, or a name in its place; `~` is the user's home."""
STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)  # the docstrings are what `--help` prints
