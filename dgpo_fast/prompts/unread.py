"""What of a user's prompts nothing reads: keys of a line, text beyond an encoder's limit, further quoted texts.

Each is said in one line before a run or an evaluation begins.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dgpo_fast.prompts.prompt import NEGATIVE_KEY, Prompt, quoted_texts
from dgpo_fast.wording import counted, one_line

READ_KEYS = frozenset(("prompt", "tag", "include", "reward", NEGATIVE_KEY))
"""Keys of a prompt's metadata that are read whatever the rewards are."""
GENEVAL_ENTRY = frozenset(("class", "count", "color", "position"))
"""Keys of an entry of GenEval's `include` and `exclude`."""
SHOWN_KEYS = 12
SPECIAL_TOKENS = 2
"""Most tokens that a tokenizer adds to those of the text."""
CHUNK = 4096
"""Texts that are tokenised together."""


def unread_keys(prompts: Iterable[Prompt], reads: Iterable[str]) -> list[str]:
    """For each prompt file, a line that names the keys or columns of its lines that nothing reads.

    Args:
        prompts: those of a run; only those from files count.
        reads: keys of the metadata that its rewards read.
    """
    known = READ_KEYS.union(reads)
    found: dict[str, dict[str, None]] = {}
    for prompt in prompts:
        unread = [key for key in prompt.metadata if key not in known]
        for part in ("include", "exclude"):
            entries = prompt.metadata.get(part) if part in known else None
            for entry in entries if isinstance(entries, list) else ():
                unread += [f"{part}.{key}" for key in entry if key not in GENEVAL_ENTRY]
        if unread and prompt.origin:
            found.setdefault(prompt.origin.rpartition(":")[0], {}).update(dict.fromkeys(unread))
    lines = []
    for file, keys in found.items():
        what = "keys" if file.endswith(".jsonl") else "columns"
        shown = ", ".join(one_line(key) for key in itertools.islice(keys, SHOWN_KEYS))
        more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
        lines.append(f"{file}: these {what} are not read: {shown}{more}")
    return lines


def unread_quotes(prompts: Sequence[Prompt]) -> str | None:
    """A line that counts the prompts of which the first quoted text is taken, though another one is quoted too."""
    several = [prompt for prompt in prompts if len(set(quoted_texts(prompt.text))) > 1]
    if not several:
        return None
    where = f" (the first: {several[0].origin})" if several[0].origin else ""
    return (
        f"in {len(several)} of {counted(len(prompts), 'prompt')} the first quoted text is taken, although others are "
        f"quoted{where}: write says before the words to be drawn"
    )


@dataclass(frozen=True)
class Reader:
    """What reads texts up to a number of tokens.

    Attributes:
        name: in messages.
        limit: tokens that are read of a text, special ones among them.
        tokenize: texts → all tokens of each, special ones among them.
    """

    name: str
    limit: int
    tokenize: Callable[[list[str]], Sequence[Sequence[int]]]


def unread_ends(texts: Iterable[str], readers: Sequence[Reader], what: str = "prompt") -> str | None:
    """A line that counts the distinct `texts` that are longer than the `readers` read; None if there are none.

    Texts that are one and the same up to the limits of all readers are counted too. Only texts that may be too long are
    tokenised: no text of plain letters has more tokens than letters.
    """
    distinct = list(dict.fromkeys(texts))
    read: dict[str, list[Hashable]] = {text: [] for text in distinct}
    longer: dict[Reader, int] = {}
    for reader in readers:
        heads, longer[reader] = _heads(distinct, reader)
        for text, parts in read.items():
            parts.append(heads.get(text, text))
    named = [(reader, count) for reader, count in longer.items() if count]
    if not named:
        return None
    (first, count), *others = named
    line = f"{count} of {counted(len(distinct), what)} {'is' if count == 1 else 'are'} longer than "
    line += f"{first.limit} tokens ({first.name})"
    line += "".join(f", {count} longer than {reader.limit} ({reader.name})" for reader, count in others)
    same = len(distinct) - len(set(map(tuple, read.values())))
    alike = f"; {same} of them {'is' if same == 1 else 'are'} then the same as another one" if same else ""
    return f"{line}: what follows is not read{alike}"


def tokenizing(tokenizer: Any) -> Callable[[list[str]], Sequence[Sequence[int]]]:
    """What `Reader.tokenize` is for a tokenizer of transformers."""
    return lambda texts: tokenizer(texts, truncation=False, verbose=False)["input_ids"]


def _heads(texts: Sequence[str], reader: Reader) -> tuple[dict[str, Hashable], int]:
    """What is read of the texts that reach the limit, and how many of them go beyond it."""
    heads: dict[str, Hashable] = {}
    longer = 0
    candidates = [text for text in texts if not text.isascii() or len(text) + SPECIAL_TOKENS >= reader.limit]
    for start in range(0, len(candidates), CHUNK):
        chunk = candidates[start : start + CHUNK]
        for text, tokens in zip(chunk, reader.tokenize(chunk), strict=True):
            longer += len(tokens) > reader.limit
            if len(tokens) >= reader.limit:
                heads[text] = tuple(tokens[: reader.limit - 1])  # the last token read is the end's
    return heads, longer
