"""The questions of the comparison: which systems answer each, on what scale, and in what time."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from benchmarks.compare.systems import Scale


@dataclass(frozen=True)
class Study:
    """One question.

    Attributes:
        name: as files and settings call it.
        question: in words.
        systems: that are compared; the first one is compared with each other.
        minutes: on the wall, of two idle CPU cores, by default.
        trials: settings tried for each system, by default.
        patience: how many times as long as the others' a system's runs are, where it takes long to show what it can
            reach.
        steps: of the rollouts, if not the scale's.
        evaluation_steps: of the evaluations, if not those of the rollouts.
        claims: whether claims of the paper are judged; else the first system is compared with each other one, at equal
            seconds, forwards and distance from the base.
    """

    name: str
    question: str
    systems: tuple[str, ...]
    minutes: float
    trials: int = 5
    patience: Mapping[str, float] = field(default_factory=dict)
    steps: int | None = None
    evaluation_steps: int | None = None
    claims: bool = True

    def scaled(self, scale: Scale) -> Scale:
        """`scale` with the study's steps."""
        return replace(scale, steps=self.steps or scale.steps, evaluation_steps=self.evaluation_steps)


STUDIES = {
    study.name: study
    for study in (
        Study(
            "rivals",
            "which objective learns most from equal compute",
            ("dgpo", "nft", "awm", "ram", "crd", "flow-grpo-fast", "flow-grpo", "dpo"),
            minutes=150,
            trials=7,
            claims=False,
        ),
        Study(
            "paper",
            "the paper's own comparisons",
            ("dgpo", "dgpo-offline", "dpo", "dpo-offline", "flow-grpo", "dgpo-sde", "dgpo-no-clip"),
            minutes=110,
            patience={"flow-grpo": 3.0},
        ),
        Study("four-steps", "ODE against SDE rollouts of 4 steps", ("dgpo", "dgpo-sde"), minutes=40, steps=4),
        Study("five-steps", "ODE against SDE rollouts of 5 steps", ("dgpo", "dgpo-sde"), minutes=40, steps=5),
        Study(
            "clip",
            "the timestep clip at training levels off the grid, on pictures of 4 steps, seen with 16",
            ("dgpo-high-noise", "dgpo-all-noise"),
            minutes=40,
            steps=4,
            evaluation_steps=16,
        ),
        Study(
            "part-of-group",
            "training on part of each group",
            ("dgpo", "dgpo-half", "dgpo-quarter", "dgpo-half-drawn"),
            minutes=75,
            claims=False,
        ),
    )
}
