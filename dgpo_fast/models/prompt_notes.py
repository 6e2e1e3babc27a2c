"""What of its prompts a pipeline does not read, in lines for the user. diffusers cuts long prompts without a word."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

from diffusers import StableDiffusion3Pipeline
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dgpo_fast.errors import UserError
from dgpo_fast.models.loading import first_line, has_t5, lacks_text_encoders, text_encoders
from dgpo_fast.prompts import Prompt
from dgpo_fast.prompts.unread import Reader, tokenizing, unread_ends


def prompt_notes(
    pipeline: StableDiffusion3Pipeline, max_sequence_length: int, prompts: Sequence[Prompt], guided: bool
) -> list[str]:
    """A line on the prompts, and one on the negative prompts, that are longer than what is read of them.

    Without guidance, a line says that no negative prompt is read.

    Args:
        pipeline: with its text encoders, or without: the tokenizers alone are read from its folder.
        max_sequence_length: tokens that T5 reads.
        prompts: each text counts once.
        guided: whether anything is drawn or trained with guidance.

    Raises UserError if the tokenizers cannot be loaded.
    """
    readers = _readers(pipeline, max_sequence_length)
    lines = [unread_ends((prompt.text for prompt in prompts), readers)]
    if guided:
        lines.append(unread_ends((prompt.negative for prompt in prompts), readers, "negative prompt"))
    elif any(prompt.negative for prompt in prompts):
        lines.append("negative prompts are not read: guidance is off (guidance_scale 1)")
    return list(filter(None, lines))


def _readers(pipeline: StableDiffusion3Pipeline, max_sequence_length: int) -> list[Reader]:
    if not (lacks_text_encoders(pipeline) or text_encoders(pipeline)):
        return []  # random embeddings stand for prompts
    load = cache(partial(_load, pipeline))  # most prompts are short: then the others are not needed
    readers = [Reader("CLIP", load("tokenizer").model_max_length, lambda texts: _most_tokens(load, texts))]
    if has_t5(pipeline):
        readers.append(Reader("T5", max_sequence_length, lambda texts: tokenizing(load("tokenizer_3"))(texts)))
    return readers


def _load(pipeline: StableDiffusion3Pipeline, part: str) -> PreTrainedTokenizerBase:
    loaded = getattr(pipeline, part, None)
    if loaded is not None:
        return loaded
    folder = Path(pipeline.name_or_path) / part
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}") from error


def _most_tokens(load: Callable[[str], PreTrainedTokenizerBase], texts: list[str]) -> list[Sequence[int]]:
    """Those of the tokenizer that makes more of a text. Both CLIPs of Stable Diffusion 3 have one vocabulary."""
    first, second = load("tokenizer"), load("tokenizer_2")
    if first.get_vocab() == second.get_vocab():
        return list(tokenizing(first)(texts))
    both = zip(tokenizing(first)(texts), tokenizing(second)(texts), strict=True)
    return [max(of_text, key=len) for of_text in both]
