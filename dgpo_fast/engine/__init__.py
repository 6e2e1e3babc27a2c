"""How a run's forwards are made fast. Nothing here changes what is computed, but for rounding.

`choices` says what is done on this device and why; each other file is one saving.
"""

from dgpo_fast.engine.engine import Engine

__all__ = ["Engine"]
