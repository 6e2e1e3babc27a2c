"""Checkpoints of a learner: weights, averages and optimizer states, for any number of processes."""

from collections.abc import Callable, Mapping
from pathlib import Path

from dgpo_fast.distributed import Processes, SharedError
from dgpo_fast.learning.learner import Learner
from dgpo_fast.learning.optimizers import in_storage, load_optimizer, optimizer_tensors
from dgpo_fast.models.policy import Weights
from dgpo_fast.records import JsonObject
from dgpo_fast.run.checkpoint import CheckpointWriter, State, load_newest
from dgpo_fast.run.depends import change, changed
from dgpo_fast.wording import one_line


class Checkpoints:
    """The checkpoints of one run.

    Args:
        learner: its state is saved and restored.
        processes: those that share the run; the first one writes.
        about: gives what every manifest says of the run: JSON values by name, with fingerprints under "depends".
        earlier: fingerprints that earlier versions would have kept (`depends.changed`).

    Attributes:
        good: the newest checkpoint until this iteration is kept beside the newest ones; None: no other is kept.
    """

    def __init__(
        self,
        learner: Learner,
        processes: Processes,
        about: Callable[[], JsonObject],
        earlier: Mapping[str, str] | None = None,
    ):
        self.learner, self.processes, self.about, self.earlier = learner, processes, about, earlier
        self.writer: CheckpointWriter | None = None
        self.good: int | None = None

    def check(self) -> None:
        """Raises UserError if the disk has refused a checkpoint that was being written."""
        if self.writer is not None:
            self.writer.check()

    def save(self, folder: Path, *, wait: bool = True, everyone_comes: bool = True) -> None:
        """Writes a checkpoint to `folder`/checkpoints in a thread, and waits for it if asked to.

        Nothing is saved if an iteration broke off between two of its optimizer steps: no run could resume from there.

        Args:
            folder: the run's.
            wait: whether to return only when it is written.
            everyone_comes: whether all processes call this. If not, sharded weights cannot be saved: no process has
                all of them.

        Raises UserError if it cannot be written.
        """
        models = self.learner.models
        sharded = models.shards is not None
        if self.learner.halfway or (sharded and not everyone_comes) or not (sharded or self.processes.first):
            return
        if self.writer is None and self.processes.first:
            keep = self.learner.config.checkpoint.keep
            self.writer = CheckpointWriter(folder / "checkpoints", keep, self.about())
        with self.learner.phases("checkpoint"):
            parts = self._parts()
            if sharded:
                parts = {part: models.whole(tensors) for part, tensors in parts.items()}
            if self.writer is None:
                return
            self.writer.save(self.learner.iteration, parts, copied=sharded, good=self.good)
            if wait:
                self.writer.wait()

    def restore(self, folder: Path, until: int | None = None) -> tuple[JsonObject, list[str]]:
        """Goes back to the newest valid checkpoint of the run in `folder`, or of those `until` an iteration.

        Returns what its manifest says of the run, and a line for each checkpoint passed over. Raises UserError if there
        is none, if it does not fit the model, or if what the run depends on has changed.
        """
        state, passed_over = self._newest(folder, until)
        self._require_same(folder, state.info.get("depends", {}))
        learner, models = self.learner, self.learner.models
        try:
            for part in learner.weights:
                if {name: tensor.shape for name, tensor in state.part(part).items()} != models.shapes:
                    raise ValueError(f"its {part} weights have other names or shapes")
            found = state.part("policy")
            in_order = {name: found[name] for name in models.weights}
            policy, optimizer = in_storage(in_order, state.part("optimizer"), models.storage)
            models.load_weights(models.parts(policy))
            for part, average in learner.averages.items():
                average.load(models.parts(state.part(part)))
            load_optimizer(learner.optimizer, models.parts(optimizer))
        except (ValueError, KeyError, RuntimeError) as error:
            reason = one_line(error)
            raise SharedError(
                f"--resume {folder}: its checkpoint does not fit the model '{learner.config.model}' ({reason})"
            ) from None
        learner.iteration = state.iteration
        return state.info, passed_over

    def _require_same(self, folder: Path, before: Mapping[str, str]) -> None:
        """Raises SharedError if what the run depends on has changed on the disk of any process."""
        names = changed(before, self.about()["depends"], self.earlier)
        everyone = self.processes.gather(names, "what the run depends on")
        if names := list(dict.fromkeys(name for theirs in everyone for name in theirs)):
            remedy = "put back what it was, or start a new run"
            raise SharedError(change(f"--resume {folder}", names, "the run began", remedy))

    def _parts(self) -> dict[str, Weights]:
        return {**self.learner.weights, "optimizer": optimizer_tensors(self.learner.optimizer)}

    def _newest(self, folder: Path, until: int | None) -> tuple[State, list[str]]:
        """What process 0 finds on its disk, on every process."""
        found = None
        with self.processes.together("the newest checkpoint"):
            if self.processes.first:
                found = load_newest(folder / "checkpoints", until)
        about = None if found is None else [found[0].iteration, found[0].info, found[1]]
        iteration, info, passed_over = self.processes.broadcast(about, "the newest checkpoint")
        tensors = self.processes.broadcast_tensors(found[0].tensors if found else None, "the newest checkpoint")
        return State(iteration, tensors, info), passed_over
