"""From an iteration's groups to new weights: gradients, optimizer steps and averages."""

import math
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from dgpo_fast.config.options import Config, Optimizer
from dgpo_fast.distributed import Processes, SharedError
from dgpo_fast.distributed.gradients import sum_gradients
from dgpo_fast.distributed.guard import StepGuard, damage, gradient_norm
from dgpo_fast.learning.ema import MovingAverage, ramp
from dgpo_fast.learning.optimizers import make_optimizer
from dgpo_fast.models.policy import PolicyModels, Weights
from dgpo_fast.models.work import WorkMeter
from dgpo_fast.objectives.batch import Batch, add_metrics
from dgpo_fast.objectives.drift import as_numbers, with_drift
from dgpo_fast.objectives.registry import load_objective, traits
from dgpo_fast.records import Metrics
from dgpo_fast.run.metrics import Phases, write_json
from dgpo_fast.seeds import stream_seed


class Learner:
    """What changes the weights of one run.

    Args:
        config: the run's, in plain numbers (`models/own_settings.py`).
        models: whose policy learns.
        processes: those that share the run.
        phases: seconds of each part go there.
        work: what forwards and backwards do is counted there.
        note: called with one line for every skipped step.

    Attributes:
        objective: adds the gradients of a batch.
        optimizer: of the policy's weights.
        old: θ_old, the fast average.
        slow: the slow average, which is evaluated and saved.
        drawing: the rollouts' own average; None if the policy or θ_old draws them.
        iteration: number of finished iterations.
        halfway: whether an iteration has taken some of its steps but is not complete. No run can resume from there.
    """

    def __init__(
        self,
        config: Config,
        models: PolicyModels,
        processes: Processes,
        phases: Phases,
        work: WorkMeter,
        note: Callable[[str], None],
    ):
        self.config, self.models, self.processes, self.phases, self.work = config, models, processes, phases, work
        self.objective = load_objective(config)
        self.optimizer = make_optimizer(
            models.weights, config.optimizer, models.storage, stream_seed(config.seed, "rounding")
        )
        slow_device = torch.device("cpu") if config.ema.offload else None
        self.old, self.slow = MovingAverage(models.weights), MovingAverage(models.weights, slow_device)
        is_apart = config.ema.rollout_decay_per_step is not None
        self.drawing = MovingAverage(models.weights) if is_apart else None
        self.optimizer_steps = traits(config).optimizer_steps
        self.guard = StepGuard(config.optimizer.max_skipped_steps, processes, models.dtype, note)
        self.iteration = 0
        self.halfway = False

    def learn(self, batches: Sequence[Batch], folder: Path | None = None) -> Metrics:
        """The optimizer steps of an iteration; metrics are means over its groups.

        If gradients that are not finite end the run, what is known of them is written into `folder`.

        Args:
            batches: of groups of one size each; usually there is one.
            folder: the run's.
        """
        rate = learning_rate(self.config.optimizer, self.iteration, self.config.iterations)
        number = self.iteration + 1
        everything = sum(batch.groups for batch in batches)
        totals: Metrics = {}
        skipped = 0
        for each in zip_longest(*map(self.objective.optimizer_batches, batches)):
            step = [part for part in each if part is not None]
            with self.phases("train"), self.work.training():
                losses = self._accumulate(step)
            with self.phases("communicate"):
                own_norm = self._sum_gradients(f"the gradients of iteration {number}")
            with self.phases("optimizer"):
                kept = self.models.merge_kept  # by the forwards, before the step
                norm, taken = self._update(rate, own_norm, number, folder)
            skipped += not taken
            # Each process has its part of the means; norm and weights are the same on all.
            parts = {**losses, "grad_norm": norm / self.processes.count}
            if kept is not None:
                parts["lora_merge_kept"] = kept / self.processes.count
            add_metrics(totals, parts, sum(part.groups for part in step) / everything)
        return {
            "learning_rate": rate,
            "steps_skipped_count": skipped,
            **with_drift(self._sum(as_numbers(totals), f"the metrics of iteration {number}")),
        }

    def _accumulate(self, parts: Sequence[Batch]) -> dict[str, Tensor]:
        """Adds the gradient of the mean over all groups of `parts`; returns the metrics, means likewise."""
        losses: dict[str, Tensor] = {}
        everything, before = sum(part.groups for part in parts), parts[0].groups
        for part in parts:
            self._scale_gradients(before / part.groups)
            found = self.objective.accumulate(part, self.models, self.old.weights)
            if part.kl_gate is not None:
                found["kl_gate_mean"] = (part.weight * part.kl_gate).sum() / part.samples
            add_metrics(losses, found, part.groups / everything)
            before = part.groups
        self._scale_gradients(before / everything)
        return losses

    def _scale_gradients(self, factor: float) -> None:
        if factor != 1:
            torch._foreach_mul_(
                [weight.grad for weight in self.models.weights.values() if weight.grad is not None], factor
            )

    def average(self, step: int) -> None:
        """Updates the moving averages after iteration `step`, counted from 1."""
        ema, taken = self.config.ema, step * self.optimizer_steps
        start, delay = ema.old_decay_start, ema.old_decay_delay
        decay = ramp(taken, per_step=ema.old_decay_per_step, largest=ema.old_decay_max, start=start, delay=delay)
        self.old.update(self.models.weights, decay)
        if self.drawing is not None and ema.rollout_decay_per_step is not None:
            per_step, delay = ema.rollout_decay_per_step, ema.rollout_decay_delay
            decay = ramp(taken, per_step=per_step, largest=ema.rollout_decay_max, delay=delay)
            self.drawing.update(self.models.weights, decay)
        if step % ema.eval_every == 0:
            self.slow.update(self.models.weights, self._slow_decay(step))

    @property
    def averages(self) -> dict[str, MovingAverage]:
        """All moving averages, by their names in a checkpoint."""
        apart = {} if self.drawing is None else {"drawing": self.drawing}
        return {"old": self.old, "slow": self.slow, **apart}

    @property
    def weights(self) -> dict[str, Weights]:
        """The policy's weights and all averages, by their names in a checkpoint."""
        return {"policy": self.models.weights, **{part: average.weights for part, average in self.averages.items()}}

    def complete(self) -> None:
        """Counts an iteration as done. Both in one statement: an interrupt finds the old state or the new one."""
        self.iteration, self.halfway = self.iteration + 1, False

    def spoil(self) -> None:
        """Prevents the state from being saved, because the processes do not agree on it."""
        self.halfway = True

    def evaluated_weights(self) -> Weights:
        """What is evaluated and saved: the slow average, or the policy itself in a run too short for an average.

        The last iteration is always in it: if the average was last updated before, a copy of it is updated once more.
        """
        every = self.config.ema.eval_every
        if self.iteration < every:
            return self.models.weights
        if self.iteration % every == 0:
            return self.slow.weights
        last = MovingAverage(self.slow.weights, torch.device("cpu"))  # not at the cost of a GPU's memory
        last.update(self.models.weights, self._slow_decay(self.iteration))
        return last.weights

    def _slow_decay(self, step: int) -> float:
        return min(self.config.ema.eval_decay_max, (1 + step) / (10 + step))

    def rollout_weights(self) -> Weights:
        """What draws the next iteration's images."""
        if self.drawing is not None:
            return self.drawing.weights
        switch = self.config.ema.switch_ema_ref
        return self.models.weights if switch is None or self.iteration < switch else self.old.weights

    def _sum_gradients(self, what: str) -> Tensor:
        """Sums the gradients over processes; returns the norm of this process's part."""
        if self.models.shards is not None:
            self.models.take_gradients()  # they were summed in the backward
            return torch.zeros(())  # after the sum, it is unknown which process's part was not finite
        own_norm = gradient_norm(self.models.weights)
        sum_gradients(self.models.weights, self.processes, what)
        return own_norm

    def _sum(self, numbers: dict[str, float], what: str) -> dict[str, float]:
        """Numbers summed over processes. A process without samples has none."""
        everyone = self.processes.gather(numbers, what)
        names = dict.fromkeys(name for theirs in everyone for name in theirs)
        return {name: sum(theirs.get(name, 0.0) for theirs in everyone) for name in names}

    def _update(self, rate: float, own_norm: Tensor, number: int, folder: Path | None) -> tuple[Tensor, bool]:
        """One optimizer step at learning rate `rate` in iteration `number`, counted from 1; `folder` as in `learn`.

        Returns the gradient's norm before clipping, and whether the step was taken.
        """
        norm = self._clip()
        try:
            allowed = self.guard.allows(norm, own_norm, number)
        except SharedError:
            self._dump(number, folder)
            raise
        if not allowed:
            self.optimizer.zero_grad(set_to_none=True)
            return norm, False
        self.halfway = True
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.models.weights_changed()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, True

    def _clip(self) -> Tensor:
        """Clips the gradient; returns its norm before."""
        weights, largest = self.models.weights, self.config.optimizer.max_grad_norm
        if self.models.shards is None:
            return torch.nn.utils.clip_grad_norm_(list(weights.values()), largest)
        norm = self.models.shards.gradient_norm(weights)
        torch.nn.utils.clip_grads_with_norm_(list(weights.values()), largest, norm)
        return norm

    def _dump(self, number: int, folder: Path | None) -> None:
        """Writes what is known of a run that is about to stop for its gradients. Counters can draw the rest again."""
        if folder is not None and self.processes.first:
            known = {"iteration": number, "seed": self.config.seed, "weights": damage(self.models.weights)}
            write_json(folder / f"dump-{number:06d}.json", known)


def learning_rate(settings: Optimizer, iteration: int, iterations: int) -> float:
    """Learning rate after `iteration` finished iterations. It depends on nothing else: a resumed run has the same."""
    left = max(0.0, 1 - iteration / iterations)
    factor = {"none": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[settings.lr_decay]
    return settings.lr * factor
