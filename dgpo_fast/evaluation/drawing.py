"""Draws and scores the pictures of an evaluation, a batch at a time: no more than two batches are ever in memory."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from dgpo_fast.config.options import Config
from dgpo_fast.distributed.guard import finite_remedy
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.folder import MADE_WITH, EvaluationFolder, Row, describe_model
from dgpo_fast.evaluation.settings import (
    OR_BEFORE,
    EvaluationSettings,
    has_default_output,
    is_run,
    lasting,
    run_config,
    trained_weights,
)
from dgpo_fast.models.fingerprints import weights_fingerprint
from dgpo_fast.models.latents import Pictures
from dgpo_fast.models.loading import make_pipeline, pick_device, pick_dtype, read_model
from dgpo_fast.models.lora import changes_text_encoders, find_lora, merge_lora
from dgpo_fast.models.own_settings import differences, fill_in_shift, own_grid
from dgpo_fast.models.prompt_encoder import make_prompt_encoder
from dgpo_fast.models.prompt_notes import prompt_notes
from dgpo_fast.prompts import TRAINING_PROMPTS, Prompt, evaluation_prompts, in_turn, load_run_prompts, with_negative
from dgpo_fast.prompts.prompt import digest
from dgpo_fast.records import JsonObject
from dgpo_fast.rewards import RewardPool, count_workers, load_rewards
from dgpo_fast.rollout.draw import make_draw
from dgpo_fast.rollout.sampler import Sampler, plain_decoding
from dgpo_fast.run.checkpoint import newest_info
from dgpo_fast.run.console import Console
from dgpo_fast.run.depends import STARTING_LORA, change
from dgpo_fast.seeds import stream_seed
from dgpo_fast.wording import FAULTS, counted, size_in_words

PNG_THREADS = 8
NAMED_FAULTS = 8
"""Pictures that are not finite beyond these are in the index alone."""


class _NoneFinite(Exception):
    """No picture of a batch is finite."""

    def __init__(self, first: Row):
        self.first = first


class Drawing:
    """One evaluation: its prompts, model and rewards, checked and ready to draw.

    Raises UserError for anything that is wrong with the settings, before a folder is made.

    Attributes:
        failures: one line per reward that failed on a picture.
        drawn: the number of pictures that `run` had to draw.
    """

    def __init__(self, settings: EvaluationSettings, console: Console):
        self.settings = settings
        self.console = console
        self.folder = EvaluationFolder(Path(str(settings.output)))
        self.renew = has_default_output(settings)
        self.prompts, made_with = require_folder(settings)
        self.device = pick_device(settings.device)
        reward = load_rewards(settings.rewards, self.device)
        distinct = list({id(prompt): prompt for prompt in self.prompts}.values())
        for line in reward.check_prompts(distinct):
            console.note(line)
        family = read_model(_what_to_load(settings)[0])
        shift = fill_in_shift(settings.shift, family, "shift")
        self.pool = RewardPool(
            reward,
            workers=count_workers(settings.reward_workers, self.device),
            deadline_s=settings.reward_deadline_s,
            device=self.device,
            note=console.note,
        )
        dtype = pick_dtype(settings.precision, self.device)
        pipeline, config, digests = load_evaluated(settings, device=self.device, dtype=dtype)
        try:
            self.encoder = make_prompt_encoder(pipeline, config, console.note)
            self.sampler = Sampler(
                pipeline,
                pipeline.transformer,
                self.encoder,
                resolution=settings.resolution,
                decode=plain_decoding(pipeline.vae, settings.batch_size),
            )
        except UserError as error:  # a run's settings have longer names
            raise UserError(str(error).replace("rollout.", "")) from None
        guided = family.guidance(settings.guidance_scale).pairs
        for line in prompt_notes(pipeline, settings.max_sequence_length, distinct, guided):
            console.note(line)
        reward.try_out(self.prompts, {1: self.sampler.image_size})
        grid = own_grid(family, shift, settings.num_inference_steps, settings.resolution)
        self.draw = make_draw(family, settings, grid, settings.batch_size, self.device)
        self.made_with = {
            **made_with,
            "shift": grid.shift,
            "dtype": str(dtype).removeprefix("torch."),
            **digests,
            **reward.contents,
        }
        self.folder.require_same(self.made_with, renew=self.renew)
        if self.folder.is_outdated(self.made_with):
            console.note(
                f"{settings.model} has been trained further since {self.folder.path} was made: it is made again"
            )
        for line in differences(
            family, shift=shift, resolution=settings.resolution, max_sequence_length=settings.max_sequence_length
        ):
            console.note(line)
        self.failures: list[str] = []
        self.drawn = 0

    def run(self) -> list[Row]:
        """Draws and scores missing pictures; returns the rows of all pictures.

        Finished pictures are kept if an error is raised. Raises UserError if a reward cannot score anything.
        """
        lock = self.folder.begin(self.made_with, renew=self.renew)
        try:
            return self._run()
        finally:
            self.pool.close()
            lock.release()

    def _run(self) -> list[Row]:
        rows = self._score_again(self.folder.resume(self.settings.batch_size))
        self._describe(len(rows))
        if len(rows) < len(self.prompts):
            with self.console.track("encoding prompts") as on_step:
                self.encoder.prepare(self.prompts[len(rows) :], on_step)
        total, size = len(self.prompts), self.settings.batch_size
        self.drawn = total - len(rows)
        with self.console.count("images", total, done=len(rows)) as on_images, ThreadPoolExecutor(1) as beside:
            pending: Future[list[Row]] | None = None
            starts = range(len(rows), total, size)
            for start, x0 in zip(starts, self._latents(len(rows), on_images), strict=True):
                pictures = self.sampler.decode(x0)
                if pending:
                    rows += self._finished(pending)
                pending = beside.submit(self._finish, start, pictures, is_first=not rows)
            if pending:
                rows += self._finished(pending)
        return rows

    def _finished(self, pending: Future[list[Row]]) -> list[Row]:
        """The rows of a batch, once they are there. Raises UserError for a model that draws nothing finite."""
        try:
            return pending.result()
        except _NoneFinite as error:  # here, since no other thread may draw while the model is looked into
            row, stream = error.first, stream_seed(self.settings.seed, "evaluation")
            place = self.sampler.first_fault(row.prompt, self.draw, number=row.sample, seed=stream)
            raise UserError(
                f"no image of the first batch is finite; the first: {named_faults([row])}{place}: "
                f"{finite_remedy(self.sampler.dtype, begun=False)}"
            ) from None

    def _latents(self, first: int, on_images: Callable[[float], None]) -> Iterator[Tensor]:
        """Of the pictures from number `first` on, a batch at a time."""
        prompts = self.prompts[first:]
        return self.sampler.batches(
            [prompt.text for prompt in prompts],
            self.draw,
            first=first,
            seed=stream_seed(self.settings.seed, "evaluation"),
            negative=[prompt.negative for prompt in prompts],
            on_step=lambda share: on_images(first + share * len(prompts)),
        )

    def _finish(self, start: int, pictures: Pictures, *, is_first: bool) -> list[Row]:
        """Writes one batch's pictures, then, with its scores, their lines of the index."""
        images, faults = pictures
        with ThreadPoolExecutor(PNG_THREADS) as threads:
            list(threads.map(self.folder.write_image, range(start, start + len(images)), images))
        rows = self._score(range(start, start + len(images)), images, faults)
        if is_first and all(row.fault for row in rows):
            raise _NoneFinite(rows[0])
        if is_first and all(row.failed for row in rows):
            raise UserError(f"no image of the first batch could be scored; the first failure: {self.failures[0]}")
        self.folder.append(rows)
        return rows

    def _score(self, samples: Sequence[int], images: np.ndarray, faults: np.ndarray | None = None) -> list[Row]:
        prompts = [self.prompts[sample] for sample in samples]
        scored = self.pool.score_groups(images, prompts, group_size=1, faults=faults)
        self.failures += scored.failures
        rewards, parts = scored.rewards[:, 0], {name: values[:, 0] for name, values in scored.parts.items()}
        return [
            Row(
                sample,
                prompt,
                _as_float(rewards[n]),
                {name: _as_float(values[n]) for name, values in parts.items()},
                FAULTS[scored.faults[n, 0]],
            )
            for n, (sample, prompt) in enumerate(zip(samples, prompts, strict=True))
        ]

    def _score_again(self, rows: list[Row]) -> list[Row]:
        """The rows. Those that a reward failed on are scored again from their pictures."""
        failed = [row for row in rows if row.failed and not row.fault]
        for start in range(0, len(failed), self.settings.batch_size):
            batch = failed[start : start + self.settings.batch_size]
            images = np.stack([self.folder.read_image(row) for row in batch])
            for row in self._score([row.sample for row in batch], images):
                rows[row.sample] = row
            self.folder.write(rows)
        return rows

    def _describe(self, done: int) -> None:
        settings, prompts = self.settings, len({prompt.text for prompt in self.prompts})
        self.console.note(
            f"{describe_model(self.made_with)} on {self.device} in {self.made_with['dtype']}: "
            f"{counted(len(self.prompts), 'image')} of {counted(prompts, 'prompt')} ({describe_prompts(settings)}), "
            f"{size_in_words(*self.sampler.image_size)}, "
            f"{counted(settings.num_inference_steps, 'step')}, guidance {settings.guidance_scale:g}, "
            f"into {self.folder.path}"
        )
        if done:
            self.console.note(f"{done} of them are there already")


