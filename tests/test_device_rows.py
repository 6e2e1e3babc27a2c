"""Encoded prompts stay on the device: those that were there before are neither encoded, stacked nor copied."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dgpo_fast.models.device_rows import DeviceRows
from dgpo_fast.models.family import Family, Rows
from dgpo_fast.models.loading import load_pipeline
from dgpo_fast.models.prompt_encoder import PromptEncoder
from dgpo_fast.prompts import Prompt
from tests.sd3 import medium

CPU = torch.device("cpu")


class LargestMade(TorchDispatchMode):
    """The most bytes that any operation under it has made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, tensor.nbytes)
        return out


def test_an_iteration_with_prompts_seen_before_copies_nothing(random_pipeline: Path) -> None:
    """A subset in another order too: all that is made are the indices of samples."""
    pipeline = load_pipeline(str(random_pipeline), revision=None, device=CPU, dtype=torch.float32)
    encoder = PromptEncoder(pipeline, 9)
    with LargestMade() as first:
        begun = encoder(["a cat", "a dog", "a house"])
    with LargestMade() as again:
        same = encoder(["a house", "a cat"])
    assert first.bytes >= begun.rows["prompt"].nbytes and again.bytes <= 2 * 8
    assert all(rows.data_ptr() == begun.rows[name].data_ptr() for name, rows in same.rows.items())
    assert torch.equal(same.gathered()["prompt"], begun.gathered()["prompt"][[2, 0]])
    assert encoder.encoded_count == 4


def numbered(key: str) -> Rows:
    return {"prompt": torch.full((3, 2), float(key)), "pooled": torch.full((2,), float(key))}


def test_what_was_handed_out_stays_as_it_is() -> None:
    """While rows are added, when their tensors grow, and when new ones are begun."""
    rows, asked = DeviceRows(medium(), CPU, kept_bytes=5 * 32), []

    def find(key: str) -> Rows:
        asked.append(key)
        return numbered(key)

    handed = []
    for keys in (["0", "1"], ["1", "2"], ["3"], ["0", "4"], ["5", "1"], ["6", "7", "8", "9", "10", "11"]):
        found, places = rows(keys, find)
        handed.append([(float(key), found["pooled"][places[key]], found["prompt"][places[key]]) for key in keys])
        assert len(next(iter(rows.tensors.values()))) <= max(5, len(keys))
    assert asked == ["0", "1", "2", "3", "4", "5", "1", "6", "7", "8", "9", "10", "11"]
    for value, pooled, prompt in (each for of_call in handed for each in of_call):
        assert (pooled == value).all() and (prompt == value).all()


class Ragged(Family):
    """Prompts of as many tokens as letters, padded to a multiple of four with a mask."""

    pads_to = 4

    def __init__(self) -> None:
        """Without a model."""

    def text_tokens(self, rows: Rows) -> int:
        return rows["prompt"].shape[-1]

    def stack(self, rows: Sequence[Rows], tokens: int) -> Rows:
        padded = [torch.nn.functional.pad(row["prompt"], (0, tokens - len(row["prompt"]))) for row in rows]
        return {"prompt": torch.stack(padded)}


Ragged.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]


def test_a_bucket_only_grows() -> None:
    """All rows are as long as the longest prompt that is known, rounded up."""
    rows = DeviceRows(Ragged(), CPU)
    find = lambda key: {"prompt": torch.ones(len(key))}  # noqa: E731
    lengths = []
    for keys in (["abc"], ["abcde", "a"], ["a"], ["abc", "b"]):
        found, places = rows(keys, find)
        lengths.append(found["prompt"].shape[1])
        assert [int(found["prompt"][places[key]].sum()) for key in keys] == list(map(len, keys))
    assert lengths == [4, 8, 8, 8]
    rows.reserve(9)
    assert rows(["a"], find)[0]["prompt"].shape == (1, 12)


def test_a_negative_prompt_is_its_own_if_its_family_says_so(
    random_pipeline: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipeline = load_pipeline(str(random_pipeline), revision=None, device=CPU, dtype=torch.float32)
    shared = PromptEncoder(pipeline, 9)
    text = shared(["a cat", "a dog"], ["a cat", ""])
    assert text.negative_index is not None and text.negative_index[0] == text.index[0] and shared.encoded_count == 3
    family = type(shared.family)
    encode, asked = family.encode, []

    def recorded(self: Family, pipeline: Any, text: str, length: int, *, negative: bool) -> Rows:
        asked.append((text, negative))
        return encode(self, pipeline, text, length, negative=negative)

    monkeypatch.setattr(family, "negatives_differ", True)
    monkeypatch.setattr(family, "encode", recorded)
    apart = PromptEncoder(pipeline, 9)
    apart.prepare([Prompt("a cat", negative="a cat")])
    text = apart(["a cat"], ["a cat"])
    assert text.negative_index is not None and text.negative_index[0] != text.index[0]
    assert sorted(asked) == [("a cat", False), ("a cat", True)]
