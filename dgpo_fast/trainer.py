"""One iteration of a run: draw, score, learn, log."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from dgpo_fast.build import Parts
from dgpo_fast.distributed.checks import DriftError, checksum, compare
from dgpo_fast.distributed.seconds import shared_seconds
from dgpo_fast.evaluation.held_out import Evaluation
from dgpo_fast.evaluation.implied import ImpliedPreferences, told
from dgpo_fast.evaluation.results import written_to
from dgpo_fast.models.policy import Weights
from dgpo_fast.objectives.batches import BatchMaker
from dgpo_fast.records import JsonObject, Metrics
from dgpo_fast.rewards.group_log import GroupLog, joined
from dgpo_fast.rollout.judged import JudgedSource
from dgpo_fast.run.depends import rounding_note, told_changes
from dgpo_fast.run.metrics import Loggers, MetricsFile, peak_memory_mib

Sink = Callable[[Metrics], None]
"""Gets the metrics of each iteration."""


class Trainer:
    """Stores the parts of a run, and steps.

    Args:
        parts: what `build` made.

    Attributes:
        folder: the run's, once its logs are open.
    """

    def __init__(self, parts: Parts):
        self.config, self.processes = parts.config, parts.processes
        self.console, self.device = parts.console, parts.device
        self.prompts, self.reward, self.reward_pool = parts.prompts, parts.reward, parts.reward_pool
        self.memory, self.engine, self.phases, self.work = parts.memory, parts.engine, parts.phases, parts.work
        self.pipeline, self.encoder = parts.pipeline, parts.encoder
        self.models, self.learner, self.source = parts.models, parts.learner, parts.source
        self.sampler, self.draw = parts.sampler, parts.draw
        self.eval_sampler, self.eval_draw = parts.eval_sampler, parts.eval_draw
        self.evaluations, self.watch, self.checkpoints = parts.evaluations, parts.watch, parts.checkpoints
        self.implied: ImpliedPreferences | None = None
        if isinstance(self.source, JudgedSource):
            self.implied = ImpliedPreferences(self.source, self.models, self.config.evaluation.seed)
        scored_by = None if self.implied else self.reward
        self.batches = BatchMaker(
            self.config,
            self.reward.weights,
            self.draw.schedule,
            self.processes,
            self.device,
            sharded=self.models.shards is not None,
        )
        self.group_log = GroupLog(scored_by, self.config.max_lost_iterations, self.models.dtype, self.console.note)
        self.folder: Path | None = None
        self.sinks: tuple[Sink, ...] = ()
        self.loggers: Loggers | None = None

    @property
    def iteration(self) -> int:
        """Number of finished iterations."""
        return self.learner.iteration

    def resume(self, folder: Path) -> None:
        """Goes back to the newest valid checkpoint of the run in `folder`. Raises UserError if there is none."""
        about, passed_over = self.checkpoints.restore(folder)
        for line in passed_over:
            self.console.note(line)
        self.engine.adopt(about.get("engine"))
        now = self.checkpoints.about()
        if told := told_changes(about, now):
            self.console.note(f"changed since the checkpoint was written: {', '.join(told)}: results may differ")
        if note := rounding_note(about, now):
            self.console.note(note)
        self.console.note(f"resuming after iteration {self.iteration}")

    def encode_prompts(self) -> None:
        """Encodes the prompts that are not cached, so that the text encoders can be unloaded before training."""
        drawn = self.source.prompts_of(range(self.iteration, self.config.iterations))
        prompts = [*self.prompts.held_out, *drawn]
        # Processes begin at different prompts, and find what the others have encoded in the meantime.
        first = len(prompts) * self.processes.rank // self.processes.count
        with self.console.track("encoding prompts") as on_step:
            done = self.encoder.prepare(prompts[first:] + prompts[:first], on_step)
        self.console.note(done)

    def prepare(self, folder: Path, should_stop: Callable[[], bool]) -> None:
        """Draws offline groups before the first iteration, until they are complete or `should_stop` is True."""
        self.source.prepare(folder, self.console, should_stop)
        # What came before is no part of an iteration; the source counts its own seconds.
        self.phases.take()
        self.work.take()
        self.processes.take_waited_s()

    def open_logs(self, folder: Path, settings: JsonObject) -> None:
        """Opens metrics.jsonl, dropping what lies after the checkpoint resumed from, and the optional loggers."""
        sinks: list[Sink] = []
        if self.processes.first:
            sinks.append(MetricsFile(folder / "metrics.jsonl", until=self.iteration).write)
            self.loggers = Loggers(self.config.log, folder, settings, self.console.note, self.iteration)
            sinks.append(self.loggers.write)
        self.log_to(folder, *sinks)

    def log_to(self, folder: Path, *sinks: Sink) -> None:
        """Logs every iteration to `sinks`; anything else is written to `folder`."""
        self.folder, self.sinks = folder, sinks

    def save(self, folder: Path, *, wait: bool = True, everyone_comes: bool = True) -> None:
        """See `Checkpoints.save`."""
        self.checkpoints.save(folder, wait=wait, everyone_comes=everyone_comes)

    def anyone(self, flag: bool) -> bool:
        """Whether `flag` is set on any process."""
        return self.processes.any(flag, f"the others at the end of iteration {self.iteration}")

    def close(self) -> None:
        """Ends what the run has started: threads, processes and loggers."""
        self.reward_pool.close()
        self.watch.close()
        if self.loggers is not None:
            self.loggers.close()

    def step(self) -> Metrics:
        """One iteration: draws and scores groups, takes the optimizer steps, updates the averages.

        Returns the logged metrics.
        """
        started, cpu_started = time.perf_counter(), time.process_time()
        self.checkpoints.check()
        metrics = self._train()
        self.learner.complete()
        seconds = time.perf_counter() - started
        metrics = {"iteration": self.iteration, **metrics, "iteration_s": seconds}
        metrics |= {"cpu_s": time.process_time() - cpu_started, "images_per_s": metrics["images_count"] / seconds}
        metrics |= self.work.rates(seconds)
        try:
            self._compare_processes()
            if self.config.evaluation.every and self.iteration % self.config.evaluation.every == 0:
                with self.phases("evaluation"):
                    metrics |= self.evaluations.between(self.learner.evaluated_weights())
                    metrics |= {f"heldout_{name}": value for name, value in self._agreement().items()}
            if self.watch.due(self.iteration):
                with self.phases("look"):
                    metrics |= self.watch.look(self.learner.evaluated_weights(), metrics)
                self.checkpoints.good = self.watch.good
            what = f"the seconds of iteration {self.iteration}"
            metrics |= shared_seconds(self.phases.take(), seconds, self.processes, what)
        finally:
            # The iteration is complete and may get a checkpoint, so it is logged even after an error.
            if not self.learner.halfway:
                self._log(metrics)
        return metrics

    def _train(self) -> Metrics:
        """Trains on the groups that could be scored, if any; returns metrics."""
        number = self.iteration + 1
        try:
            with self.processes.waiting(f"the shards of iteration {number}", counted=False):
                self._meet("the groups")
                collected = self.source.collect(self.iteration)
                metrics = joined(
                    [self.group_log.take(number, of.prompts, of.scores, self.folder) | of.metrics for of in collected]
                )
                if batches := self.batches(collected, self.iteration):
                    self._meet("the learning")
                    metrics |= self.learner.learn(batches, self.folder)
                    self.learner.average(number)
        except torch.OutOfMemoryError as error:
            raise self.memory.error(error, self.config, self.phases.current, number) from None
        return metrics

    def _meet(self, what: str) -> None:
        """If weights are sharded, waits for the other processes. Forwards would too, without a name or a timer."""
        if self.models.shards is not None:
            with self.phases("communicate"):
                self.processes.meet(f"{what} of iteration {self.iteration + 1}", self.device)

    def _compare_processes(self) -> None:
        """Compares weights and counters between processes, if it is time to, and before every checkpoint.

        Raises DriftError if they differ. Nothing is saved afterwards.
        """
        every = (self.config.distributed.check_every, self.config.checkpoint.every)
        if self.processes.count == 1 or not any(n and self.iteration % n == 0 for n in every):
            return
        state: JsonObject = {"iteration": self.iteration}
        if self.models.shards is None:  # else each process has its own
            state |= {f"{part} weights": checksum(weights) for part, weights in self.learner.weights.items()}
        try:
            compare(state, self.processes, f"after iteration {self.iteration}")
        except DriftError:
            self.learner.spoil()
            raise

    def _log(self, metrics: Metrics) -> None:
        metrics["peak_memory_mib"] = peak_memory_mib(self.device)
        for sink in self.sinks:
            sink(metrics)
        if self.processes.first:
            self.console.iteration(metrics)

    def evaluate(self) -> Evaluation:
        """Held-out scores of the weights that would be saved now."""
        return self.evaluations.scores(self.learner.evaluated_weights())

    def finish(self, folder: Path, before: Evaluation | None) -> None:
        """Saves the trained weights for diffusers, evaluates them, and writes summary and pictures.

        Weights come first, so that they are kept if a reward is unavailable by now. Raises UserError if a file cannot
        be written.
        """
        weights = self.learner.evaluated_weights()
        self._save_weights(weights, folder)
        facts = self.source.summary() | self.watch.summary()
        if agreement := self._agreement():
            facts["held_out_preferences"] = agreement
            self.console.note(told(agreement))
        self.evaluations.after(weights, folder, before, facts, self.iteration)

    def _agreement(self) -> JsonObject:
        """How far what would be saved now agrees with held-out preferences; empty if there are none."""
        return {} if self.implied is None else self.implied.summary(self.learner.evaluated_weights())

    def _save_weights(self, weights: Weights, folder: Path) -> None:
        """Writes the trained weights to the run's folder. All processes must call it together."""
        weights = self.models.whole(weights)
        with self.processes.together("the trained weights on the disk"):
            if self.processes.first:
                # A LoRA file needs no text encoders, a whole pipeline does.
                is_whole = self.config.policy.train == "full"
                pipeline = self.encoder.whole_pipeline() if is_whole else self.pipeline
                with written_to(folder):
                    self.models.save(weights, folder, pipeline)
        self.console.note(f"the trained weights are in {folder}")
