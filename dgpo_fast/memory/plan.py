"""The memory of one run: predicted before anything is allocated, measured once, with advice if it runs out."""

from collections.abc import Callable
from dataclasses import replace

import torch

from dgpo_fast.config.bounds import card_bytes
from dgpo_fast.config.options import Config
from dgpo_fast.distributed import Processes
from dgpo_fast.engine.choices import room_for_graphs
from dgpo_fast.errors import UserError
from dgpo_fast.memory.advice import remedies, sentence
from dgpo_fast.memory.card import headroom, on_card, plan_card, with_low_memory
from dgpo_fast.memory.micro_batch import MOST_ON_A_CPU, MemoryLine, TrainingMemory, fit, in_groups
from dgpo_fast.memory.predict import Predictor, readable
from dgpo_fast.models.family import Family
from dgpo_fast.models.loading import free_bytes
from dgpo_fast.models.own_settings import in_plain_numbers
from dgpo_fast.models.policy import PolicyModels
from dgpo_fast.objectives.registry import traits

CPU_SHARE = 0.5
"""Share of a CPU's free memory that a micro-batch may take: other programs need some too."""

MADE_LATER = ("gradients", "optimizer states", "averages", "recorded rollouts", "float8 copy", "decoder's copy")
"""Of what a prediction holds: made after the micro-batch is measured."""


class MemoryPlan:
    """Chooses the micro-batch of a run and predicts its memory.

    Args:
        family: of the run's model.
        device: the run's.
        dtype: the run's.
        processes: those that share the run.
        note: called with one line on what is predicted and chosen.
    """

    def __init__(
        self,
        family: Family,
        device: torch.device,
        dtype: torch.dtype,
        processes: Processes,
        note: Callable[[str], None],
    ):
        self.predictor = Predictor(
            family,
            dtype,
            processes=processes.count,
            local_processes=processes.local_count,
            on_gpu=device.type == "cuda",
            graphs=room_for_graphs(device),
        )
        self.device, self.processes, self.note = device, processes, note
        self.auto = False

    def predict(self, config: Config) -> Config:
        """Prints the predicted memory. Returns `config` with `low_memory` and `card` expanded into their settings and
        `policy.micro_batch` "auto" replaced by the largest that is predicted to fit.

        Raises UserError if nothing makes it fit on the card.
        """
        config = self._for_card(with_low_memory(config))
        free, chosen = self.free_bytes(), ""
        self.auto = config.policy.micro_batch == "auto"
        if self.auto:
            training = MemoryLine.predicted(self.predictor, config)
            most = training.largest(free - self._headroom())
            if self.device.type == "cpu":
                most = min(training.largest(CPU_SHARE * free), MOST_ON_A_CPU)
            config = self._with_micro_batch(config, max(most, 1))
            chosen = f", with micro-batches of {in_groups(config.policy.micro_batch_size, config.rollout.group_size)}"
        prediction = self.predictor.predict(config, config.policy.micro_batch_size)
        self.note(prediction.line() + chosen)
        if prediction.peak > free:
            self.note(f"that is more than the {readable(free)} that are free. {self.advice(config, None)}")
        return config

    def _for_card(self, config: Config) -> Config:
        """`config` with what makes it fit on its card, which has no further meaning then: a resumed run keeps that."""
        if config.card is None:
            return config
        if config.card == "auto":
            if self.device.type != "cuda":
                raise UserError("card auto: this run is on a CPU; name a card's memory, as --card 24GB")
            predictor, available = self.predictor, self.free_bytes() - self._headroom()
            available = min(self.processes.gather(int(available), "the memory of the cards"))
        else:
            predictor, available = on_card(self.predictor, card_bytes(config.card))
        plan = plan_card(predictor, config, available)
        for line in plan.lines():
            self.note(f"card {config.card}: {line}")
        policy = plan.config.policy
        if config.card == "auto":
            policy = replace(policy, micro_batch="auto")  # to be measured
        return replace(plan.config, card=None, policy=policy)

    def predicted_bytes(self, config: Config) -> int:
        """Predicted for `config` at its peak, once the micro-batch is chosen."""
        return self.predictor.predict(config, config.policy.micro_batch_size).peak

    def measure(self, config: Config, models: PolicyModels) -> Config:
        """`config` with the largest micro-batch that fits this GPU, by two measured steps.

        On a CPU, `config` is returned unchanged. With sharded weights too, since a process that ran out of memory would
        leave the others waiting.

        Raises UserError if not even one sample fits.
        """
        if not self.auto or self.device.type != "cuda" or config.distributed.shard != "none":
            return config
        training = self._measured(config, models)
        available = self.free_bytes() - self._to_come(config) - self._headroom()
        most = training.largest(available)
        if most == 0:
            raise UserError(
                f"policy.micro_batch auto: a sample needs {readable(training.per_sample)} in training and "
                f"{readable(max(available, 0))} are left. {self.advice(config, 'train')}"
            )
        config = self._with_micro_batch(config, most)
        self.note(
            f"micro-batches of {in_groups(config.policy.micro_batch_size, config.rollout.group_size)}: a sample takes "
            f"{readable(training.per_sample)} by measurement, {readable(available)} are left, so up to {most} fit"
        )
        return config

    def _measured(self, config: Config, models: PolicyModels) -> MemoryLine:
        """A training step's memory from steps of one and of two groups, or of one and two samples if these are many."""
        measured, size = TrainingMemory(models, self.predictor.shape(config)), config.rollout.group_size
        rows = 2 if traits(in_plain_numbers(config, self.predictor.family)).guided_policy else 1
        try:
            for first in (size, 1):
                try:
                    return MemoryLine.through(lambda samples: measured(rows * samples), first, 2 * first)
                except torch.OutOfMemoryError as error:
                    measured.release()
                    if first == 1:
                        raise self.error(error, config, "train", 0) from None
        finally:
            measured.release()
        raise AssertionError("the loop returns or raises")

    def error(self, error: torch.OutOfMemoryError, config: Config, phase: str | None, iteration: int) -> UserError:
        """The UserError to raise instead of `error` in iteration `iteration`: one line, with what would help most."""
        advice = self.advice(config, phase, begun=iteration > 0)
        return UserError(f"iteration {iteration}, {phase}: {str(error).splitlines()[0]} {advice}")

    def advice(self, config: Config, phase: str | None, *, begun: bool = False) -> str:
        """The settings that would help most, with what each is predicted to save."""
        return sentence(remedies(self.predictor, config, config.policy.micro_batch_size, phase), begun=begun)

    def free_bytes(self) -> int:
        """Memory that this process can still take on the run's device."""
        return free_bytes(self.device)

    def _headroom(self) -> float:
        if self.device.type != "cuda":
            return 0.0
        return headroom(torch.cuda.get_device_properties(self.device).total_memory)

    def _to_come(self, config: Config) -> int:
        """Predicted bytes that a training step finds allocated and that are not there yet beside the models."""
        held = self.predictor.predict(config, 1).held
        # Not what the decoder's stream keeps: the allocator takes it back, at less than what smaller batches cost.
        return sum(held.get(name, 0) for name in MADE_LATER) + self.predictor.inputs(config)

    def _with_micro_batch(self, config: Config, most: int) -> Config:
        size = fit(most, self.predictor.local_samples(config), config.rollout.group_size)
        # All the same, so that a run resumed from process 0's settings computes what this one does.
        size = min(self.processes.gather(size, "the size of micro-batches"))
        return replace(config, policy=replace(config.policy, micro_batch=size))
