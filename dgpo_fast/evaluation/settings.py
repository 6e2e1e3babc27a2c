"""What `python -m dgpo_fast.evaluate` draws and scores: every setting, and where its default comes from."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from dgpo_fast.config.bounds import STRICT, Count, ModelGuidance, PathText, Positive, Resolution, Shift, Text
from dgpo_fast.config.command_line import take_option
from dgpo_fast.config.options import Config, Rewards
from dgpo_fast.config.reading import parse_overrides, read_yaml, resolve, to_dict
from dgpo_fast.config.recipes import get_recipe
from dgpo_fast.errors import UserError
from dgpo_fast.prompts.files import SUFFIXES
from dgpo_fast.records import JsonObject
from dgpo_fast.run.search import near_run, runs_there
from dgpo_fast.wording import NO_HUB_NAME, resume_command

OUTPUTS = Path("evaluations")
FREE = ("output", "batch_size", "device", "reward_workers", "reward_deadline_s")
"""What may change when an evaluation is continued: none of it affects the images."""

OR_BEFORE = ", or use --weights before"
"""What else helps if a run has no trained weights yet."""


@dataclass(kw_only=True, config=STRICT)
class EvaluationSettings:
    """An evaluation: draw and score images of a model, or of a training run."""

    model: PathText = "tiny"
    """What to evaluate: `tiny` (shipped), a pipeline's folder, a name on the Hugging Face hub, or a run's folder."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub. None: its default branch."""
    family: str = "auto"
    """How the model is drawn with. auto: by the class that its model_index.json names. Anything else: your own
    `my_module:MyFamily` (docs/families.md)."""
    lora: PathText | None = None
    """A LoRA to load into the model: a .safetensors file, or the folder that contains it. None: no LoRA."""
    weights: Literal["after", "before"] | None = None
    """Weights of a run to evaluate. after: the trained weights. before: the weights that training started from.
    None: after."""
    prompts: PathText | None = None
    """All prompts of a file (.txt, .jsonl, .csv or .tsv), or the held-out prompts of a generator. None: the held-out
    prompts of the run."""
    images: Count | None = None
    """Number of images, spread evenly over tags and prompts. None: `images_per_prompt` for every prompt of a file."""
    images_per_prompt: Count = 1
    """Images per prompt, each from its own initial noise."""
    rewards: Rewards = ("shapes",)
    """Rewards that score the images: names, or your own `my_module:MyReward`. Each gets a column in the results.
    Weights (`=0.5`) only affect the weighted sum that a run was trained on."""
    seed: int = 0
    """Seed of the initial noise. Evaluations with the same seed and the same prompts start from the same noise."""
    solver: Literal["dpmpp_2m", "euler"] = "dpmpp_2m"
    """ODE solver on flow sigmas. dpmpp_2m: DPM-Solver++(2M). euler: Euler."""
    num_inference_steps: Count = 14
    """Solver steps per image."""
    guidance_scale: ModelGuidance = 4.5
    """Guidance scale, as the model's card has it (docs/families.md). With classifier-free guidance, 1 turns it off,
    which halves the cost of a step."""
    negative_prompt: Text = ""
    """Negative prompt of all prompts that have none of their own (`negative_prompt` in a line of the file). Guidance
    leads away from it. None: the empty text."""
    shift: Shift | None = None
    """Timestep shift s of the sigma grid: σ = s·t / (1 + (s − 1)·t). None: the model's own, by its
    scheduler_config.json."""
    resolution: Resolution | None = None
    """Size of the images in pixels: HEIGHTxWIDTH, such as 512x768, or one number for a square. None: the size that
    the model's files name, sample_size of the transformer × the decoder's factor, which diffusers draws by default.
    A model may have been trained at other sizes too: SD3.5-Medium's files say 1024, and its recipes 512."""
    max_sequence_length: Annotated[int, Field(ge=0)] = 128
    """Number of tokens per prompt; with Stable Diffusion 3, of T5. 0: no T5 tokens, for a pipeline without that
    encoder."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the model. auto: bf16 on a GPU that supports it, else fp32."""
    device: str = "auto"
    """cpu, cuda or cuda:N. auto: a GPU if there is one, else the CPU."""
    batch_size: Count = 32
    """Images per forward pass. If an evaluation is killed, at most this many images are drawn again."""
    reward_workers: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Number of processes that score images while others are drawn, for rewards that run on the CPU. auto: on a GPU,
    one less than the number of CPU cores, at most 8; on a CPU 0."""
    reward_deadline_s: Positive = 300.0
    """Seconds that a reward may take to score an image."""
    output: PathText | None = None
    """Folder to write. None: a folder in evaluations/, named after the model, the LoRA and the prompts."""


def read_settings(args: list[str]) -> EvaluationSettings:
    """The settings of `[MODEL_OR_RUN] [--recipe NAME] [--setting value …]`.

    A run's folder gives its model, prompts, rewards and evaluation; a recipe gives them for a plain model. The command
    line overrides both. Raises UserError, one line.
    """
    args = list(args)
    source = args.pop(0) if args and not args[0].startswith("-") else take_option(args, "model")
    if source is None:
        raise UserError("command line: name a model or a run's folder, as in `python -m dgpo_fast.evaluate tiny`")
    if is_evaluation(source):
        raise UserError(f"{source} is an evaluation, not a model: --side-by-side compares it with another one")
    _require_there(source)
    recipe = take_option(args, "recipe")
    if is_run(source):
        if recipe is not None:
            raise UserError(f"--recipe {recipe}: {source} is a run, which has its own settings; leave it out")
        base = _of_run(source)
    else:
        base = _of_recipe(source, recipe)
    overrides = parse_overrides(args, base)
    if str(overrides.get("prompts")).endswith(SUFFIXES):
        overrides.setdefault("images", None)  # all prompts of the file
    settings = resolve(base, overrides, "command line")
    _require_what_fits(settings)
    return settings if settings.output else replace(settings, output=str(_default_output(settings, base.prompts)))


def is_evaluation(source: str) -> bool:
    """Whether `source` is the folder of an evaluation."""
    return (Path(source) / "evaluation.yaml").is_file()


def is_run(source: str) -> bool:
    """Whether `source` is the folder of a training run."""
    return (Path(source) / "config.yaml").is_file()


def run_config(folder: str) -> Config:
    """The configuration of the run in `folder`."""
    path = Path(folder) / "config.yaml"
    return resolve(Config(), read_yaml(path), str(path))


def trained_weights(folder: Path, config: Config, otherwise: str = "") -> Path:
    """The file of the trained weights of the run in `folder`. Raises UserError if there are none yet, which ends with
    `otherwise`."""
    trained = folder / ("pytorch_lora_weights.safetensors" if config.policy.train == "lora" else "model_index.json")
    if not trained.is_file():
        raise UserError(
            f"{folder}: the run has not finished, so it has no trained weights yet ({trained.name}): resume it "
            f"with `{resume_command(folder)}`{otherwise}"
        )
    return trained


def require_weights(settings: EvaluationSettings) -> None:
    """Raises UserError if `settings` want the trained weights of a run that has none yet."""
    if settings.weights == "after":
        trained_weights(Path(settings.model), run_config(settings.model), OR_BEFORE)


def _require_there(source: str) -> None:
    """Raises UserError for a path that does not exist, so that it is not taken for a name on the hub."""
    path = Path(source).expanduser()
    if source == "tiny" or path.exists():
        return
    if "/" not in source:
        raise UserError(f"model '{source}': no such folder{near_run(source) or NO_HUB_NAME}")
    if source.startswith(("runs/", "./", "../", "~", "/")) or len(path.parts) > 2 or path.parent.exists():
        raise UserError(f"{source}: no such run or folder{runs_there(source)}")


def lasting(settings: EvaluationSettings) -> JsonObject:
    """What must stay the same when an evaluation is continued; without a shift that is still to be read."""
    left_out = [
        *FREE,
        *(["shift"] if settings.shift is None else []),
        *(["family"] if settings.family == "auto" else []),
    ]
    return {name: value for name, value in to_dict(settings).items() if name not in left_out}


def _require_what_fits(settings: EvaluationSettings) -> None:
    run = is_run(settings.model)
    if settings.lora and run:
        raise UserError(
            f"--lora {settings.lora}: {settings.model} is a run, which has its own weights; "
            "use --lora with a model that is not a run"
        )
    if settings.weights and not run:
        raise UserError(f"--weights {settings.weights}: {settings.model} is not a run; leave it out")
    if settings.prompts is None and not run:
        raise UserError(f"--prompts none: {settings.model} has no prompts of its own; name a file or a generator")


def has_default_output(settings: EvaluationSettings) -> bool:
    """Whether a run's evaluation goes to its default folder."""
    return is_run(settings.model) and settings.output == str(_default_output(settings, None))