def named_faults(rows: Sequence[Row]) -> str:
    """The pictures that are not finite, by number and with what is wrong with them; empty if all are."""
    lines = [f"picture {row.sample}: {row.fault}" for row in rows if row.fault]
    more = [f"and {len(lines) - NAMED_FAULTS} more"] if len(lines) > NAMED_FAULTS else []
    return "; ".join([*lines[:NAMED_FAULTS], *more])


def require_folder(settings: EvaluationSettings) -> tuple[list[Prompt], JsonObject]:
    """The prompts, one per image, and what is known of the evaluation without the model.

    Raises UserError if the folder was made with something else.
    """
    prompts = choose_prompts(settings)
    made_with = {**lasting(settings), "images_count": len(prompts), "prompts_sha256": digest(prompts)}
    EvaluationFolder(Path(str(settings.output))).require_same(made_with)
    return prompts, made_with


def choose_prompts(settings: EvaluationSettings) -> list[Prompt]:
    """One prompt for each image: every prompt `images_per_prompt` times, one after another."""
    count = math.ceil(settings.images / settings.images_per_prompt) if settings.images else None
    if settings.prompts is not None:
        prompts = evaluation_prompts(settings.prompts, count)
    else:
        prompts = load_run_prompts(run_config(settings.model), held_out=count or 0).held_out
    prompts = with_negative(prompts, settings.negative_prompt)
    chosen = in_turn(prompts, lambda prompt: prompt.tag, count) if count else prompts
    return [prompt for prompt in chosen for _ in range(settings.images_per_prompt)]


