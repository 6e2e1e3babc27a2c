"""Settings that would help if memory runs out, by prediction."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dgpo_fast.config.options import Config
from dgpo_fast.memory.card import SAVINGS
from dgpo_fast.memory.predict import Predictor, readable
from dgpo_fast.records import JsonObject

SHOWN = 3
WORTHWHILE = 0.005
"""Share of the needed memory: settings that save less are not named."""
NAMED = {
    "policy.behaviour": False,
    "engine.checkpointing": False,
    "engine.decode_batch": False,
    "ema.offload": False,
    "optimizer.name": True,
}
"""Of `card.SAVINGS`, those that are named, and whether each needs a new run."""
PREDICTED_PHASE = {"rollout": "rollout", "decode": "decoding", "train": "training", "optimizer": "optimizer"}


@dataclass(frozen=True)
class Remedy:
    """A setting that saves memory.

    Attributes:
        setting: as the command line takes it.
        saved: predicted bytes less.
        new_run: whether it needs a new run.
    """

    setting: str
    saved: int
    new_run: bool


def remedies(predictor: Predictor, config: Config, micro_batch: int, phase: str | None) -> list[Remedy]:
    """The settings that save most, largest first.

    Args:
        predictor: of the run's model.
        config: the run's settings.
        micro_batch: samples of a micro-batch.
        phase: the phase of the iteration that ran out of memory; None for the one that is predicted to need most.
    """
    prediction = predictor.predict(config, micro_batch)
    name = PREDICTED_PHASE.get(phase or "", prediction.peak_phase)
    now = prediction.at(name)
    found = [
        Remedy(setting, now - predictor.predict(other, size).at(name), new_run)
        for setting, other, size, new_run in _alternatives(config, micro_batch, predictor.processes)
    ]
    helpful = [remedy for remedy in found if remedy.saved > WORTHWHILE * now]
    return sorted(helpful, key=lambda remedy: -remedy.saved)[:SHOWN]


def sentence(found: list[Remedy], *, begun: bool) -> str:
    """The remedies in words, for a run that has `begun` or for one that has not."""
    if not found:
        return "no setting is predicted to save much: a smaller model or --rollout.resolution is needed"
    notes = [" in a new run" if begun and remedy.new_run else "" for remedy in found]
    listed = ", ".join(f"{r.setting} ({readable(r.saved)}{note})" for r, note in zip(found, notes, strict=True))
    start = "Use --resume with one of these" if begun else "Start with one of these"
    return f"{start}, with what each is predicted to save: {listed}"


def _alternatives(config: Config, micro_batch: int, processes: int) -> Iterator[tuple[str, Config, int, bool]]:
    """Setting, the configuration with it, its micro-batch, and whether it needs a new run."""
    policy, rollout, size = config.policy, config.rollout, config.rollout.group_size
    smaller = micro_batch // 2 // size * size or micro_batch // 2
    if smaller:
        yield f"--policy.micro-batch {smaller}", config, smaller, False
    changes: list[tuple[str, JsonObject, bool]] = []
    if rollout.batch_size > 1:
        half = rollout.batch_size // 2
        changes.append((f"--rollout.batch-size {half}", {"rollout": replace(rollout, batch_size=half)}, False))
    whole = config.distributed.shard == "none"
    for saving in SAVINGS:
        in_new_run = NAMED.get(saving.setting)
        if in_new_run is not None and (whole or saving.exact) and (other := saving.applied(config)) is not None:
            yield str(saving), other, micro_batch, in_new_run
    if processes > 1 and whole and policy.train == "full" and config.optimizer.name == "adamw":
        shard = {"distributed": replace(config.distributed, shard="full")}
        changes.append(("--distributed.shard full", shard, False))
    if policy.train == "full" and whole:
        changes.append(("--policy.train lora", {"policy": replace(policy, train="lora", weights="auto")}, True))
    for setting, change, new_run in changes:
        yield setting, replace(config, **change), micro_batch, new_run