def _default_output(settings: EvaluationSettings, usual_prompts: str | None) -> Path:
    """evaluations/NAME, where NAME says what differs from the model's plain evaluation, of its usual prompts."""
    prompts = settings.prompts if settings.prompts != usual_prompts else None
    named = [Path(settings.model).resolve().name, "before" if settings.weights == "before" else ""]
    named += [Path(path).resolve().stem for path in (settings.lora, prompts) if path]
    return OUTPUTS / "-".join(name for name in named if name)


def _of_run(folder: str) -> EvaluationSettings:
    return replace(_from_config(run_config(folder), model=folder, prompts=None), weights="after")


def default_recipe(model: str) -> str:
    """The recipe whose settings a model has that is no run."""
    return "tiny-shapes" if model == "tiny" else "sd35m-geneval"


def _of_recipe(model: str, recipe: str | None) -> EvaluationSettings:
    config = get_recipe(recipe or default_recipe(model))
    settings = _from_config(config, model=model, prompts=config.prompts)
    # Of a recipe that nobody asked for, these are for its own model.
    return settings if recipe or model == config.model else replace(settings, shift=None, resolution=None)


def _from_config(config: Config, *, model: str, prompts: str | None) -> EvaluationSettings:
    rollout, evaluation = config.rollout, config.evaluation
    return EvaluationSettings(
        model=model,
        revision=config.revision,
        family=config.family,
        prompts=prompts,
        rewards=config.rewards,
        images=evaluation.images,
        seed=evaluation.seed,
        solver=evaluation.solver,
        num_inference_steps=evaluation.num_inference_steps,
        guidance_scale=evaluation.guidance_scale,
        negative_prompt=rollout.negative_prompt,
        shift=rollout.shift,
        resolution=config.evaluation_resolution,
        max_sequence_length=rollout.max_sequence_length,
        precision=config.precision,
        device=config.device,
        batch_size=rollout.batch_size,
        reward_workers=config.reward_workers,
        reward_deadline_s=config.reward_deadline_s,
    )
