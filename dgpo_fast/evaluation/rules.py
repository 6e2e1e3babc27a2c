"""Signs of reward hacking: how far a look has come towards the threshold of each, and when that is an alarm.

Everything is a function of the looks' metrics, so that a resumed run warns as one that was never stopped.
"""

from collections.abc import Mapping, Sequence
from math import hypot, log
from typing import NamedTuple

from dgpo_fast.config.watch_options import Watch
from dgpo_fast.records import Metrics
from dgpo_fast.wording import number

CHANGES = {"edge_density": "edges", "brightness": "brightness", "saturation": "saturation"}
"""Statistics that may neither fall nor rise too far, with their settings."""
LOSSES = {"colour_entropy": "colours", "diversity": "diversity"}
"""Statistics that may not fall too far."""
GAIN = "_gain_ci95"
"""Ends the name of the interval of a paired difference from the base."""
INTERVALS = 2
"""Half widths of its interval that a reward beside the trained one may fall below the base's."""
SMALLEST_RATIO = 1e-9


class Sign(NamedTuple):
    """One sign of a look: the share of its threshold that it has reached, 0 like the base, and a phrase."""

    share: float
    phrase: str


def signs(look: Metrics, settings: Watch) -> dict[str, Sign]:
    """The signs of a look, by their rules. Ratios are measured on a logarithmic scale.

    Args:
        look: a line of `metrics.jsonl` with the metrics of a look (`evaluation/watch.py`).
        settings: thresholds.
    """
    found: dict[str, Sign] = {}

    def note(rule: str, share: float, value: float, of: str) -> None:
        found[rule] = Sign(max(share, 0.0), f"{rule.replace('_', ' ')} {number(value, 2)} {of}")

    norm = look.get("norm_ratio")
    if settings.norm_ratio is not None and norm is not None:
        note("norm_ratio", (norm - 1) / (settings.norm_ratio - 1), norm, f"(limit {settings.norm_ratio:g})")
    for name, setting in {**CHANGES, **LOSSES}.items():
        change, ratio = getattr(settings, setting), look.get(f"look/{name}_ratio")
        if change is not None and ratio is not None:
            share = log(max(ratio, SMALLEST_RATIO)) / log(1 - change)
            note(name, abs(share) if name in CHANGES else share, ratio, "times the base's")
    if settings.grid is not None:
        grid = look["look/grid_ratio"]
        note("grid", log(max(grid, SMALLEST_RATIO)) / log(settings.grid), grid, "times the base's")
    if settings.dark is not None:
        dark, base = look["look/dark_share"], look["look/dark_share_base"]
        note("dark_share", (dark - base) / settings.dark, dark, f"(the base's: {base:.2f})")
    if (look["look/reward_gain_mean"] or 0) > 0:
        for name in [name for name in look if name.startswith("look/watch/") and name.endswith(GAIN)]:
            reward, high = name.removeprefix("look/watch/").removesuffix(GAIN), look[name][1]
            mean = look[name.removesuffix("_ci95") + "_mean"]
            if high is not None and high > mean:
                note(f"reward {reward}", -mean / (INTERVALS * (high - mean)), mean, "below the base's")
    return found


def together(found: Mapping[str, Sign]) -> tuple[float, list[Sign]]:
    """The root of the sum of the squares of signs, and these signs, the largest first.

    The grid, which is above the base's in healthy runs too, does not count, and of rewards, which fall together, the
    worst does.
    """
    rewards = sorted(sign for rule, sign in found.items() if rule.startswith("reward "))
    others = [sign for rule, sign in found.items() if rule != "grid" and not rule.startswith("reward ")]
    counted = sorted([*others, *rewards[-1:]], reverse=True)
    return hypot(*(sign.share for sign in counted)), counted


def passed(look: Metrics, settings: Watch) -> dict[str, str]:
    """The rules whose thresholds a look has passed, each with a phrase that has the number; as `signs` takes them."""
    found = signs(look, settings)
    over = {rule: sign.phrase for rule, sign in found.items() if sign.share > 1}
    total, largest = together(found)
    if settings.together is not None and total > settings.together:
        most = "" if over else f", most of all {' and '.join(sign.phrase for sign in largest[:2])}"
        over["together"] = f"signs together {number(total, 2)} (limit {settings.together:g}){most}"
    return over


def alarms(looks: Sequence[Metrics], settings: Watch) -> dict[str, str]:
    """The rules that the last `settings.in_a_row` looks have passed, as `passed` of the last one."""
    last = [passed(look, settings) for look in looks[-settings.in_a_row :]]
    if len(last) < settings.in_a_row:
        return {}
    return {rule: phrase for rule, phrase in last[-1].items() if all(rule in one for one in last)}


def unconfirmed(looks: Sequence[Metrics], settings: Watch) -> bool:
    """Whether the last look has passed a threshold that fewer looks than `settings.in_a_row` have passed."""
    return bool(looks) and bool(passed(looks[-1], settings).keys() - alarms(looks, settings).keys())


def last_good(looks: Sequence[Metrics], settings: Watch) -> int:
    """The iteration of the last look that has passed no threshold; 0, the base model, if there is none."""
    good = (look["iteration"] for look in reversed(looks) if not passed(look, settings))
    return next(good, 0)
