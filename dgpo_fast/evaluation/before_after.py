"""A run's evaluations: before training, between iterations, and at its end."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgpo_fast.config.options import Config
from dgpo_fast.distributed import Processes
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.held_out import Evaluation, evaluate
from dgpo_fast.evaluation.results import BEFORE_FILE, earlier_evaluation, write_results, written_to
from dgpo_fast.models.loading import how_to_load_trained
from dgpo_fast.models.policy import PolicyModels, Weights
from dgpo_fast.prompts import Prompt, PromptSets, in_turn
from dgpo_fast.records import JsonObject, Metrics
from dgpo_fast.rewards import RewardPool
from dgpo_fast.rollout.draw import Draw
from dgpo_fast.rollout.sampler import Sampler
from dgpo_fast.run.console import Console
from dgpo_fast.wording import counted, number, resume_command


@dataclass(eq=False)
class RunEvaluations:
    """Scores weights of one run, always on the same held-out prompts and initial noise.

    All processes must call each method together. The behaviour copy is left with the weights that were scored.

    Attributes:
        config: the run's.
        prompts: with those that are held out.
        rewards: score the images.
        sampler: draws with the behaviour copy.
        draw: how.
        models: the run's.
        processes: those that share the run.
        console: shows progress.
    """

    config: Config
    prompts: PromptSets
    rewards: RewardPool
    sampler: Sampler
    draw: Draw
    models: PolicyModels
    processes: Processes
    console: Console

    def scores(
        self, weights: Weights, on_step: Callable[[float], None] | None = None, remedy: str = "", *, begun: bool = True
    ) -> Evaluation:
        """The scores of `weights`.

        Args:
            on_step: called with the finished share, in (0, 1].
            remedy: the end of the error's line.
            begun: whether the weights have been trained.

        Raises UserError if no image could be scored.
        """
        chosen = in_turn(self.prompts.held_out, lambda prompt: prompt.tag, self.config.evaluation.images)
        return self._scores(weights, chosen, on_step=on_step, remedy=remedy, begun=begun)

    def look(
        self, weights: Weights, chosen: list[Prompt], beside: RewardPool | None, *, begun: bool = True
    ) -> Evaluation:
        """The scores of `weights` on the `chosen` prompts, one an image, also by the rewards `beside`; with all images,
        on every process. Raises as `scores`."""
        return self._scores(weights, chosen, begun=begun, beside=beside, shown=len(chosen))

    def _scores(self, weights: Weights, chosen: list[Prompt], **more: Any) -> Evaluation:
        """`evaluate` of `weights`, with `more` arguments of it."""
        self.models.load_behaviour(weights)
        with self.processes.waiting("the shards of the evaluation", counted=False):
            result = evaluate(
                self.sampler,
                chosen,
                self.rewards,
                self.draw,
                self.config.evaluation.seed,
                processes=self.processes,
                sharded=self.models.shards is not None,
                **more,
            )
        if result.failures:
            failed = counted(len(result.failures), "image")
            self.console.note(f"evaluation: {failed} could not be scored; the first: {result.failures[0]}")
        return result

    def between(self, weights: Weights) -> Metrics:
        """Metrics of `weights` between two iterations; empty, with a note, if they cannot be scored."""
        try:
            summary = self.scores(weights).summary()
        except UserError as error:
            self.console.note(f"evaluation skipped: {error}")
            return {}
        return {f"heldout_{key}": summary[key] for key in ("reward_mean", "reward_ci95")}

    def before(self, folder: Path) -> Evaluation | None:
        """Scores of the original model; None on processes other than the first.

        A resumed run reads them from its `folder` if its rewards are the same.
        """
        path, contents = folder / BEFORE_FILE, self.rewards.reward.contents
        earlier = earlier_evaluation(path, contents, self.console.note) if self.processes.first else None
        if self.processes.broadcast(earlier is not None, "the evaluation before training"):
            return earlier
        again = "; fix it and run the same command again"
        before = self._tracked("before", self.models.initial_weights(), again, begun=False)
        if not self.processes.first:
            return None
        before.save(path)
        self.console.note(f"before: mean reward {number(before.summary()['reward_mean'])}")
        return before

    def after(
        self, weights: Weights, folder: Path, before: Evaluation | None, source: JsonObject, iteration: int
    ) -> None:
        """Scores the trained weights; the first process writes summary and pictures and prints the results.

        Args:
            weights: the trained weights.
            folder: the run's.
            before: the result of `before`.
            source: the summary of the groups' source, and of the looks.
            iteration: number of finished iterations.

        Raises UserError if results cannot be written.
        """
        again = f"; fix it, then resume with: {resume_command(folder)}"
        after = self._tracked("after", weights, again, begun=True)
        if before is None:
            return
        with written_to(folder):
            write_results(folder, before, after, self.config, source, iteration, self.console, self.prompts.evaluated)
        self.console.note(f"load: {how_to_load_trained(self.config, self.sampler.pipeline, folder)}")

    def _tracked(self, when: str, weights: Weights, remedy: str, *, begun: bool) -> Evaluation:
        images = counted(self.config.evaluation.images, "image")
        with self.console.track(f"{when}: {images} of {self.prompts.evaluated}") as on_step:
            return self.scores(weights, on_step, remedy, begun=begun)
