"""From a `Config` to the parts of a run, step by step.

Errors in the settings are found here, before a folder is created.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, ModelMixin

from dgpo_fast.config.options import Config
from dgpo_fast.config.reading import to_dict
from dgpo_fast.config.recipes import prompts_note
from dgpo_fast.distributed import ALONE, Processes, place
from dgpo_fast.distributed.shards import shards_for
from dgpo_fast.engine import Engine
from dgpo_fast.engine.checkpointing import checkpoint_blocks
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.before_after import RunEvaluations
from dgpo_fast.evaluation.watch import Watch, make_watch
from dgpo_fast.learning.checkpoints import Checkpoints
from dgpo_fast.learning.learner import Learner
from dgpo_fast.learning.optimizers import state_bytes
from dgpo_fast.memory.plan import MemoryPlan
from dgpo_fast.models.family import family_of
from dgpo_fast.models.fingerprints import sampled_fingerprint, weights_fingerprint
from dgpo_fast.models.forward import call_around
from dgpo_fast.models.loading import make_pipeline, pick_device, pick_dtype, read_model
from dgpo_fast.models.lora import Lora, start_from_lora
from dgpo_fast.models.own_settings import image_sizes, in_plain_numbers, require_trainable, with_own_shift
from dgpo_fast.models.policy import PolicyModels
from dgpo_fast.models.prompt_encoder import PromptEncoder, make_prompt_encoder
from dgpo_fast.models.prompt_notes import prompt_notes
from dgpo_fast.models.quantised import numel, quantise_base
from dgpo_fast.models.random_weights import random_weights_note
from dgpo_fast.models.remembered import RememberedForwards
from dgpo_fast.models.sharded import ShardedModels
from dgpo_fast.models.work import WorkMeter
from dgpo_fast.objectives.registry import check_kl_term, traits
from dgpo_fast.prompts import PromptSets, load_run_prompts
from dgpo_fast.prompts.preferences import check_run_preferences
from dgpo_fast.prompts.prompt import digest
from dgpo_fast.records import JsonObject
from dgpo_fast.rewards import RewardPool, WeightedReward, count_workers, load_rewards
from dgpo_fast.rollout.draw import Draw, run_draws
from dgpo_fast.rollout.noisy_steps import noise_of
from dgpo_fast.rollout.online import RolloutWorker
from dgpo_fast.rollout.sampler import Sampler
from dgpo_fast.rollout.source import Source
from dgpo_fast.rollout.sources import make_source
from dgpo_fast.run.console import Console
from dgpo_fast.run.depends import EVALUATION_PROMPTS, STARTING_LORA, TRAINING_PROMPTS, WEIGHTS
from dgpo_fast.run.metrics import Phases
from dgpo_fast.run.version import code_version
from dgpo_fast.seeds import stream_seed


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of one run, on one of its processes.

    Attributes:
        config: every setting, with every "auto" that can be resolved filled in.
        processes: those that share the run; the first one alone writes files and talks to the user.
        console: shows progress to the user.
        device: this process's.
        prompts: to train and to evaluate on.
        reward, reward_pool: the rewards, and the threads and processes in which they run.
        memory: the memory that the run will need.
        pipeline, models, encoder: the model, its sets of weights, and its prompts.
        engine: what makes the forwards fast.
        sampler, draw: what draws the images to learn from, and how.
        eval_sampler, eval_draw: what draws held-out images, and how.
        evaluations: scores on held-out prompts.
        watch: looks at fixed prompts during training.
        phases, work: seconds and FLOPs of an iteration.
        learner: from groups to new weights.
        source: from prompts to groups.
        checkpoints: saved and restored here.
    """

    config: Config
    processes: Processes
    console: Console
    device: torch.device
    prompts: PromptSets
    reward: WeightedReward
    reward_pool: RewardPool
    memory: MemoryPlan
    pipeline: DiffusionPipeline
    models: PolicyModels
    encoder: PromptEncoder
    engine: Engine
    sampler: Sampler
    draw: Draw
    eval_sampler: Sampler
    eval_draw: Draw
    evaluations: RunEvaluations
    watch: Watch
    phases: Phases
    work: WorkMeter
    learner: Learner
    source: Source
    checkpoints: Checkpoints


