"""A model of an evaluation's settings, ready to draw: nothing here is scored or written."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from dgpo_fast.config.options import Config
from dgpo_fast.errors import UserError
from dgpo_fast.evaluation.settings import OR_BEFORE, EvaluationSettings, is_run, run_config, trained_weights
from dgpo_fast.models.fingerprints import weights_fingerprint
from dgpo_fast.models.loading import make_pipeline, pick_device, pick_dtype, read_model
from dgpo_fast.models.lora import changes_text_encoders, find_lora, merge_lora
from dgpo_fast.models.own_settings import differences, fill_in_shift, own_grid
from dgpo_fast.models.prompt_encoder import make_prompt_encoder
from dgpo_fast.models.prompt_notes import prompt_notes
from dgpo_fast.prompts import Prompt
from dgpo_fast.records import JsonObject
from dgpo_fast.rollout.draw import make_draw
from dgpo_fast.rollout.sampler import Sampler, plain_decoding
from dgpo_fast.run.checkpoint import newest_info
from dgpo_fast.run.console import Console
from dgpo_fast.run.depends import STARTING_LORA, change


class Drawer:
    """The model with its prompt encoder and its sampler.

    Raises UserError if the model or a LoRA cannot be loaded, or does not fit the settings.

    Args:
        settings: what to draw with.
        prompts: distinct ones, which are noted if the model does not read all of one.
        console: where notes go.
        earlier: what the pictures that exist already were made with; empty if there are none.

    Attributes:
        made_with: what the pictures depend on that only the model's files say.
    """

    def __init__(
        self, settings: EvaluationSettings, prompts: Sequence[Prompt], console: Console, earlier: Mapping[str, object]
    ):
        self.settings, self.console = settings, console
        self.device = pick_device(settings.device)
        self.family = read_model(_what_to_load(settings)[0])
        self.shift = fill_in_shift(settings.shift, self.family, "shift")
        dtype = pick_dtype(settings.precision, self.device)
        pipeline, config, digests = load_evaluated(settings, earlier, device=self.device, dtype=dtype)
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
        guided = self.family.guidance(settings.guidance_scale).pairs
        for line in prompt_notes(pipeline, settings.max_sequence_length, prompts, guided):
            console.note(line)
        grid = own_grid(self.family, self.shift, settings.num_inference_steps, settings.resolution)
        self.draw = make_draw(self.family, settings, grid, settings.batch_size, self.device)
        self.made_with: JsonObject = {"shift": grid.shift, "dtype": str(dtype).removeprefix("torch."), **digests}

    def note_differences(self) -> None:
        """Notes settings that are others than the model's own."""
        settings = self.settings
        for line in differences(
            self.family,
            shift=self.shift,
            resolution=settings.resolution,
            max_sequence_length=settings.max_sequence_length,
        ):
            self.console.note(line)

    def latents(
        self, prompts: Sequence[Prompt], *, first: int, seed: int, on_step: Callable[[float], None] | None = None
    ) -> Iterator[Tensor]:
        """x0 of one batch after another, one picture a prompt; as `Sampler.batches`."""
        return self.sampler.batches(
            [prompt.text for prompt in prompts],
            self.draw,
            first=first,
            seed=seed,
            negative=[prompt.negative for prompt in prompts],
            on_step=on_step,
        )


def load_evaluated(
    settings: EvaluationSettings, earlier: Mapping[str, object], *, device: torch.device, dtype: torch.dtype
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
    digests = {"weights_sha256": _digest_of_weights(pipeline, earlier)}
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


def _digest_of_weights(pipeline: DiffusionPipeline, earlier: Mapping[str, object]) -> str:
    """The model's fingerprint. Earlier versions took the transformer's weights alone: that one, if `earlier` has it and
    the weights are the same."""
    now = weights_fingerprint(pipeline)
    kept = str(earlier.get("weights_sha256", now))
    return kept if kept != now and kept == _digest_of_tensors(pipeline.transformer) else now


def _digest_of_tensors(transformer: ModelMixin) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(transformer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
