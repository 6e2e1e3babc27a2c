"""The model card of a run that is handed on: README.md, with the metadata that the hub reads."""

import inspect
import math
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dgpo_fast import __version__
from dgpo_fast.config.bounds import size_of
from dgpo_fast.publishing.handover import SUMMARY, Handover
from dgpo_fast.records import JsonObject
from dgpo_fast.rewards.registry import parse_spec
from dgpo_fast.run.console import duration, score_cells
from dgpo_fast.run.pictures import pictures_of
from dgpo_fast.wording import counted, number, one_line, size_in_words

OBJECTIVES = {
    "dgpo": "[DGPO](https://arxiv.org/abs/2510.08425)",
    "diffusion_dpo": "Diffusion-DPO",
    "flow_grpo": "Flow-GRPO",
    "nft": "DiffusionNFT",
    "awm": "AWM",
    "ram": "RAM",
    "crd": "CRD",
}
SOLVERS = {"dpmpp_2m": "DPM-Solver++(2M)", "euler": "Euler"}


def write_card(handover: Handover, folder: Path) -> None:
    """Writes README.md, and what it shows, into `folder`, where the weights are already."""
    for name in (SUMMARY, *_pictures(handover)):
        shutil.copyfile(handover.run / name, folder / name)
    card = ModelCard(f"---\n{_metadata(handover).to_yaml()}\n---\n\n{_text(handover, folder)}")
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def _pictures(handover: Handover) -> dict[str, str]:
    """Before and after first; without those of alarms."""
    there = pictures_of(handover.run)
    return {name: there[name] for name in ("before_after.png", "reward_curve.png", "progress.png") if name in there}


def _metadata(handover: Handover) -> ModelCardData:
    after, rewards = handover.summary["after"], _rewards(handover)
    result = EvalResult(
        task_type="text-to-image",
        dataset_type="prompts",
        dataset_name=handover.summary["evaluated_on"],
        metric_type="reward",
        metric_name=rewards.replace("`", ""),
        metric_value=after["reward_mean"],
    )
    based = {"base_model": handover.base_name, "base_model_relation": "finetune" if handover.whole else "adapter"}
    about: JsonObject = {**handover.licence, **(based if handover.base_name else {})}
    return ModelCardData(
        model_name=handover.name,
        **about,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*([] if handover.whole else ["lora"]), "reinforcement-learning", handover.config.objective, "dgpo_fast"],
        eval_results=[result] if math.isfinite(after["reward_mean"]) else None,
    )


def _text(handover: Handover, folder: Path) -> str:
    config, pictures = handover.config, _pictures(handover)
    made = f"{'' if handover.whole else 'A LoRA for '}{_base(handover)}, trained"
    objective = OBJECTIVES.get(config.objective, f"the objective {_code(config.objective)}")
    shown = "".join(f"![{shows}]({name})\n\n" for name, shows in pictures.items())
    judged = config.data.source == "preferences"
    aim = "on preferences, beside which it is measured by" if judged else "to raise"
    return f"""# {_plain(handover.name)}

{made} with {objective} {aim} the reward {_rewards(handover)}. {_gain(handover.summary)}

{shown}## Results

Mean reward on {_plain(handover.summary["evaluated_on"])}, before and after training, from the same noise. Intervals are
95 %, and count prompts, not images, as independent.

{_results(handover.summary)}

Drawn in {_drawn(handover)}.

## How to use it

```python
{_python(handover, folder)}
```

ComfyUI: {handover.comfyui}.

## How it was trained

{_table(("", ""), _facts(handover).items())}

A reward sees only a part of what a picture should be, and training can raise it at the expense of the rest. Look at
pictures of your own prompts before you rely on it.

## Licence

{_licence(handover)}
"""


def _base(handover: Handover) -> str:
    if handover.base_name:
        return f"[{handover.base_name}](https://huggingface.co/{handover.base_name})"
    if handover.config.model == "tiny":
        return "the small pipeline of `dgpo_fast`"
    return _code(Path(handover.config.model).name)


