"""Direct Group Preference Optimization (DGPO) for text-to-image diffusion models.

Nothing heavy is imported here: `python -m dgpo_fast.train` is the way in.
"""

__version__ = "0.1.0"
