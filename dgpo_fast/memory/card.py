"""Which settings make a run fit on a card: exact ones first, then those that change what is learned.

`--card` takes as few as are needed, `--low-memory` all exact ones. A smaller size of images is proposed, never taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dgpo_fast.config.options import Config
from dgpo_fast.engine.choices import GRAPH_MEMORY_GIB
from dgpo_fast.errors import UserError
from dgpo_fast.memory.micro_batch import MemoryLine, fit, in_groups
from dgpo_fast.memory.predict import Prediction, Predictor, readable
from dgpo_fast.models.family import Family
from dgpo_fast.models.own_settings import image_size

HEADROOM_SHARE, HEADROOM_BYTES = 0.05, 2**30
"""Share of a GPU's memory that is left for fragmentation and workspaces."""
MICRO_BATCH = "policy.micro_batch"
SMALLER = (0.75, 0.5)
"""Sides of images that are proposed, as shares of the asked ones."""


def headroom(total: int) -> float:
    """Bytes that stay free of a GPU's `total`."""
    return HEADROOM_BYTES + HEADROOM_SHARE * total


def on_card(predictor: Predictor, total: int) -> tuple[Predictor, int]:
    """`predictor` for a GPU with `total` bytes, and the bytes that a run may use there."""
    return predictor.on_a_gpu(graphs=total >= GRAPH_MEMORY_GIB * 2**30), int(total - headroom(total))


@dataclass(frozen=True)
class Saving:
    """A way to need less memory.

    Attributes:
        costs: what it costs, in words.
        setting: its dotted name, of a group; empty for micro-batches that do not hold a group.
        value: of the setting.
        exact: whether what is learned stays the same but for rounding.
    """

    costs: str
    setting: str = ""
    value: str | int | bool = ""
    exact: bool = True

    def applied(self, config: Config) -> Config | None:
        """`config` with it; None if it changes nothing there, or does not go with the other settings."""
        if not self.setting:
            return config
        group, _, name = self.setting.partition(".")
        before = getattr(getattr(config, group), name)
        is_less = type(self.value) is int and type(before) is int and before <= self.value
        if before == self.value or is_less or (name == "behaviour" and config.policy.train == "full"):
            return None
        try:
            return _set(config, self.setting, self.value)
        except ValueError:
            return None

    def __str__(self) -> str:
        """As the command line takes it."""
        value = "" if self.value is True else f" {self.value}"
        return f"--{self.setting.replace('_', '-')}{value}" if self.setting else "micro-batches below a group"


BELOW_A_GROUP = Saving("one more forward of the policy")
SAVINGS = (
    Saving("smaller products in rollouts", "rollout.batch_size", 8),
    Saving("images are decoded one at a time", "engine.decode_batch", 1),
    Saving("the host starts each step of a rollout", "engine.cuda_graphs", "off"),
    Saving("the slow average is copied over the bus", "ema.offload", True),
    Saving("no merged copy: forwards of rollouts and θ_old have adapters", "policy.behaviour", "adapter"),
    Saving("one more forward in each backward pass", "engine.checkpointing", "blocks"),
    BELOW_A_GROUP,
    Saving("INEXACT: optimizer states in 8 bits", "optimizer.name", "adamw8bit", exact=False),
    Saving(
        "INEXACT: the base rounded to 8 bits, and widened in each forward", "policy.base_precision", "int8", exact=False
    ),
    Saving(
        "INEXACT: the base rounded to 4 bits, and widened in each forward", "policy.base_precision", "nf4", exact=False
    ),
)
"""The cheapest first."""
EXACT = tuple(saving for saving in SAVINGS if saving.exact)


@dataclass(frozen=True)
class Taken:
    """A saving that is taken.

    Attributes:
        saving: which.
        saves: predicted bytes that the run would need more without it.
    """

    saving: Saving
    saves: int

    def line(self) -> str:
        """For a person."""
        return f"{self.saving} ({self.saving.costs}): saves {readable(self.saves)}"


@dataclass(frozen=True)
class CardPlan:
    """What a run takes to fit.

    Attributes:
        config: its settings; the micro-batch is a number.
        taken: the savings, the cheapest first.
        prediction: the memory that it needs.
        available: bytes that it may use.
        proposed: the largest smaller size of images at which exact savings would do; None if these do, or if none does.
    """

    config: Config
    taken: tuple[Taken, ...]
    prediction: Prediction
    available: int
    proposed: str | None

    def lines(self) -> list[str]:
        """For a person: what was chosen, what each costs, and what is predicted."""
        size, group = self.config.policy.micro_batch_size, self.config.rollout.group_size
        chosen = [one.line() for one in self.taken] or ["nothing: it fits as it is"]
        less = f"--rollout.resolution {self.proposed} is predicted to fit without INEXACT savings"
        return [
            f"{readable(self.available)} may be used. Chosen: {'; '.join(chosen)}",
            f"{self.prediction.line()}, with micro-batches of {in_groups(size, group)}",
            *([less] if self.proposed else []),
        ]