def _gain(summary: JsonObject) -> str:
    before, after, gain = score_cells(summary["before"], summary["after"], summary["gain"])[:3]
    return f"On {_plain(summary['evaluated_on'])} it went from {before} to {after}: a gain of {gain}."


def _rewards(handover: Handover) -> str:
    """`ocr`, or with more than one, their weights: `ocr + 0.5 · jpeg`. Neither paths nor addresses."""
    specs = [parse_spec(spec) for spec in handover.config.rewards]
    named = [(_reward_name(spec.name), spec.weight) for spec in specs]
    return " + ".join(name if weight == 1 else f"{weight:g} · {name}" for name, weight in named)


def _reward_name(name: str) -> str:
    if name.startswith(("http://", "https://")):
        return "a reward server"
    return _code(Path(name).name)


def _results(summary: JsonObject) -> str:
    before, after, gain = (summary[name] for name in ("before", "after", "gain"))
    tags = before["tags"] if len(before["tags"]) > 1 else {}
    rows = [
        (_plain(tag), *score_cells(old, after["tags"][tag], gain and gain["tags"][tag])) for tag, old in tags.items()
    ]
    rows.append(("**all**", *score_cells(before, after, gain)))
    parts = [
        f"{_code(name)} {number(_known(old))} → {number(_known(after['parts'].get(name)))}"
        for name, old in before.get("parts", {}).items()
    ]
    below = f"\n\nParts of the reward, before → after: {', '.join(parts)}." if len(parts) > 1 else ""
    return _table(("prompts of", "before", "after", "gain", "prompts", "images"), rows) + below


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _size(handover: Handover) -> tuple[int, int]:
    """(height, width) in pixels."""
    resolution = handover.config.evaluation_resolution
    return size_of(resolution) if resolution else handover.family.size


def _drawn(handover: Handover) -> str:
    evaluation, (height, width) = handover.config.evaluation, _size(handover)
    steps = f"{counted(evaluation.num_inference_steps, 'step')} of {SOLVERS[evaluation.solver]}"
    return f"{steps} with guidance {evaluation.guidance_scale:g}, {width} × {height} pixels"


def _python(handover: Handover, folder: Path) -> str:
    """Lines that load it and draw a picture as it was evaluated; what its pipeline would take anyway is left out."""
    config, evaluation = handover.config, handover.config.evaluation
    takes = inspect.signature(handover.family.pipeline_class.__call__).parameters
    given: dict[str, object] = {"num_inference_steps": evaluation.num_inference_steps}
    against = "true_cfg_scale" in takes and handover.family.guidance(evaluation.guidance_scale).pairs
    if against or takes["guidance_scale"].default is None:  # guided by a negative prompt, if the pipeline is given one
        given |= {"true_cfg_scale": evaluation.guidance_scale, "negative_prompt": config.rollout.negative_prompt}
    else:
        given["guidance_scale"] = evaluation.guidance_scale
    if config.rollout.negative_prompt:
        given["negative_prompt"] = config.rollout.negative_prompt
    if config.evaluation_resolution:
        given |= dict(zip(("height", "width"), _size(handover), strict=True))
    given["max_sequence_length"] = config.rollout.max_sequence_length
    options = [f"{name}={value!r}" for name, value in given.items() if name in takes and takes[name].default != value]
    lines = [*handover.how_to_load(folder, handover.target).split("; "), *_scheduler(handover)]
    call = ", ".join([repr("a prompt of your own"), *options])
    return "\n".join([*lines, f"image = pipe({call}).images[0]"])


