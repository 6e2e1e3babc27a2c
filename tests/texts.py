"""Text files, and errors of one line."""

from pathlib import Path

import pytest

from dgpo_fast.errors import UserError
from dgpo_fast.prompts import Prompt
from dgpo_fast.prompts.geneval import geneval_prompt, prompt_count


def message(call, *arguments, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **keywords)
    text = str(caught.value)
    assert "\n" not in text
    return text


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def map_all(tag: str) -> list[Prompt]:
    return [geneval_prompt(tag, index) for index in range(prompt_count(tag))]