def with_low_memory(config: Config) -> Config:
    """`config` with all exact savings, if `low_memory` is set. What it learns stays the same."""
    if not config.low_memory:
        return config
    return _set(with_savings(config, EXACT), MICRO_BATCH, "auto")


def plan_card(predictor: Predictor, config: Config, available: int) -> CardPlan:
    """The fewest and cheapest of `SAVINGS` with which `config` needs at most `available` bytes.

    Raises UserError if it needs more with all of them.
    """
    found = _cheapest(predictor, config, available, SAVINGS)
    if found is None:
        raise UserError(_nothing_fits(predictor, config, available))
    savings, micro_batch = found
    chosen = with_savings(config, savings)
    prediction = predictor.predict(chosen, micro_batch)
    taken = tuple(
        Taken(saving, _without(predictor, config, savings, saving, micro_batch) - prediction.peak) for saving in savings
    )
    proposed = None if all(saving.exact for saving in savings) else _smaller(predictor, config, available, EXACT)
    return CardPlan(_set(chosen, MICRO_BATCH, micro_batch), taken, prediction, available, proposed)


def _cheapest(
    predictor: Predictor, config: Config, available: int, savings: Sequence[Saving]
) -> tuple[list[Saving], int] | None:
    """Those of `savings` that are needed, and the micro-batch; None if all of them are not enough."""
    taken: list[Saving] = []
    for saving in savings:
        if _micro_batch(predictor, config, available, taken) is not None:
            break
        if saving.applied(with_savings(config, taken)) is not None:
            taken.append(saving)
    if _micro_batch(predictor, config, available, taken) is None:
        return None
    for saving in reversed(taken):  # a later one may have made an earlier one needless
        rest = [one for one in taken if one is not saving]
        if _micro_batch(predictor, config, available, rest) is not None:
            taken = rest
    micro_batch = _micro_batch(predictor, config, available, taken)
    assert micro_batch is not None
    return taken, micro_batch


def _micro_batch(predictor: Predictor, config: Config, available: int, savings: Sequence[Saving]) -> int | None:
    """The largest micro-batch with which `config` and `savings` fit; None if they do not."""
    config = with_savings(config, savings)
    samples, group = predictor.local_samples(config), config.rollout.group_size
    smallest = predictor.predict(config, 1)
    if any(smallest.at(phase) > available for phase in smallest.phases):
        return None  # the other phases do not depend on the micro-batch
    least = 1 if BELOW_A_GROUP in savings else min(group, samples)
    most = max(MemoryLine.predicted(predictor, config).largest(available), least)
    while most >= least:
        size = fit(most, samples, group)
        if predictor.predict(config, size).peak <= available:
            return size
        most = size - 1  # the line through two sizes is not exact: it may also lie above what a group needs
    return None


def _set(config: Config, setting: str, value: str | int | bool) -> Config:
    """`config` with another value of a dotted `setting`. Raises ValueError if others do not go with it."""
    group, _, name = setting.partition(".")
    return replace(config, **{group: replace(getattr(config, group), **{name: value})})


def with_savings(config: Config, savings: Sequence[Saving]) -> Config:
    """`config` with those of `savings` that apply there."""
    for saving in savings:
        config = saving.applied(config) or config
    return config


def _without(predictor: Predictor, config: Config, savings: Sequence[Saving], saving: Saving, micro_batch: int) -> int:
    """The predicted peak without one of `savings`."""
    if saving is BELOW_A_GROUP:
        micro_batch = min(config.rollout.group_size, predictor.local_samples(config))
    return predictor.predict(with_savings(config, [one for one in savings if one is not saving]), micro_batch).peak


def _smaller(predictor: Predictor, config: Config, available: int, savings: Sequence[Saving]) -> str | None:
    """The largest smaller size of images with which `config` fits, if any."""
    for resolution in smaller_sizes(predictor.family, config):
        other = replace(config, rollout=replace(config.rollout, resolution=resolution))
        if _cheapest(predictor, other, available, savings) is not None:
            return resolution
    return None


def smaller_sizes(family: Family, config: Config) -> list[str]:
    """Sizes of images that are worth a try in the place of those asked for."""
    sides = image_size(family, config.rollout.resolution)
    step = family.multiple
    scaled = ([max(int(share * side) // step * step, step) for side in sides] for share in SMALLER)
    return [str(height) if height == width else f"{height}x{width}" for height, width in scaled]


def _nothing_fits(predictor: Predictor, config: Config, available: int) -> str:
    least = predictor.predict(with_savings(config, SAVINGS), 1)
    smaller = _smaller(predictor, config, available, SAVINGS)
    remedy = (
        f"--rollout.resolution {smaller} is predicted to fit" if smaller else "use a larger card or a smaller model"
    )
    return (
        f"card: with all savings, even INEXACT ones, this run needs {readable(least.peak)} in {least.peak_phase}, and "
        f"{readable(available)} may be used; {remedy}"
    )
