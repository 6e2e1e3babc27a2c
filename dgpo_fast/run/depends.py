"""What a run, a folder of groups or an evaluation depends on, and whether it has changed in the meantime.

Settings name prompts, a model and rewards; the files behind these names may change. What is kept on the disk therefore
has a fingerprint of each beside it, by the names below. A value is anything that JSON keeps as it is.
"""

from collections.abc import Mapping

from dgpo_fast.config.reading import flat_dict
from dgpo_fast.config.resuming import LEARNS, effect
from dgpo_fast.records import JsonObject

TRAINING_PROMPTS, EVALUATION_PROMPTS, WEIGHTS = "training prompts", "evaluation prompts", "model's weights"
STARTING_LORA = "starting LoRA's weights"
CALLED = {
    "prompts": TRAINING_PROMPTS,
    "model": WEIGHTS,
    "prompts_sha256": "prompts",
    "weights_sha256": WEIGHTS,
    "lora_sha256": "LoRA",
}
"""What messages call the names that folders of groups and evaluations have for them."""


def changed(
    before: Mapping[str, object], now: Mapping[str, object], earlier: Mapping[str, object] | None = None
) -> list[str]:
    """The names in `before` whose values are others `now`. The order of a list does not count.

    Args:
        before: what was kept.
        now: the same names, as this version finds them.
        earlier: what earlier versions would have kept in their place, for names whose values are made otherwise today.
    """
    return [
        name
        for name, kept in before.items()
        if not _same(kept, now.get(name)) and not (earlier and name in earlier and _same(kept, earlier[name]))
    ]


def _same(one: object, other: object) -> bool:
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return sorted(map(repr, one)) == sorted(map(repr, other))
    return one == other


def change(where: object, names: list[str], since: str, remedy: str) -> str:
    """The line that says what has changed.

    Args:
        where: what starts the line, as a folder or an option.
        names: as `changed` gives them.
        since: what happened then, as in "it was made".
        remedy: what to do, or what is done.
    """
    called = [CALLED.get(name, name) for name in names]
    listed = " and ".join(name if "." in name and " " not in name else f"the {name}" for name in called)
    return f"{where}: {listed} changed since {since}: {remedy}"


OTHERWISE = {
    "processes": "sums over processes have another order",
    "dtype": "forwards are rounded to another precision",
    "device": "another device's kernels round otherwise",
}
"""Why a resumed run is not equal to an undisturbed one in every bit."""


def rounding_note(before: JsonObject, now: JsonObject) -> str:
    """What goes on to the last bit on another device, in another precision or on other processes, and what cannot;
    empty if a run is resumed as it was. Arguments as of `told_changes`."""
    was, found = ({**about, "device": (about.get("engine") or {}).get("device")} for about in (before, now))
    differs = [name for name in OTHERWISE if None is not was.get(name) != found[name]]
    reasons = [OTHERWISE[name] for name in differs]
    precision = flat_dict(now["config"]).get("policy.base_precision", "same")
    if precision != "same" and {"dtype", "device"} & set(differs):
        reasons.append(f"the base is rounded to {precision} anew")
    kept = "weights, averages, optimizer states and draws of prompts and noise go on to the last bit"
    return f"{kept}; what follows cannot: {', '.join(reasons)}" if reasons else ""


def told_changes(before: JsonObject, now: JsonObject) -> list[str]:
    """What is not the same as when a checkpoint was written, and may show in results: code, machine and settings.

    Args:
        before: what the checkpoint's manifest says of the run. Earlier versions say less.
        now: the same of this start.
    """
    pairs = [
        ("the code", before.get("code"), now["code"]),
        ("the number of processes", before.get("processes"), now["processes"]),
        ("the precision", before.get("dtype"), now["dtype"]),
    ]
    measured = before.get("engine") or {}
    pairs += [
        ("the device" if name == "device" else f"the engine's {name.replace('_', ' ')}", measured.get(name), value)
        for name, value in now["engine"].items()
    ]
    settings, old = flat_dict(now["config"]), flat_dict(before.get("config") or {})
    pairs += [
        (name, old.get(name), value)
        for name, value in settings.items()
        if name != "iterations" and effect(name) == LEARNS
    ]
    return [f"{name} ({was} → {found})" for name, was, found in pairs if was is not None and was != found]
