"""The paper's claims against what was measured, in words made from the numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.compare.curves import Curve, curve, mean_interval
from benchmarks.compare.systems import SYSTEMS

RESAMPLES = 2000


@dataclass(frozen=True)
class Finding:
    """One claim and what came of it.

    Attributes:
        claim: what the paper says, or what is compared.
        verdict: "holds", "does not hold" or "open": the interval leaves both possible; or who is ahead.
        sentence: what was measured.
        numbers: the same as numbers.
    """

    claim: str
    verdict: str
    sentence: str
    numbers: dict[str, Any]


class Findings:
    """Compares the final runs of the systems.

    Args:
        runs: results of each system's final runs, in the order of the seeds.
        base: scores of the model as it came.
    """

    def __init__(self, runs: Mapping[str, Sequence[Mapping[str, Any]]], base: Mapping[str, Any]):
        self.runs, self.base = runs, base

    def all(self) -> list[Finding]:
        """Every claim whose systems were compared."""
        claims = [
            (("dgpo", "flow-grpo"), self.speed),
            (("dgpo", "dgpo-offline"), lambda: self.better("dgpo", "dgpo-offline", "online data beat offline data")),
            (("dpo", "dpo-offline"), lambda: self.better("dpo", "dpo-offline", "and so it is for Diffusion-DPO")),
            (("dgpo", "dpo"), lambda: self.better("dgpo", "dpo", "groups beat pairs, online")),
            (
                ("dgpo-offline", "dpo-offline"),
                lambda: self.better("dgpo-offline", "dpo-offline", "groups beat pairs, offline"),
            ),
            (("dgpo", "dgpo-sde"), lambda: self.better("dgpo", "dgpo-sde", "ODE rollouts beat SDE rollouts")),
            (("dgpo", "dgpo-no-clip"), lambda: self.quality("dgpo", "dgpo-no-clip")),
            (("dgpo-high-noise", "dgpo-all-noise"), lambda: self.quality("dgpo-high-noise", "dgpo-all-noise")),
        ]
        return [find() for systems, find in claims if all(name in self.runs for name in systems)]

    def speed(self) -> Finding:
        """How much sooner DGPO is where Flow-GRPO is best."""
        claim = "DGPO reaches Flow-GRPO's best reward many times sooner (the paper: about 20 times)"
        dgpo, flow = self._curve("dgpo"), self._curve("flow-grpo")
        theirs_s, level = flow.best()
        ours_s = dgpo.reaches(level)
        numbers: dict[str, Any] = {"level": level, "flow_grpo_s": theirs_s, "dgpo_s": ours_s}
        came = self.base["reward_mean"]
        start = f"Flow-GRPO's best mean reward is {level:.3f} (the base: {came:.3f}), after {theirs_s:.0f} s"
        if level <= came:
            return Finding(claim, "open", f"{start}: no better than the base, so there is nothing to reach.", numbers)
        if ours_s is None:
            return Finding(claim, "does not hold", f"{start}. DGPO did not reach it in {dgpo.x[-1]:.0f} s.", numbers)
        spent = ("training_s", "training_wall_s", "trained_images")
        ratio, on_the_wall, in_images = (self._ratio(name) for name in spent)
        low, high = self._ratio_interval(dgpo, flow)
        same_time = float(np.interp(dgpo.x[-1], flow.x, flow.mean))
        numbers |= {
            "ratio": ratio,
            "ratio_interval": [low, high],
            "ratio_on_the_wall": on_the_wall,
            "ratio_in_images": in_images,
            "flow_grpo_after_dgpos_time": same_time,
        }
        verdict = "holds" if low > 1 else "does not hold" if high < 1 else "open"
        return Finding(
            claim,
            verdict,
            f"{start}. DGPO is there after {ours_s:.0f} s: {ratio:.1f} times sooner "
            f"(95 % of resampled seeds: {low:.1f} to {high:.1f}), {on_the_wall:.1f} times by seconds on the wall, and "
            f"from {in_images:.1f} times fewer images. After DGPO's {dgpo.x[-1]:.0f} s, where DGPO has "
            f"{dgpo.mean[-1]:.3f}, Flow-GRPO has {same_time:.3f}.",
            numbers,
        )

    def better(self, first: str, second: str, claim: str) -> Finding:
        """Whether `first` ends with more reward than `second`, seed by seed."""
        difference, half = self._difference(first, second, "reward_mean")
        means = [mean_interval(self._last(name, "reward_mean"))[0] for name in (first, second)]
        level, theirs_s = self._curve(second).best()[::-1]
        ours_s = self._curve(first).reaches(level)
        when = f"after {ours_s:.0f} s" if ours_s is not None else f"not within {self._seconds(first):.0f} s"
        ours, theirs = SYSTEMS[first].label, SYSTEMS[second].label
        sentence = (
            f"{ours} ends at {means[0]:.3f}, {theirs} at {means[1]:.3f}: a difference of "
            f"{signed(difference, half, 3)}. {theirs} is best after {theirs_s:.0f} s; {ours} has as much {when}."
        )
        numbers = {"difference": difference, "half": half, "best_of_second_s": theirs_s, "first_reaches_it_s": ours_s}
        return Finding(claim, _verdict(difference, half), sentence, numbers)

    def quality(self, clipped: str, whole: str) -> Finding:
        """Whether the timestep clip keeps pictures nearer to real ones."""
        worse, half = self._difference(whole, clipped, "patch_distance")
        reward, reward_half = self._difference(clipped, whole, "reward_mean")
        sharper = self._difference(clipped, whole, "sharpness")
        signs = [[run["out_of_task"]["signs"] for run in self.runs[of]] for of in (clipped, whole)]
        read = mean_interval(np.subtract(*signs))
        with_clip, without = (mean_interval(self._last(name, "patch_distance"))[0] for name in (clipped, whole))
        sentence = (
            f"The patch distance, {self.base['patch_distance']:.2f} for the base, ends at {with_clip:.2f} with the "
            f"clip and {without:.2f} without: {signed(worse, half, 2)} grey levels without it. With the clip, the "
            f"steepest edges are {signed(*sharper, 1)} grey levels steeper, the share of signs that are read is "
            f"{signed(*read, 3)} higher, and the reward {signed(reward, reward_half, 3)}."
        )
        numbers = {
            "patch_distance_difference": worse,
            "half": half,
            "reward_difference": reward,
            "reward_half": reward_half,
            "sharpness_difference": sharper,
            "signs_difference": read,
        }
        return Finding("the timestep clip protects image quality", _verdict(worse, half), sentence, numbers)

    def _ratio(self, spent: str) -> float:
        ratio = _times_sooner(self._curve("flow-grpo", spent), self._curve("dgpo", spent))
        return ratio if ratio is not None else float("nan")

    def _curve(self, system: str, spent: str = "training_s") -> Curve:
        runs = self.runs[system]
        until = self._seconds(system) if spent == "training_s" else min(run["points"][-1][spent] for run in runs)
        return curve(runs, self.base, "reward_mean", spent, until)

    def _seconds(self, system: str) -> float:
        return self.runs[system][0]["run"]["seconds"]

    def _last(self, system: str, measure: str) -> list[float]:
        return [run["points"][-1][measure] for run in self.runs[system]]

    def _difference(self, first: str, second: str, measure: str) -> tuple[float, float]:
        """Mean of first − second over the seeds, which the systems share, and half its interval."""
        return mean_interval(np.subtract(self._last(first, measure), self._last(second, measure)))

    def _ratio_interval(self, dgpo: Curve, flow: Curve) -> tuple[float, float]:
        rng, ratios = np.random.default_rng(0), []
        for _ in range(RESAMPLES):
            ratios.append(_times_sooner(flow.resampled(rng), dgpo.resampled(rng)) or 0.0)
        low, high = np.quantile(ratios, [0.025, 0.975])
        return float(low), float(high)


def _times_sooner(theirs: Curve, ours: Curve) -> float | None:
    """What was spent where the mean of `theirs` is highest, over what `ours` has spent where it first is as high; None
    where it never is."""
    spent, level = theirs.best()
    reached = ours.reaches(level)
    return spent / max(reached, ours.x[1]) if reached is not None else None  # the grid knows nothing below one step


def _verdict(difference: float, half: float) -> str:
    if not difference - half > 0 and not difference + half < 0:
        return "open"
    return "holds" if difference > 0 else "does not hold"


def signed(difference: float, half: float, digits: int) -> str:
    """The difference with its sign, and half the width of its interval if there is one."""
    return f"{difference:+.{digits}f}" + (f" ± {half:.{digits}f}" if half == half else "")
