"""What rollouts in float8 change: the same prompts and noise drawn with it and without, a part of `throughput.py`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dgpo_fast.build import build
from dgpo_fast.config.command_line import configure
from dgpo_fast.evaluation.held_out import draw_images
from dgpo_fast.evaluation.statistics import mean_with_ci95
from dgpo_fast.prompts import in_turn
from dgpo_fast.trainer import Trainer

RUNS = {
    "tiny-shapes": ["tiny-shapes", "--precision", "bf16", "--evaluation.images", "512"],
    "sd35m-geneval, random weights": [
        "sd35m-geneval",
        "--random-weights",
        "True",
        "--rewards",
        "benchmarks.rewards:Brightness",
        "--evaluation.images",
        "64",
    ],
}
"""Name of a row → settings of the run that draws as its rollouts do, from its model before any training."""


def difference(settings: Sequence[str]) -> dict[str, Any]:
    """Mean absolute difference of the pictures, of 255, and of their rewards, each with its 95 % interval."""
    settings = [*settings, "--engine.rollout-precision", "fp8", "--reward-workers", "0"]
    config = configure(settings)
    trainer = Trainer(build(config))
    prompts = in_turn(trainer.prompts.held_out, lambda prompt: prompt.tag, config.evaluation.images)
    texts = [prompt.text for prompt in prompts]
    images, rewards = [], []
    try:
        trainer.models.load_behaviour(trainer.models.initial_weights())
        for sampler in (trainer.eval_sampler, trainer.sampler):
            images.append(draw_images(sampler, prompts, trainer.draw, first=0, seed=config.evaluation.seed).images)
            rewards.append(trainer.reward_pool.score_groups(images[-1], prompts, group_size=1).rewards[:, 0])
    finally:
        trainer.close()
    exact, float8 = (pictures.astype(np.int16) for pictures in images)
    row: dict[str, Any] = {"settings": settings, "images": len(prompts)}
    row["pictures"] = _mean(np.abs(float8 - exact).mean((1, 2, 3), dtype=np.float64), texts)
    if not config.random_weights:  # else no reward means anything
        row |= {"reward": _mean(rewards[0], texts), "reward_difference": _mean(rewards[1] - rewards[0], texts)}
    return row


def _mean(values: np.ndarray, texts: list[str]) -> dict[str, Any]:
    mean, interval = mean_with_ci95(values, texts)
    return {"mean": mean, "ci95": interval}
