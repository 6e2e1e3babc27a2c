"""Scores of a model's images: means with intervals, within a run and from the command line."""

from dgpo_fast.evaluation.held_out import Evaluation, evaluate
from dgpo_fast.evaluation.statistics import mean_with_ci95

__all__ = ["Evaluation", "evaluate", "mean_with_ci95"]
