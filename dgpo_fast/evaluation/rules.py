"""Signs of reward hacking: which thresholds a look has passed, and when that is an alarm.

Everything is a function of the looks' metrics, so that a resumed run warns as one that was never stopped.
"""

from collections.abc import Sequence

from dgpo_fast.config.watch_options import Watch
from dgpo_fast.records import Metrics
from dgpo_fast.wording import number

CHANGES = {"edge_density": "edges", "brightness": "brightness", "saturation": "saturation"}
"""Statistics that may neither fall nor rise too far, with their settings."""
LOSSES = {"colour_entropy": "colours", "diversity": "diversity"}
"""Statistics that may not fall too far."""
GAIN = "_gain_ci95"
"""Ends the name of the interval of a paired difference from the base."""


def passed(look: Metrics, settings: Watch) -> dict[str, str]:
    """The rules whose thresholds a look has passed, each with a phrase that has the number.

    Args:
        look: a line of `metrics.jsonl` with the metrics of a look (`evaluation/watch.py`).
        settings: thresholds.
    """
    found: dict[str, str] = {}

    def note(rule: str, is_over: bool, value: float, of: str) -> None:
        if is_over:
            found[rule] = f"{rule.replace('_', ' ')} {number(value, 2)} {of}"

    norm = look.get("norm_ratio")
    if settings.norm_ratio is not None and norm is not None:
        note("norm_ratio", norm > settings.norm_ratio, norm, f"(above {settings.norm_ratio:g})")
    for name, setting in {**CHANGES, **LOSSES}.items():
        change, ratio = getattr(settings, setting), look.get(f"look/{name}_ratio")
        if change is not None and ratio is not None:
            is_over = ratio < 1 - change or (name in CHANGES and ratio > 1 / (1 - change))
            note(name, is_over, ratio, "times the base's")
    if settings.grid is not None:
        note("grid", look["look/grid_ratio"] > settings.grid, look["look/grid_ratio"], "times the base's")
    if settings.dark is not None:
        growth = look["look/dark_share"] - look["look/dark_share_base"]
        note(
            "dark_share",
            growth > settings.dark,
            look["look/dark_share"],
            f"(the base's: {look['look/dark_share_base']:.2f})",
        )
    if (look["look/reward_gain_mean"] or 0) > 0:
        for name in [name for name in look if name.startswith("look/watch/") and name.endswith(GAIN)]:
            reward, high = name.removeprefix("look/watch/").removesuffix(GAIN), look[name][1]
            mean = look[name.removesuffix("_ci95") + "_mean"]
            note(f"reward {reward}", high is not None and high < 0, mean, "below the base's, with its interval")
    return found


def alarms(looks: Sequence[Metrics], settings: Watch) -> dict[str, str]:
    """The rules that the last `settings.in_a_row` looks have passed, as `passed` of the last one."""
    last = [passed(look, settings) for look in looks[-settings.in_a_row :]]
    if len(last) < settings.in_a_row:
        return {}
    return {rule: phrase for rule, phrase in last[-1].items() if all(rule in one for one in last)}


def last_good(looks: Sequence[Metrics], settings: Watch) -> int:
    """The iteration of the last look that has passed no threshold; 0, the base model, if there is none."""
    good = (look["iteration"] for look in reversed(looks) if not passed(look, settings))
    return next(good, 0)
