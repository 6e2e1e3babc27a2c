"""What of its prompts a pipeline does not read, in lines for the user. diffusers cuts long prompts without a word."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

from diffusers import DiffusionPipeline
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dgpo_fast.errors import UserError
from dgpo_fast.models.family import TextLimit, family_of
from dgpo_fast.models.loading import UNLOADABLE, first_line, reads_no_text
from dgpo_fast.prompts import Prompt
from dgpo_fast.prompts.unread import Reader, tokenizing, unread_ends


def prompt_notes(
    pipeline: DiffusionPipeline, max_sequence_length: int, prompts: Sequence[Prompt], guided: bool
) -> list[str]:
    """A line on the prompts, and one on the negative prompts, that are longer than what is read of them.

    Without guidance, a line says that no negative prompt is read.

    Args:
        pipeline: with its text encoders, or without: the tokenizers alone are read from its folder.
        max_sequence_length: as `rollout.max_sequence_length`.
        prompts: each text counts once.
        guided: whether anything is drawn or trained with guidance.

    Raises UserError if the tokenizers cannot be loaded.
    """
    readers, family = _readers(pipeline, max_sequence_length), family_of(pipeline.transformer)
    lines = [unread_ends((prompt.text for prompt in prompts), readers)]
    if guided:
        lines.append(unread_ends((prompt.negative for prompt in prompts), readers, "negative prompt"))
    elif any(prompt.negative for prompt in prompts):
        why = "guidance is off (guidance_scale)" if family.reads_negatives else f"{family.title} is not guided by them"
        lines.append(f"negative prompts are not read: {why}")
    return list(filter(None, lines))


def _readers(pipeline: DiffusionPipeline, max_sequence_length: int) -> list[Reader]:
    if reads_no_text(pipeline):
        return []  # random embeddings stand for prompts
    load = cache(partial(_load, pipeline))  # most prompts are short: then the others are not needed
    return [_reader(load, limit) for limit in family_of(pipeline.transformer).text_limits(max_sequence_length)]


def _reader(load: Callable[[str], PreTrainedTokenizerBase], limit: TextLimit) -> Reader:
    tokens = load(limit.tokenizers[0]).model_max_length if limit.tokens is None else limit.tokens
    return Reader(limit.reader, tokens, lambda texts: _most_tokens([load(name) for name in limit.tokenizers], texts))


def _load(pipeline: DiffusionPipeline, part: str) -> PreTrainedTokenizerBase:
    loaded = getattr(pipeline, part, None)
    if loaded is not None:
        return loaded
    folder = Path(pipeline.name_or_path) / part
    try:
        return AutoTokenizer.from_pretrained(folder)
    except UNLOADABLE as error:
        raise UserError(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}") from error


def _most_tokens(tokenizers: Sequence[PreTrainedTokenizerBase], texts: list[str]) -> list[Sequence[int]]:
    """Those of the tokenizer that makes more of a text. Both CLIPs of Stable Diffusion 3 have one vocabulary."""
    first, *others = tokenizers
    different = [first, *(other for other in others if other.get_vocab() != first.get_vocab())]
    of_each = [tokenizing(tokenizer)(texts) for tokenizer in different]
    return [max(of_text, key=len) for of_text in zip(*of_each, strict=True)]
