"""The engine of a run: makes its choices once and prepares the models."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from diffusers import DiffusionPipeline, ModelMixin

from dgpo_fast.config.options import Config
from dgpo_fast.engine.allocator import keep_freed_memory
from dgpo_fast.engine.attention import device_name
from dgpo_fast.engine.batches import batch_sizes, decode_batch, rows_line
from dgpo_fast.engine.checkpointing import checkpoint_blocks
from dgpo_fast.engine.choices import Workload, choose
from dgpo_fast.engine.compile import StaticBatches, compile_blocks
from dgpo_fast.engine.decoder import WAYS, Decoder, decoder_ms, has_own_decoder
from dgpo_fast.engine.epilogue import use_epilogue
from dgpo_fast.engine.fp8 import Float8Copy
from dgpo_fast.engine.graphs import CudaGraphs
from dgpo_fast.engine.linear import use_onednn
from dgpo_fast.engine.recorded import RecordedRollouts
from dgpo_fast.errors import UserError
from dgpo_fast.models.family import Guidance, family_of
from dgpo_fast.models.latents import latent_shape
from dgpo_fast.models.meta import FusedAttention, flash_attention
from dgpo_fast.models.own_settings import in_plain_numbers
from dgpo_fast.models.policy import PolicyModels
from dgpo_fast.models.quantised import quantised_layers
from dgpo_fast.objectives.registry import traits
from dgpo_fast.records import JsonObject
from dgpo_fast.rollout.sampler import Solve, sample_latents


class Engine:
    """Prepares the transformers of a run, in place, and provides fast sampling and decoding.

    Attributes:
        choices, reasons: what "auto" became, and why.
        sizes: of whole batches.
        rollout_transformer: draws the training images.
        solve: solves its ODE.
        decoder: decodes latents.

    Args:
        config: the run's settings.
        models: base, policy and behaviour; the policy's blocks are checkpointed if they are to be.
        pipeline: theirs; it stays as it is.
        text_tokens: of an encoded prompt.
        processes: how many share the run.
        note: called with one line for each later finding.

    Raises UserError if a setting is not available on this device.
    """

    def __init__(
        self,
        config: Config,
        models: PolicyModels,
        pipeline: DiffusionPipeline,
        text_tokens: int,
        note: Callable[[str], None],
        processes: int = 1,
    ):
        self.family = family_of(models.base)
        config = in_plain_numbers(config, self.family)
        self.config, self.models, self.sizes = config, models, batch_sizes(config, processes)
        if config.engine.keep_memory and models.device.type == "cpu":
            keep_freed_memory()
        latent = latent_shape(self.family, config.rollout.resolution)
        shown = latent_shape(self.family, config.evaluation_resolution, "evaluation.resolution")
        self.choices, self.reasons = choose(config.engine, self._workload(latent, shown, text_tokens, pipeline))
        if models.device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(models.device).multi_processor_count
            self.reasons.lines.append(rows_line(config, self.sizes, text_tokens, self._width, multiprocessors))
        if config.policy.train == "lora":
            how = "merged weights" if models.merged else "adapters"
            self.reasons.lines.append(f"the policy computes with {how} (policy.forward {config.policy.forward})")
        if few_bits := quantised_layers(models.base):
            self.reasons.lines.append(
                f"base in {config.policy.base_precision}, INEXACT: {len(few_bits)} linear layers are rounded; pictures "
                "and gradients are those of the rounded model"
            )
        self.rollout_transformer = models.behaviour
        if config.engine.rollout_precision == "fp8":
            self.rollout_transformer = self._float8()
        self._apply()
        if self.choices.compile:
            for transformer in self._transformers():
                compile_blocks(transformer, self._batches(transformer))
        self.solve: Solve = RecordedRollouts(CudaGraphs(models.device)) if self.choices.cuda_graphs else sample_latents
        pictures = min(decode_batch(config, of) for of in (latent, shown))
        self.decoder = Decoder(
            pipeline.vae,
            min(pictures, self.sizes.rollout) if self.choices.compile else pictures,
            way=self.choices.decoder,
            compiled=self.choices.compile,
            overlap=config.engine.overlap,
            note=note,
        )

    def _float8(self) -> ModelMixin:
        if self.models.shards is not None:
            raise UserError(
                "engine.rollout_precision fp8: not with sharded weights; use --engine.rollout-precision same"
            )
        copied = Float8Copy(self.models.behaviour)
        self.models.after_load.append(copied.refresh)
        self.reasons.lines.append(
            f"rollouts in float8, INEXACT: {len(copied.layers)} linear layers; gradient and evaluations are exact"
        )
        return copied.transformer

    def _in_float8(self, transformer: ModelMixin) -> bool:
        return transformer is self.rollout_transformer is not self.models.behaviour

    def drawn(self, samples: int) -> int:
        """Rows of a rollout's forward for one batch, with its padding, over the forwards that a sample takes."""
        if self.choices.cuda_graphs:
            samples = self.sizes.rollout
        each = Guidance(self.config.rollout.guidance_scale).forwards
        if self.choices.compile:
            with torch.no_grad():
                return self._batches(self.rollout_transformer).padded(samples * each) // each
        return samples

    @property
    def checkpoint(self) -> Callable[[ModelMixin], None] | None:
        """Checkpoints the blocks of a model without data as those of the policy are; None if they are not."""
        kind = self.config.engine.checkpointing
        if kind == "none":
            return None
        return partial(checkpoint_blocks, kind=kind, again=lambda: FusedAttention(flash_attention))

    def measured(self) -> dict[str, str]:
        """The choices made by measurement, ready for JSON; another measurement could give others."""
        names = ("attention", "train_attention", "linear")
        return {"device": device_name(self.models.device), **{name: getattr(self.choices, name) for name in names}}

    def adopt(self, measured: dict[str, str] | None) -> None:
        """Adopts the choices of another process or of the resumed run, so that it computes the same.

        Choices that a setting makes by name stay. Nothing is adopted if `measured` is of another device.
        """
        if measured is None or measured["device"] != device_name(self.models.device):
            return
        adopted: JsonObject = {}
        if self.config.engine.attention == "auto":
            adopted |= {name: measured[name] for name in ("attention", "train_attention")}
        if self.config.engine.linear == "auto":
            adopted["linear"] = measured["linear"]
        self.choices = replace(self.choices, **adopted)
        self._apply()

    def _apply(self) -> None:
        for transformer in self._transformers():
            trained = transformer is self.models.policy
            self.family.set_attention(transformer, self.choices.train_attention if trained else self.choices.attention)
            use_epilogue(transformer, False)
            use_onednn(transformer, self.choices.linear == "onednn")
            # The policy's forwards agree with one another, with a gradient or without.
            use_epilogue(transformer, self.choices.epilogue and not (trained or self._in_float8(transformer)))

    def attention_rows(self) -> list[JsonObject]:
        """The attention kernels that were timed, for a report: a dictionary each (`profiling.build.candidates`)."""
        return [
            {
                "for": f"attention of {purpose}",
                "name": t.name,
                "forward_ms": t.forward_ms,
                "backward_ms": t.backward_ms,
                "obstacle": t.obstacle,
                "chosen": t.name == getattr(self.choices, attribute),
            }
            for purpose, attribute in (("rollouts", "attention"), ("training", "train_attention"))
            for t in self.reasons.timings.get(purpose, ())
        ]

    def decoder_rows(self, latent: tuple[int, ...]) -> list[JsonObject]:
        """All ways of decoding, timed now with a whole batch of (C, H, W) latents: as `attention_rows`."""
        used, count = self.decoder, self.decoder.batch_size
        decoders = {
            way: Decoder(used.original, count, way=way, compiled=self.choices.compile, overlap=False, note=used.note)
            for way in (WAYS if has_own_decoder(used.original) else ())
            if way != self.choices.decoder
        } | {self.choices.decoder: used}
        latents = torch.randn(count, *latent, device=self.models.device)
        return [
            {
                "for": f"decoding {count} images",
                "name": name,
                "forward_ms": milliseconds,
                "backward_ms": None,
                "obstacle": "",
                "chosen": name == self.choices.decoder,
            }
            for name, milliseconds in zip(decoders, decoder_ms(list(decoders.values()), latents), strict=True)
        ]

    def _transformers(self) -> tuple[ModelMixin, ...]:
        models = self.models
        return tuple(dict.fromkeys((models.base, models.behaviour, models.policy, self.rollout_transformer)))

    def _batches(self, transformer: ModelMixin) -> StaticBatches:
        """Sizes of the whole batches that a transformer gets; with guidance there are two rows a sample."""
        config, sizes, objective = self.config, self.sizes, traits(self.config)
        # At the first noise level, or at the end of all levels that are predicted together.
        shared = [sizes.groups] if self.choices.share_first_level else []
        if transformer is self.models.policy:
            micro, group = sizes.training, config.kept_images
            whole_groups = micro // group * group or micro
            training = [2 * micro] if objective.guided_policy else [whole_groups, micro, 2 * micro]
            few = [min(sizes.groups, micro)] if shared else []
            frozen = [sizes.frozen] if objective.frozen_policy else [sizes.policy, 2 * sizes.policy]
            return StaticBatches([*frozen, *shared], training=[*training, *few])
        if transformer is self.models.base:
            one, two = [sizes.frozen, *shared], [2 * rows for rows in (sizes.frozen, *shared)]
            return StaticBatches(two if objective.guided_base else [*one, 2 * sizes.frozen])
        drawn = sizes.rollout * Guidance(config.rollout.guidance_scale).forwards
        shown = sizes.evaluation * Guidance(config.evaluation.guidance_scale).forwards
        return StaticBatches([drawn, shown, sizes.frozen, *shared])

    @property
    def _width(self) -> int:
        """Of the transformer: that of its first block."""
        blocks = self.family.blocks(self.models.base)
        layers = (layer for block in blocks for layer in block.modules() if isinstance(layer, torch.nn.Linear))
        return next(layers).in_features

    def _workload(
        self, latent: tuple[int, ...], shown: tuple[int, ...], text_tokens: int, pipeline: DiffusionPipeline
    ) -> Workload:
        config, family, rollout = self.config, self.family, self.config.rollout
        # Kernels differ in rounding: any number of processes takes those that one alone would take.
        sizes = batch_sizes(config, processes=1)
        rows = sizes.rollout * Guidance(rollout.guidance_scale).forwards
        drawn = family.attention_shapes(rows, latent, text_tokens)
        if shown != latent:
            rows = sizes.evaluation * Guidance(config.evaluation.guidance_scale).forwards
            drawn += family.attention_shapes(rows, shown, text_tokens)
        return Workload(
            device=self.models.device,
            dtype=self.models.dtype,
            rollout_shapes=drawn,
            train_shapes=family.attention_shapes(sizes.training, latent, text_tokens),
            width=self._width,
            images=config.iterations * rollout.groups * rollout.group_size,
            sharded=self.models.shards is not None,
            shared_sigma=traits(config).shared_sigma,
            attention_names=family.attention_names,
            own_decoder=has_own_decoder(pipeline.vae),
        )
