"""Scores of a model's images: within a run, and by `python -m dgpo_fast.evaluate`."""