def _scheduler(handover: Handover) -> list[str]:
    """Lines that give the pipeline the solver of the evaluation, if that is another one than its own."""
    config, family = handover.config, handover.family
    steps, latent = config.evaluation.num_inference_steps, family.latent_shape(*_size(handover))
    if config.evaluation.solver == "euler" or config.rollout.shift is None or family.grid(steps, latent).sigmas:
        return []
    options = "use_flow_sigmas=True, prediction_type='flow_prediction', final_sigmas_type='zero'"
    return [
        "from diffusers import DPMSolverMultistepScheduler",
        f"pipe.scheduler = DPMSolverMultistepScheduler(flow_shift={config.rollout.shift:g}, {options})",
    ]


def _facts(handover: Handover) -> dict[str, str]:
    """How it was trained. Of files and addresses only names, which may be seen by anyone."""
    config, summary = handover.config, handover.summary
    rollout, policy, optimizer = config.rollout, config.policy, config.optimizer
    own = getattr(config, config.objective, None)
    settings = ", ".join(f"{name} {_setting(value)}" for name, value in asdict(own).items()) if own else ""
    lora = f"LoRA of rank {policy.lora_rank}, alpha {policy.lora_alpha:g}"
    learnt = size_of(rollout.resolution) if rollout.resolution else handover.family.size
    same_size = learnt == _size(handover)
    per_iteration = f"{counted(rollout.groups, 'prompt')} × {counted(rollout.group_size, 'image')}"
    drawn = f"{counted(rollout.num_inference_steps, 'step')} of {SOLVERS[rollout.solver]}, "
    drawn += f"guidance {rollout.guidance_scale:g}" + (
        f", noise {rollout.noise_level:g}" if rollout.noise_level else ""
    )
    drawn += "" if same_size else f", {size_in_words(*learnt)}"
    of = {"prompts": _code(Path(config.prompts).name), "rollouts": drawn}
    if config.data.preferences is not None:
        per_iteration = f"{counted(rollout.groups, 'judged group')}"
        of = {"preferences": _code(Path(config.data.preferences).name), "agreement": _agreement(summary)}
    facts = {
        "trained": lora if policy.train == "lora" else "all weights of the transformer",
        "started from": f"the LoRA {_code(Path(config.lora).name)}" if config.lora else "",
        **of,
        "iterations": f"{summary['iterations']}, each with {per_iteration}",
        "images": f"{summary['training_images']:,}" if "training_images" in summary else "",
        "base model": "" if policy.base_precision == "same" else f"with its blocks rounded to {policy.base_precision}",
        "objective": f"{_plain(config.objective)}{': ' if settings else ''}{settings}",
        "optimizer": f"{optimizer.name}, learning rate {optimizer.lr:g}",
        "seed": str(config.seed),
        "time": f"{duration(summary['training_s'])}, without evaluations" if "training_s" in summary else "",
        "software": f"dgpo_fast {__version__}",
    }
    return {name: value for name, value in facts.items() if value}


def _agreement(summary: JsonObject) -> str:
    """With held-out preferences; empty if none were held out."""
    found = summary.get("held_out_preferences", {})
    names = [name for name in ("accuracy", "likes_auc") if name in found]
    shown = (f"{100 * found[n]:.0f} % ({' to '.join(f'{100 * end:.0f}' for end in found[f'{n}_ci95'])})" for n in names)
    return f"with held-out preferences: {', '.join(shown)}; 50 % is chance" if names else ""


def _setting(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def _licence(handover: Handover) -> str:
    licence = handover.licence
    if not licence:
        return f"The base model's, which is not known here, applies to this {handover.kind} too: look it up."
    name = licence.get("license_name", licence["license"])
    called = f"[{name}]({licence['license_link']})" if "license_link" in licence else f"`{name}`"
    return f"{called}, as the base model."


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown, the first column aligned left and the others right, if they have a head."""
    head = list(head)
    marks = ["---", *("---:" if any(head) else "---" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, marks, *rows))


def _plain(text: str) -> str:
    """`text` as Markdown shows it, on one line: no mark-up, and no end of a table's cell."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", one_line(text))


def _code(text: str) -> str:
    """`text` as Markdown's code."""
    return f"`{re.sub('[`|]', ' ', one_line(text))}`"
