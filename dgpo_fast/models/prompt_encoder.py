"""Prompts as the transformer reads them, each distinct prompt encoded once."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import StableDiffusion3Pipeline

from dgpo_fast.config.options import Config
from dgpo_fast.distributed.guard import finite_remedy
from dgpo_fast.errors import UserError
from dgpo_fast.models.loading import has_t5, lacks_text_encoders, load_text_encoders, passes_by_layer
from dgpo_fast.models.prompt_cache import PromptCache, Row, content_digest, default_folder
from dgpo_fast.models.text_embeds import TextEmbeds
from dgpo_fast.prompts.prompt import Prompt, shorten
from dgpo_fast.wording import counted

FILE_OVERHEAD_BYTES = 1024
"""What a cached prompt's file holds beside its embeddings, at most."""


class PromptEncoder:
    """Encodes prompts with a pipeline's own text encoders, and remembers them in memory and on disk.

    A pipeline without text encoders gets them from its folder when a prompt is first found nowhere, and they leave
    again as soon as `prepare` has seen to all prompts.

    Raises UserError if the pipeline has a T5 encoder and `max_sequence_length` is 0.

    Args:
        pipeline: the pipeline; embeddings go to its transformer's device.
        max_sequence_length: tokens of the T5 part.
        cache: encoded prompts on disk, if wanted.
        memory_mib: CPU memory for remembered prompts, in MiB; the least recently used are forgotten.
    """

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        max_sequence_length: int,
        cache: PromptCache | None = None,
        memory_mib: int = 2048,
    ):
        if max_sequence_length == 0 and has_t5(pipeline):
            raise UserError(
                "rollout.max_sequence_length 0: this pipeline has a T5 encoder; give it tokens, as in "
                "--rollout.max-sequence-length 128"
            )
        self.pipeline = pipeline
        self.encoders = None if lacks_text_encoders(pipeline) else pipeline
        self.device, self.dtype = pipeline.transformer.device, pipeline.transformer.dtype
        self.max_sequence_length = max_sequence_length
        self.cache = cache
        self.memory_bytes = memory_mib * 2**20
        self.memory: OrderedDict[str, Row] = OrderedDict()
        self.remembered_bytes = 0
        self.encoded_count = 0

    def __call__(self, prompts: Sequence[str], negative: Sequence[str] | None = None) -> TextEmbeds:
        """(B,) texts, and (B,) negative prompts → embeddings on the transformer's device, in the encoders' dtype.

        Without `negative`, the negative prompts are empty.
        """
        negative = negative or [""] * len(prompts)
        rows = {text: self._find(text) or self._encode(text) for text in dict.fromkeys([*prompts, *negative])}
        for text, row in rows.items():
            self._remember(text, row)
        number = {text: index for index, text in enumerate(rows)}
        index, negative_index = (
            torch.tensor([number[text] for text in texts], device=self.device) for texts in (prompts, negative)
        )
        tokens, pooled = (torch.stack(tensors).to(self.device) for tensors in zip(*rows.values(), strict=True))
        return TextEmbeds(tokens, pooled, index, negative_index)

    def prepare(self, prompts: Sequence[Prompt], on_step: Callable[[float], None] | None = None) -> str:
        """Encodes a run's prompts and negative prompts before training, so that the text encoders can be unloaded.

        If not all prompts fit in the cache, they are encoded when they are needed, and the encoders stay.

        Args:
            prompts: all prompts that the run will use.
            on_step: called with the share of the missing prompts that is encoded.

        Returns:
            One line on what was done.
        """
        distinct = list(dict.fromkeys(text for prompt in prompts for text in (prompt.negative, prompt.text)))
        missing = [text for text in distinct if not self._is_known(text)]
        # They are no prompts of the user's, who would count some too many.
        negative = {prompt.negative for prompt in prompts}.difference(prompt.text for prompt in prompts)
        of_them = "the empty one" if negative == {""} else f"{counted(len(negative), 'negative one')}"
        what = f"prompts, {of_them} with them" if negative else "prompts"
        if missing and not self._has_room(distinct, missing):
            return (
                f"{what}: {len(distinct) - len(missing)} of {len(distinct)} were encoded before; "
                "the others do not all fit in the cache and are encoded when needed"
            )
        for count, text in enumerate(missing, 1):
            self._remember(text, self._find(text) or self._encode(text))
            if on_step:
                on_step(count / len(missing))
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

    def whole_pipeline(self) -> StableDiffusion3Pipeline:
        """The pipeline with its text encoders, as for saving it."""
        if self.encoders is None or passes_by_layer(self.encoders):
            return load_text_encoders(self.pipeline, torch.device("cpu"), self.dtype)
        return self.encoders

    def _find(self, text: str) -> Row | None:
        return self.memory.get(text) or (self.cache.load(text) if self.cache else None)

    def _is_known(self, text: str) -> bool:
        return text in self.memory or (self.cache is not None and self.cache.touch(text))

    @torch.no_grad()
    def _encode(self, text: str) -> Row:
        # One at a time: in a batch, the last bits of an embedding would depend on the prompts beside it, and a resumed
        # run, which has other prompts left to encode, would drift away from one that was never stopped.
        if self.encoders is None:
            self.encoders = load_text_encoders(self.pipeline, self.device, self.dtype)
        prompt, _, pooled, _ = self.encoders.encode_prompt(
            text,
            text,
            text,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
        )
        row = prompt[0].cpu(), pooled[0].cpu()
        if not all(torch.isfinite(part).all() for part in row):
            raise UserError(
                f"the text encoders gave NaN or infinity for the prompt {shorten(text)}: "
                f"{finite_remedy(self.dtype, begun=False)}"
            )
        self.encoded_count += 1
        if self.cache:
            self.cache.save(text, row)
        return row

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
        row = self._find(missing[0]) or self._encode(missing[0])
        self._remember(missing[0], row)
        size = _nbytes(row) + FILE_OVERHEAD_BYTES
        if len(prompts) * size <= self.memory_bytes:
            return True
        total, new = len(prompts) * size, len(missing) * size
        return self.cache is not None and self.cache.has_room(total_bytes=total, new_bytes=new)

    def _dismiss(self) -> None:
        if lacks_text_encoders(self.pipeline):
            self.encoders = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def make_prompt_encoder(
    pipeline: StableDiffusion3Pipeline, config: Config, note: Callable[[str], None]
) -> PromptEncoder:
    """The encoder that `config` asks for, with its cache on disk if `pipeline` comes from a folder.

    Args:
        pipeline: loaded without text encoders, so that they can stay away.
        config: the run's settings.
        note: called with one line for each problem with the cache.
    """
    length = config.rollout.max_sequence_length
    if config.prompt_cache == "off" or not lacks_text_encoders(pipeline):
        return PromptEncoder(pipeline, length)
    folder = default_folder() if config.prompt_cache == "auto" else Path(config.prompt_cache).expanduser()
    try:
        scope = cache_scope(pipeline, length, content_digest(Path(pipeline.name_or_path), folder))
    except OSError as error:
        raise UserError(f"model '{config.model}' cannot be read: {error.filename}: {error.strerror}") from None
    return PromptEncoder(pipeline, length, PromptCache(folder, scope, int(config.prompt_cache_gib * 2**30), note))


def cache_scope(pipeline: StableDiffusion3Pipeline, max_sequence_length: int, encoders: str) -> dict[str, str | int]:
    """All that the bits of an embedding depend on, but the prompt: a cached run equals one without a cache."""
    device = pipeline.transformer.device
    on_cpu = f"CPU {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return {
        "encoders": encoders,
        "dtype": str(pipeline.transformer.dtype),
        "max_sequence_length": max_sequence_length,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu,
        "matmul_precision": torch.get_float32_matmul_precision(),
        **{library.__name__: library.__version__ for library in (torch, transformers, diffusers)},
    }


def _nbytes(row: Row) -> int:
    return sum(tensor.nbytes for tensor in row)