def build(config: Config, processes: Processes = ALONE) -> Parts:
    """Makes the parts of the run that `config` asks for. All of `processes` must call it together.

    Raises UserError, one line, if a setting, a file, a reward or the model cannot be used.
    """
    console = Console(quiet=not processes.first)
    _require_work(config, processes)
    prompts = load_run_prompts(config)
    device = processes.own_device(pick_device(config.device))
    reward = _load_rewards(config, processes, device)
    # With preferences, rewards score nothing in training.
    scored = prompts.held_out if config.data.source == "preferences" else prompts.everything
    for line in reward.check_prompts(scored):
        console.note(line)
    family = read_model(config)
    require_trainable(config, family)
    config = with_own_shift(config, family, console.note)
    learnt, shown = image_sizes(family, config)
    judged = check_run_preferences(config, learnt)
    reward.try_out(scored, {config.rollout.group_size: learnt, 1: shown})
    workers = count_workers(config.reward_workers, device)
    pool = RewardPool(reward, workers=workers, deadline_s=config.reward_deadline_s, device=device, note=console.note)
    dtype = pick_dtype(config.precision, device)
    memory = MemoryPlan(family, device, dtype, processes, console.note)
    config = memory.predict(config)
    pipeline = make_pipeline(config, device=device, dtype=dtype, with_text=False)
    model = {WEIGHTS: weights_fingerprint(pipeline)}
    start = start_from_lora(pipeline, config.lora)
    if start:
        model[STARTING_LORA] = start.digest
    depends = {TRAINING_PROMPTS: digest(prompts.train), EVALUATION_PROMPTS: digest(prompts.held_out), **model, **judged}
    earlier = {WEIGHTS: sampled_fingerprint(pipeline)}
    quantise_base(pipeline, config.policy.base_precision, device)
    models = _make_models(pipeline, config, processes, device, start)
    config = memory.measure(config, models)
    encoder = make_prompt_encoder(pipeline, config, console.note)
    engine = _start_engine(config, models, pipeline, encoder, processes, console)
    sampler = _make_sampler(config.rollout.resolution, pipeline, engine.rollout_transformer, encoder, engine)
    eval_sampler = _make_sampler(config.evaluation_resolution, pipeline, models.behaviour, encoder, engine)
    draw, eval_draw = run_draws(config, family, device, engine.sizes.rollout, engine.sizes.evaluation)
    phases = Phases(device)
    plain = in_plain_numbers(config, family)
    needs = traits(plain)
    work = WorkMeter(
        models,
        config.policy,
        sampler.shape,
        frozen_policy=needs.frozen_policy,
        drawn=engine.drawn,
        checkpoint=engine.checkpoint,
    )
    learner = Learner(plain, models, processes, phases, work, console.note)
    worker = RolloutWorker(
        group_size=config.rollout.group_size,
        models=models,
        sampler=sampler,
        draw=draw,
        rewards=pool,
        noise=noise_of(config, draw.schedule, keep=needs.needs_transitions),
        phases=phases,
        work=work,
    )
    source = make_source(
        config, worker, prompts, model, learner.rollout_weights, processes, single_images=needs.single_images
    )
    if config.data.noise_passes is not None:
        call_around(models.base, RememberedForwards())
    evaluations = RunEvaluations(config, prompts, pool, eval_sampler, eval_draw, models, processes, console)
    parts = Parts(
        config=config,
        processes=processes,
        console=console,
        device=device,
        prompts=prompts,
        reward=reward,
        reward_pool=pool,
        memory=memory,
        pipeline=pipeline,
        models=models,
        encoder=encoder,
        engine=engine,
        sampler=sampler,
        draw=draw,
        eval_sampler=eval_sampler,
        eval_draw=eval_draw,
        evaluations=evaluations,
        watch=make_watch(evaluations, device, shown),
        phases=phases,
        work=work,
        learner=learner,
        source=source,
        checkpoints=Checkpoints(learner, processes, _about_checkpoints(config, processes, engine, depends), earlier),
    )
    _describe(parts)
    return parts


