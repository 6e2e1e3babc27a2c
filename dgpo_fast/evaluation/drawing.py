"""Draws and scores the pictures of an evaluation, a batch at a time: no more than two batches are ever in memory."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torch import Tensor

from dgpo_fast.distributed.guard import finite_remedy
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.drawer import Drawer
from dgpo_fast.evaluation.folder import MADE_WITH, EvaluationFolder, Row, describe_model
from dgpo_fast.evaluation.settings import EvaluationSettings, has_default_output, lasting, run_config
from dgpo_fast.models.latents import Pictures
from dgpo_fast.models.loading import pick_device
from dgpo_fast.prompts import TRAINING_PROMPTS, Prompt, evaluation_prompts, in_turn, load_run_prompts, with_negative
from dgpo_fast.prompts.prompt import digest
from dgpo_fast.records import JsonObject
from dgpo_fast.rewards import RewardPool, count_workers, load_rewards
from dgpo_fast.run.console import Console
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
        self.pool = RewardPool(
            reward,
            workers=count_workers(settings.reward_workers, self.device),
            deadline_s=settings.reward_deadline_s,
            device=self.device,
            note=console.note,
        )
        earlier = self.folder.made_with() if (self.folder.path / MADE_WITH).is_file() else {}
        self.drawer = Drawer(settings, distinct, console, earlier)
        reward.try_out(self.prompts, {1: self.drawer.sampler.image_size})
        self.made_with = {**made_with, **self.drawer.made_with, **reward.contents}
        self.folder.require_same(self.made_with, renew=self.renew)
        if self.folder.is_outdated(self.made_with):
            console.note(
                f"{settings.model} has been trained further since {self.folder.path} was made: it is made again"
            )
        self.drawer.note_differences()
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
                self.drawer.encoder.prepare(self.prompts[len(rows) :], on_step)
        total, size = len(self.prompts), self.settings.batch_size
        self.drawn = total - len(rows)
        with self.console.count("images", total, done=len(rows)) as on_images, ThreadPoolExecutor(1) as beside:
            pending: Future[list[Row]] | None = None
            starts = range(len(rows), total, size)
            for start, x0 in zip(starts, self._latents(len(rows), on_images), strict=True):
                pictures = self.drawer.sampler.decode(x0)
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
            place = self.drawer.sampler.first_fault(row.prompt, self.drawer.draw, number=row.sample, seed=stream)
            raise UserError(
                f"no image of the first batch is finite; the first: {named_faults([row])}{place}: "
                f"{finite_remedy(self.drawer.sampler.dtype, begun=False)}"
            ) from None

    def _latents(self, first: int, on_images: Callable[[float], None]) -> Iterator[Tensor]:
        """Of the pictures from number `first` on, a batch at a time."""
        prompts = self.prompts[first:]
        seed = stream_seed(self.settings.seed, "evaluation")
        return self.drawer.latents(
            prompts, first=first, seed=seed, on_step=lambda share: on_images(first + share * len(prompts))
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
            f"{size_in_words(*self.drawer.sampler.image_size)}, "
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


def _as_float(value: np.float32) -> float:
    """The shortest decimal that a float32 survives, NaN included."""
    return float(str(value))
