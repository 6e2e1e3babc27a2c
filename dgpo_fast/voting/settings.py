"""What `python -m dgpo_fast.vote` asks: its settings, those of drawing, and the command that trains on the votes."""

import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from dgpo_fast.config.bounds import STRICT, Count, PathText
from dgpo_fast.config.command_line import take_option
from dgpo_fast.config.options import Config
from dgpo_fast.config.reading import resolve
from dgpo_fast.config.recipes import get_recipe
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.settings import EvaluationSettings, default_recipe, is_run, read_settings, run_config
from dgpo_fast.prompts import GENERATORS, Prompt, evaluation_prompts, load_prompts, load_run_prompts, with_negative
from dgpo_fast.prompts.files import in_hash_order

OUTPUTS = Path("votes")
JUDGES_ANYTHING = "pickscore"
"""A reward that needs nothing of a prompt but its text."""


@dataclass(kw_only=True, config=STRICT)
class VoteSettings:
    """A page to vote on."""

    ask: Literal["best", "rank", "rate"] = "best"
    """What the page asks at first; it can be changed there. best: which picture is best. rank: an order of all. rate:
    1 to 5 stars for each."""
    groups: Count = 50
    """Number of groups to vote on, each of one prompt. If there are fewer prompts: as many as there are. More can be
    asked for later."""
    group_size: Annotated[int, Field(ge=2, le=9)] = 4
    """Pictures per group, from 2 to 9."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8765
    """Port of the page, which only this machine can reach. 0: any free port."""
    output: PathText | None = None
    """Folder of pictures and votes. None: a folder in votes/, named after the model, the LoRA and the prompts."""


def read_vote_settings(args: list[str]) -> tuple[VoteSettings, EvaluationSettings, Config]:
    """Settings of the page, those of drawing, and the configuration of the run or the recipe that they come from.

    Args:
        args: `RUN_OR_MODEL [--recipe NAME] [--setting value …]`.

    Raises UserError, one line.
    """
    args = list(args)
    given = {one.name: take_option(args, one.name.replace("_", "-")) for one in fields(VoteSettings)}
    own = resolve(VoteSettings(), {name: value for name, value in given.items() if value is not None}, "command line")
    if not args or (args[0].startswith("-") and "--model" not in {arg.partition("=")[0] for arg in args}):
        raise UserError("command line: name a run's folder or a model, as in `python -m dgpo_fast.vote tiny`")
    for name, instead in {"images": "--groups", "images-per-prompt": "--group-size"}.items():
        if take_option(list(args), name) is not None:
            raise UserError(f"command line: --{name} is a setting of evaluations: use {instead}")
    recipe = take_option(list(args), "recipe")
    settings = read_settings(args)
    base = (
        run_config(settings.model) if is_run(settings.model) else get_recipe(recipe or default_recipe(settings.model))
    )
    output = own.output or str(OUTPUTS / Path(str(settings.output)).name)
    settings = replace(settings, images=None, images_per_prompt=own.group_size, output=output)
    return own, settings, base


def prompts_to_vote_on(settings: EvaluationSettings, base: Config) -> list[Prompt]:
    """Distinct ones: all of a file in its order; else those that a run, or a run with the generator, trains on, mixed.

    A run's held-out prompts are left out, so that they stay unseen in a training on the votes too.
    """
    held_out = base.evaluation.images
    if settings.prompts is None:
        prompts = in_hash_order(load_run_prompts(base).train)
    elif settings.prompts in GENERATORS:
        prompts = in_hash_order(load_prompts(settings.prompts, held_out=held_out).train)
    else:
        prompts = list({prompt.text: prompt for prompt in evaluation_prompts(settings.prompts, None)}.values())
    return with_negative(prompts, settings.negative_prompt)


def train_command(settings: EvaluationSettings, base: Config, *, any_objective: bool) -> str:
    """The command that trains a LoRA on the votes, from the weights that drew the pictures.

    Args:
        settings: of drawing.
        base: the configuration that they come from.
        any_objective: whether the objective of `base` can learn from judged groups; else DGPO does.
    """
    run = is_run(settings.model)
    started = str(Path(settings.model) / "config.yaml") if run else base.recipe
    options = {"data.source": "preferences", "data.preferences": str(settings.output)}
    if base.policy.train != "lora":
        options["policy.train"] = "lora"
    if not any_objective:
        options["objective"] = "dgpo"
    if run and base.name is not None:
        options["name"] = "none"  # not the run's own
    if not run:
        options |= {name: getattr(settings, name) for name in ("model", "revision", "family", "lora")}
    elif settings.weights == "after":
        options |= {"lora": settings.model} if base.policy.train == "lora" else {"model": settings.model}
    shared = ("resolution", "shift", "max_sequence_length", "negative_prompt")
    options |= {f"rollout.{name}": getattr(settings, name) for name in shared}
    rewards = settings.rewards
    if settings.prompts not in (None, base.prompts) and rewards == base.rewards:
        rewards = (JUDGES_ANYTHING,)  # the others may ask for more than the text of prompts that are not theirs
    words = ["python", "-m", "dgpo_fast.train", str(started)]
    for name, value in options.items():
        if value != _of(base, name):
            words += [f"--{name.replace('_', '-')}", "none" if value is None else str(value)]
    words += ["--rewards", *rewards] if rewards != base.rewards else []
    return shlex.join(words)


def _of(base: Config, name: str) -> object:
    """A setting by its dotted name."""
    found: object = base
    for part in name.split("."):
        found = getattr(found, part)
    return found