def describe_prompts(settings: EvaluationSettings) -> str:
    """A phrase that says where the prompts come from."""
    if settings.prompts is not None:
        return settings.prompts
    config = run_config(settings.model)
    if config.eval_prompts:
        return config.eval_prompts
    evaluated = load_run_prompts(config).evaluated
    source = config.data.preferences or config.prompts
    return f"{TRAINING_PROMPTS if evaluated == TRAINING_PROMPTS else 'held out'} of {source}"


def load_evaluated(
    settings: EvaluationSettings, *, device: torch.device, dtype: torch.dtype
) -> tuple[DiffusionPipeline, Config, dict[str, str]]:
    """The pipeline with its LoRA merged, a run's configuration that would load it, and checksums of its weights.

    Text encoders are only loaded if the LoRA changes them.

    Raises UserError if the model or the LoRA cannot be loaded, or a run has no weights yet.
    """
    config, lora = _what_to_load(settings)
    config = replace(config, rollout=replace(config.rollout, max_sequence_length=settings.max_sequence_length))
    file = find_lora(lora) if lora else None
    with_text = file is not None and changes_text_encoders(file)
    pipeline = make_pipeline(config, device=device, dtype=dtype, with_text=with_text)
    digests = {"weights_sha256": _digest_of_weights(pipeline, Path(str(settings.output)))}
    if file:
        digests["lora_sha256"] = merge_lora(pipeline, file).digest
        began_with = newest_info(Path(settings.model) / "checkpoints").get("depends", {}).get(STARTING_LORA)
        if settings.weights == "before" and began_with not in (None, digests["lora_sha256"]):
            raise UserError(change(settings.model, [STARTING_LORA], "the run began", f"put back what {lora} was"))
    return pipeline, config, digests


def _what_to_load(settings: EvaluationSettings) -> tuple[Config, Path | None]:
    """The configuration of the pipeline, and the LoRA."""
    if not is_run(settings.model):
        lora = Path(settings.lora) if settings.lora else None
        return replace(Config(), model=settings.model, revision=settings.revision, family=settings.family), lora
    folder, weights = Path(settings.model), settings.weights
    config = run_config(str(folder))
    if weights == "before":
        return config, Path(config.lora) if config.lora else None
    trained = trained_weights(folder, config, OR_BEFORE)
    if config.policy.train == "lora":
        return config, trained
    return replace(config, model=str(folder), revision=None, random_weights=False), None


def _digest_of_weights(pipeline: DiffusionPipeline, output: Path) -> str:
    """The model's fingerprint; that of an earlier version, of the transformer's weights alone, if the evaluation in
    `output` was begun with it."""
    now = weights_fingerprint(pipeline)
    kept = EvaluationFolder(output).made_with().get("weights_sha256") if (output / MADE_WITH).is_file() else now
    return kept if kept != now and kept == _digest_of_tensors(pipeline.transformer) else now


def _digest_of_tensors(transformer: ModelMixin) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(transformer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _as_float(value: np.float32) -> float:
    """The shortest decimal that a float32 survives, NaN included."""
    return float(str(value))