def _require_work(config: Config, processes: Processes) -> None:
    """Raises UserError if a process would have no image to train on or to evaluate."""
    place(config.rollout.groups, config.rollout.group_size, processes.count)
    if config.evaluation.images < processes.count:
        raise UserError(f"evaluation.images {config.evaluation.images}: {processes.count} processes need one each")


def _load_rewards(config: Config, processes: Processes, device: torch.device) -> WeightedReward:
    reward = load_rewards(config.rewards, device)
    check_kl_term(config, reward.weights)
    if config.data.source == "online":  # of offline groups, each is drawn and scored by one process
        reward.check_processes(processes.count, config.rollout.groups)
    return reward


def _make_models(
    pipeline: DiffusionPipeline, config: Config, processes: Processes, device: torch.device, start: Lora | None
) -> PolicyModels:
    shards = shards_for(config, processes, device)
    models = (
        PolicyModels(pipeline.transformer, config.policy, stream_seed(config.seed, "lora"), start)
        if shards is None
        else ShardedModels(pipeline.transformer, config.policy, shards)
    )
    if config.engine.checkpointing != "none":
        checkpoint_blocks(models.policy, config.engine.checkpointing)
    return models


def _start_engine(
    config: Config,
    models: PolicyModels,
    pipeline: DiffusionPipeline,
    encoder: PromptEncoder,
    processes: Processes,
    console: Console,
) -> Engine:
    text_tokens = encoder.text_tokens()  # finds text encoders that cannot be loaded
    engine = Engine(config, models, pipeline, text_tokens, console.note, processes=processes.count)
    engine.adopt(processes.broadcast(engine.measured(), "the engine's choices"))
    return engine


def _make_sampler(
    size: int | str | None, pipeline: DiffusionPipeline, transformer: ModelMixin, encoder: PromptEncoder, engine: Engine
) -> Sampler:
    return Sampler(
        pipeline,
        transformer,
        encoder,
        resolution=size,
        solve=engine.solve,
        decode=engine.decoder.start,
        decodes_ahead=int(engine.decoder.overlaps),
    )


def _about_checkpoints(
    config: Config, processes: Processes, engine: Engine, depends: dict[str, str]
) -> Callable[[], JsonObject]:
    """Gives what every checkpoint's manifest says of the run. The engine's choices may change when it is resumed."""
    about = {
        "code": code_version(),
        "config": to_dict(config),
        "processes": processes.count,
        "dtype": str(engine.models.dtype).removeprefix("torch."),
        "depends": depends,
    }
    return lambda: about | {"engine": engine.measured()}


def _describe(parts: Parts) -> None:
    """Prints what will be trained, and what was chosen for it."""
    config, models, note = parts.config, parts.models, parts.console.note
    model = f"{config.model} with {config.lora}" if config.lora else config.model
    note(
        f"{model} on {parts.device} in {str(models.dtype).removeprefix('torch.')}: training "
        f"{models.trained_numel / 1e6:.2f} M weights ({config.policy.train}) of {numel(models.base) / 1e6:.1f} M; "
        f"{config.rollout.groups} groups of {config.rollout.group_size} images an iteration"
    )
    state = sum(state_bytes(shape.numel(), config.optimizer.name) for shape in models.shapes.values())
    note(f"{config.optimizer.name}: {state / 2**20:.1f} MiB of optimizer state")
    guided = parts.draw.guided or parts.eval_draw.guided or traits(parts.learner.config).guided_base
    unread = prompt_notes(parts.pipeline, config.rollout.max_sequence_length, parts.prompts.everything, guided)
    about = (
        random_weights_note(config),
        *family_of(models.base).notes,
        parts.prompts.note,
        prompts_note(config),
        *unread,
    )
    for line in filter(None, (*parts.engine.reasons.lines, *about)):
        note(line)
