"""Which GPUs a run fits on, by prediction."""

from dataclasses import dataclass

import torch

from dgpo_fast.config.bounds import card_bytes
from dgpo_fast.config.options import Config
from dgpo_fast.errors import UserError
from dgpo_fast.memory.advice import remedies
from dgpo_fast.memory.card import CardPlan, on_card, plan_card, with_low_memory
from dgpo_fast.memory.micro_batch import MemoryLine, fit
from dgpo_fast.memory.predict import Prediction, Predictor, readable
from dgpo_fast.models.family import Family

CARDS_GB = (16, 24, 32, 48, 80, 141)
"""Memory of common cards; their GiB are about the same number."""


@dataclass(frozen=True)
class Fit:
    """A run on a card.

    Attributes:
        card_gb: the card's memory.
        micro_batch: of the run; if "auto", the largest that fits.
        prediction: the memory that it needs.
        fits: whether it leaves the same headroom as `policy.micro_batch` "auto".
        remedies: settings that would save most, if it does not.
    """

    card_gb: int
    micro_batch: int
    prediction: Prediction
    fits: bool
    remedies: tuple[str, ...]

    def cells(self) -> list[str]:
        """Card, micro-batch, peak, and whether it fits, in words."""
        at_its_peak = f"{readable(self.prediction.peak)} in {self.prediction.peak_phase}"
        helpful = f"; these save most: {', '.join(self.remedies)}" if self.remedies else ""
        said = "yes" if self.fits else f"no{helpful}"
        return [f"{self.card_gb} GB", str(self.micro_batch), at_its_peak, said]


def fit_on(config: Config, family: Family, dtype: torch.dtype, card_gb: int, processes: int = 1) -> Fit:
    """`config` on a card of `card_gb`, one of `processes` on machines of eight."""
    config = with_low_memory(config)
    predictor, available = _on(family, dtype, card_gb * 2**30, processes)
    micro_batch = config.policy.micro_batch
    if micro_batch == "auto":
        training = MemoryLine.predicted(predictor, config)
        most = max(training.largest(available), 1)
        micro_batch = fit(most, predictor.local_samples(config), config.rollout.group_size)
    prediction = predictor.predict(config, micro_batch)
    fits = prediction.peak <= available
    helpful = () if fits else tuple(remedy.setting for remedy in remedies(predictor, config, micro_batch, None))
    return Fit(card_gb, micro_batch, prediction, fits, helpful)


def plan_on(config: Config, family: Family, dtype: torch.dtype, processes: int = 1) -> CardPlan:
    """What `config` takes to fit on its card, one of `processes` as above.

    Raises UserError if nothing is enough, or if the card is the one that is here, which is none.
    """
    if config.card is None or config.card == "auto":
        raise UserError("card auto: nothing is loaded here; name a card's memory, as --card 24GB")
    predictor, available = _on(family, dtype, card_bytes(config.card), processes)
    return plan_card(predictor, with_low_memory(config), available)


def _on(family: Family, dtype: torch.dtype, total: int, processes: int) -> tuple[Predictor, int]:
    alone = Predictor(family, dtype, processes=processes, local_processes=min(processes, 8))
    return on_card(alone, total)
