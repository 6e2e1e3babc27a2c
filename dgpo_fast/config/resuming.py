"""What a resumed run may change, and what each such setting changes in its results."""

LEARNS = "what is learned from then on"
ROUNDS = "rounding: the last digits of results"
NOTHING = "no result"
MAY_CHANGE = {
    "iterations": LEARNS,
    "optimizer.": LEARNS,
    "engine.rollout_precision": LEARNS,
    "device": ROUNDS,
    "precision": ROUNDS,
    "engine.": ROUNDS,
    "distributed.": ROUNDS,
    "rollout.batch_size": ROUNDS,
    "policy.micro_batch": ROUNDS,
    "policy.behaviour": ROUNDS,
    "ema.offload": ROUNDS,
    "low_memory": ROUNDS,
    "checkpoint.": NOTHING,
    "log.": NOTHING,
    "evaluation.every": NOTHING,
    "watch.": NOTHING,
    "max_lost_iterations": NOTHING,
    "reward_workers": NOTHING,
    "reward_deadline_s": NOTHING,
    "prompt_cache": NOTHING,
    "prompt_cache_gib": NOTHING,
}
"""Settings, and groups of settings, that a resumed run may change, with what they change. Anything else would compare
before and after of different things. A setting with a line of its own is not meant by its group's."""
MUST_STAY = ("optimizer.name", "watch.prompts", "watch.images_per_prompt", "watch.rewards")
"""The optimizer's state is another's; looks are compared with earlier ones."""


SAME_STATE = ("adamw8bit", "paged_adamw8bit")
"""Optimizers whose states are one another's."""


def may_change(setting: str, before: object, after: object) -> bool:
    """Whether a resumed run may change `setting`, given by its dotted name, in this way."""
    exchanged = setting == "optimizer.name" and {before, after} <= set(SAME_STATE)
    return exchanged or effect(setting) is not None


def effect(setting: str) -> str | None:
    """What changes if a resumed run changes `setting`, given by its dotted name; None if it cannot be changed."""
    group = setting.partition(".")[0] + "."
    return None if setting in MUST_STAY else MAY_CHANGE.get(setting, MAY_CHANGE.get(group))


def listed(effect: str | None = None) -> str:
    """The settings that may change, or those of them with `effect`, as a phrase: groups as `engine.*`."""
    names = [name for name, what in MAY_CHANGE.items() if effect in (None, what)]
    phrases = []
    for name in names:
        phrase = f"`{name}*`" if name.endswith(".") else f"`{name}`"
        kept = " and ".join(f"`{one}`" for one in MUST_STAY if one.startswith(name))
        phrases.append(f"{phrase} but {kept}" if kept else phrase)
    return ", ".join(phrases)


def markdown_table() -> str:
    """The table of docs/recipes.md."""
    rows = [f"| {effect} | {listed(effect)} |" for effect in (LEARNS, ROUNDS, NOTHING)]
    return "\n".join(["| changes | settings |", "| --- | --- |", *rows]) + "\n"
