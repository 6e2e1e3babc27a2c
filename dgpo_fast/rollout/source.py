"""Where the scored groups of an iteration come from: drawn now by the behaviour weights, once by the reference, or
judged by people."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from dgpo_fast.distributed import Share
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.prompts import Prompt
from dgpo_fast.records import JsonObject, Metrics
from dgpo_fast.rewards import GroupScores
from dgpo_fast.rollout.step_noise import Transitions
from dgpo_fast.run.console import Console


@dataclass(frozen=True)
class Groups:
    """P scored groups of G images, the images of a prompt together.

    Attributes:
        prompts: P.
        text: (B) embeddings of the process's own samples.
        x0: (B, C, H, W) fp32 final latents of the process's own samples.
        scores: of all samples.
        share: which of the P·G samples are the process's own.
        transitions: every step of the rollout of the process's own samples, if they were kept.
        metrics: additional metrics of drawing them.
        advantage: (P·G,) fp32 of all samples, on the CPU; None: by the scores.
        number: keys the noise of training; None: the iteration does.
    """

    prompts: list[Prompt]
    text: TextEmbeds
    x0: Tensor
    scores: GroupScores
    share: Share
    transitions: Transitions | None = None
    metrics: Metrics = field(default_factory=dict)
    advantage: Tensor | None = None
    number: int | None = None


class Source(Protocol):
    """Provides the groups of every iteration; they only depend on the settings and the iteration."""

    def prepare(self, folder: Path, console: Console, should_stop: Callable[[], bool]) -> None:
        """Does what must be done once before the first iteration, or continues it.

        Args:
            folder: the run's.
            console: shows progress.
            should_stop: asked now and then; True ends the work at a point from which it can be continued.
        """
        ...

    def prompts_of(self, iterations: range) -> list[Prompt]:
        """The prompts that `iterations` and the work before the first one need; some may occur twice."""
        ...

    def collect(self, iteration: int) -> list[Groups]:
        """The groups of iteration `iteration`, counted from 0; those of one size together."""
        ...

    def summary(self) -> JsonObject:
        """What `summary.json` says of the source; `drawing_s` are seconds spent before the first iteration."""
        ...
