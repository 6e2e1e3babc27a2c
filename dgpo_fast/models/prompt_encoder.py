"""Prompts as the transformer reads them, each distinct prompt encoded once and copied to the device once."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline

from dgpo_fast.config.options import Config
from dgpo_fast.distributed.guard import finite_remedy
from dgpo_fast.errors import UserError
from dgpo_fast.models.device_rows import DeviceRows
from dgpo_fast.models.family import family_of
from dgpo_fast.models.loading import (
    lacks_text_encoders,
    load_text_encoders,
    passes_by_layer,
    reads_no_text,
    text_encoders,
)
from dgpo_fast.models.prompt_cache import PromptCache, Row, content_digest, default_folder
from dgpo_fast.models.quantised import SAME, quantise
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.prompts.prompt import Prompt, shorten
from dgpo_fast.wording import counted

NEGATIVE = "\x00negative\x00"
"""Stands before a text that is encoded as a negative prompt, where that differs."""
FILE_OVERHEAD_BYTES = 1024
"""What a cached prompt's file holds beside its embeddings, at most."""


class PromptEncoder:
    """Encodes prompts with a pipeline's own text encoders, and remembers them in memory and on disk.

    A pipeline without text encoders gets them from its folder when a prompt is first found nowhere, and they leave
    again as soon as `prepare` has seen to all prompts.

    A prompt and a negative prompt of the same text are one, unless the model's family encodes them differently.

    Raises UserError if prompts cannot be encoded with that `max_sequence_length`.

    Args:
        pipeline: the pipeline; embeddings go to its transformer's device.
        max_sequence_length: as `rollout.max_sequence_length`.
        cache: encoded prompts on disk, if wanted.
        memory_mib: CPU memory for remembered prompts, in MiB; the least recently used are forgotten.
        precision: as `text_precision`.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        max_sequence_length: int,
        cache: PromptCache | None = None,
        memory_mib: int = 2048,
        precision: str = SAME,
    ):
        self.pipeline, self.family = pipeline, family_of(pipeline.transformer)
        self.reads_no_text = reads_no_text(pipeline)
        if not self.reads_no_text:
            self.family.check_length(max_sequence_length)
        self.encoders = None if lacks_text_encoders(pipeline) else pipeline
        self.device, self.dtype = pipeline.transformer.device, pipeline.transformer.dtype
        self.max_sequence_length, self.precision = max_sequence_length, precision
        self.cache = cache
        self.memory_bytes = memory_mib * 2**20
        self.memory: OrderedDict[str, Row] = OrderedDict()
        self.remembered_bytes = 0
        self.encoded_count = 0
        self.on_device = DeviceRows(self.family, self.device)

    def __call__(self, prompts: Sequence[str], negative: Sequence[str] | None = None) -> TextEmbeds:
        """(B,) texts, and (B,) negative prompts → embeddings on the transformer's device, in the encoders' dtype.

        Without `negative`, the negative prompts are empty.
        """
        keys = list(prompts), [self._key(text, negative=True) for text in negative or [""] * len(prompts)]
        distinct = list(dict.fromkeys(chain(*keys)))
        rows, places = self.on_device(distinct, self._row)
        for key in distinct:
            if key in self.memory:
                self.memory.move_to_end(key)
        index, negative_index = (
            torch.tensor([places[key] for key in of_samples], device=self.device) for of_samples in keys
        )
        return TextEmbeds(rows, index, negative_index)

    def text_tokens(self) -> int:
        """Text tokens of a forward; the most that there can be if prompts are padded to the longest of a run."""
        tokens = self.family.text_tokens(self([""]).rows)
        return max(tokens, self.max_sequence_length) if self.family.pads_to else tokens

    def prepare(self, prompts: Sequence[Prompt], on_step: Callable[[float], None] | None = None) -> str:
        """Encodes a run's prompts and negative prompts before training, so that the text encoders can be unloaded.

        If not all prompts fit in the cache, they are encoded when they are needed, and the encoders stay.

        Args:
            prompts: all prompts that the run will use.
            on_step: called with the share of the missing prompts that is encoded.

        Returns:
            One line on what was done.
        """
        keys = ((self._key(prompt.negative, negative=True), prompt.text) for prompt in prompts)
        distinct = list(dict.fromkeys(chain.from_iterable(keys)))
        missing = [key for key in distinct if not self._is_known(key)]
        # They are no prompts of the user's, who would count some too many.
        negative = {prompt.negative for prompt in prompts}.difference(prompt.text for prompt in prompts)
        of_them = "the empty one" if negative == {""} else f"{counted(len(negative), 'negative one')}"
        what = f"prompts, {of_them} with them" if negative else "prompts"
        if missing and not self._has_room(distinct, missing):
            return (
                f"{what}: {len(distinct) - len(missing)} of {len(distinct)} were encoded before; "
                "the others do not all fit in the cache and are encoded when needed"
            )
        for count, key in enumerate(missing, 1):
            self._row(key)
            if on_step:
                on_step(count / len(missing))
        if self.family.pads_to:  # one length for all, from the first forward on
            self.on_device.reserve(max(self.family.text_tokens(self._row(key)) for key in distinct))
        loaded = self.encoders is not None
        which = ""
        if self.encoders is not None and passes_by_layer(self.encoders):
            which = " (which did not fit: they passed layer by layer)"
        if all(self._is_known(text) for text in missing):
            self._dismiss()
        stays = "stay loaded" if self.encoders else "are unloaded again" if loaded else "need not be loaded"
        now = min(self.encoded_count, len(distinct))
        before = f"{len(distinct) - now} of {len(distinct)} were encoded before"
        return f"{what}: {before}, {now} now; the text encoders{which} {stays}"

    def whole_pipeline(self) -> DiffusionPipeline:
        """The pipeline with its text encoders, as for saving it."""
        if lacks_text_encoders(self.pipeline):
            return load_text_encoders(self.pipeline, torch.device("cpu"), self.dtype, whole=True)
        return self.pipeline

    def _key(self, text: str, *, negative: bool) -> str:
        """What an encoded text is remembered by: the text itself, unless it is one that is encoded as a negative."""
        return f"{NEGATIVE}{text}" if negative and self.family.negatives_differ else text

    def _row(self, key: str) -> Row:
        row = self._find(key) or self._encode(key)
        self._remember(key, row)
        return row

    def _find(self, text: str) -> Row | None:
        return self.memory.get(text) or (self.cache.load(text) if self.cache else None)

    def _is_known(self, text: str) -> bool:
        return text in self.memory or (self.cache is not None and self.cache.touch(text))

    @torch.no_grad()
    def _encode(self, key: str) -> Row:
        # One at a time: in a batch, the last bits of an embedding would depend on the prompts beside it, and a resumed
        # run, which has other prompts left to encode, would drift away from one that was never stopped.
        negative, text = key.startswith(NEGATIVE), key.removeprefix(NEGATIVE)
        if self.encoders is None:
            self.encoders = load_text_encoders(self.pipeline, self.device, self.dtype, self.precision)
        if self.reads_no_text:
            found = self.family.random_condition(key, self.max_sequence_length)
            found = {name: tensor.to(self._dtype_of(tensor)) for name, tensor in found.items()}
        else:
            found = self.family.encode(self.encoders, text, self.max_sequence_length, negative=negative)
        row = {name: tensor.cpu() for name, tensor in found.items()}
        if not all(torch.isfinite(part).all() for part in row.values()):
            raise UserError(
                f"the text encoders gave NaN or infinity for the prompt {shorten(text)}: "
                f"{finite_remedy(self.dtype, begun=False)}"
            )
        self.encoded_count += 1
        if self.cache:
            self.cache.save(key, row)
        return row

    def _dtype_of(self, tensor: torch.Tensor) -> torch.dtype:
        return self.dtype if tensor.is_floating_point() else tensor.dtype

    def _remember(self, text: str, row: Row) -> None:
        if text not in self.memory:
            self.remembered_bytes += _nbytes(row)
        self.memory[text] = row
        self.memory.move_to_end(text)
        while self.remembered_bytes > self.memory_bytes:
            _, forgotten = self.memory.popitem(last=False)
            self.remembered_bytes -= _nbytes(forgotten)

    def _has_room(self, prompts: Sequence[str], missing: Sequence[str]) -> bool:
        """Whether all `prompts` will be in the cache, or in memory, once the `missing` are encoded."""
        size = _nbytes(self._row(missing[0])) + FILE_OVERHEAD_BYTES
        if len(prompts) * size <= self.memory_bytes:
            return True
        total, new = len(prompts) * size, len(missing) * size
        return self.cache is not None and self.cache.has_room(total_bytes=total, new_bytes=new)

    def _dismiss(self) -> None:
        if lacks_text_encoders(self.pipeline):
            self.encoders = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def make_prompt_encoder(pipeline: DiffusionPipeline, config: Config, note: Callable[[str], None]) -> PromptEncoder:
    """The encoder that `config` asks for, with its cache on disk if `pipeline` comes from a folder.

    Args:
        pipeline: loaded without text encoders, so that they can stay away.
        config: the run's settings.
        note: called with one line for each problem with the cache.
    """
    length, precision = config.rollout.max_sequence_length, config.text_precision
    if precision != SAME:
        for module in text_encoders(pipeline):  # random ones, which are there already
            quantise(module, precision, pipeline.transformer.device)
    if config.prompt_cache == "off" or not lacks_text_encoders(pipeline):
        return PromptEncoder(pipeline, length, precision=precision)
    folder = default_folder() if config.prompt_cache == "auto" else Path(config.prompt_cache).expanduser()
    try:
        scope = cache_scope(pipeline, length, content_digest(Path(pipeline.name_or_path), folder), precision)
    except OSError as error:
        raise UserError(f"model '{config.model}' cannot be read: {error.filename}: {error.strerror}") from None
    cache = PromptCache(folder, scope, int(config.prompt_cache_gib * 2**30), note)
    return PromptEncoder(pipeline, length, cache, precision=precision)


def cache_scope(
    pipeline: DiffusionPipeline, max_sequence_length: int, encoders: str, precision: str = SAME
) -> dict[str, str | int]:
    """All that the bits of an embedding depend on, but the prompt: a cached run equals one without a cache."""
    device = pipeline.transformer.device
    on_cpu = f"CPU {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    family = family_of(pipeline.transformer)
    return {
        "encoders": encoders,
        "family": f"{type(family).__module__}:{type(family).__qualname__}",
        "dtype": str(pipeline.transformer.dtype),
        "max_sequence_length": max_sequence_length,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu,
        "matmul_precision": torch.get_float32_matmul_precision(),
        **({} if precision == SAME else {"text_precision": precision}),
        **{library.__name__: library.__version__ for library in (torch, transformers, diffusers)},
    }


def _nbytes(row: Row) -> int:
    return sum(tensor.nbytes for tensor in row.values())
