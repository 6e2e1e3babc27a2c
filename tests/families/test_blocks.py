"""What a family says of its transformer's blocks and of its attention is what a forward does."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dgpo_fast.models.family import Family, Rows
from tests.engine.tape import TapeRecorder
from tests.families.case import Case
from tests.families.test_gradients import with_lora
from tests.families.test_pictures import CASES, PROMPTS, condition, noise_of


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Any, Family]:
    """The case, its pipeline and its family."""
    case = request.param
    pipeline = case.make()
    return case, pipeline, case.family_of(pipeline, tmp_path_factory.mktemp(case.name))


@pytest.mark.parametrize("train", ["lora", "full"])
def test_one_block_of_each_kind_saves_what_the_others_of_it_do(of: tuple[Case, Any, Family], train: str) -> None:
    case, pipeline, family = of
    config, counts = family.one_of_each_block()
    kinds = saved_by_block(case, pipeline, family, family.transformer_class.from_config(config), train)
    assert len(kinds) == len(counts)
    expected = [saved for saved, count in zip(kinds, counts, strict=True) for _ in range(count)]
    # Chroma's modulations are as many as its blocks.
    assert saved_by_block(case, pipeline, family, pipeline.transformer, train) == pytest.approx(expected, rel=0.01)


def test_attention_shapes_are_those_of_a_forward(of: tuple[Case, Any, Family]) -> None:
    case, pipeline, family = of
    given = condition(family, pipeline, PROMPTS, case.length)
    with torch.no_grad(), Attention() as seen:
        forward(case, family, pipeline.transformer, given, noise_of(family, case.size, len(PROMPTS)))
    shapes = family.attention_shapes(len(PROMPTS), family.latent_shape(*case.size), family.text_tokens(given))
    expected: Counter = Counter()
    for shape in shapes:
        expected[shape.batch, shape.tokens, shape.heads, shape.head_dim] += shape.calls
    assert seen.calls == expected
    assert [shape.tokens for shape in shapes] == sorted((shape.tokens for shape in shapes), reverse=True)


@torch.no_grad()
def test_a_forward_can_be_recorded(of: tuple[Case, Any, Family]) -> None:
    """By a recorder that is stricter than CUDA graphs: nothing comes from the host, nor waits for the device."""
    case, pipeline, family = of
    given, x_t = condition(family, pipeline, PROMPTS, case.length), noise_of(family, case.size, len(PROMPTS))
    plain = partial(forward, case, family, pipeline.transformer, given, x_t)
    recorded, replay = TapeRecorder().record(plain)
    for tensor in given.values():
        tensor.copy_(tensor.flip(0))
    replay()
    assert torch.equal(recorded, plain())


def forward(case: Case, family: Family, transformer: Any, given: Rows, x_t: Tensor) -> Tensor:
    """Velocities of a batch."""
    scale = family.guidance(max(case.scales.values())).embedded
    embedded = None if scale is None else torch.full((len(PROMPTS),), scale)
    return family.velocity(transformer, x_t, torch.full((len(PROMPTS),), 500.0), given, embedded)


def saved_by_block(case: Case, pipeline: Any, family: Family, transformer: Any, train: str) -> list[int]:
    """Bytes that each block saves for the backward pass: of no weight, and of nothing that was saved before it."""
    if train == "lora":
        transformer = with_lora(transformer, family.lora_targets)
    else:
        transformer = copy.deepcopy(transformer).requires_grad_(True)
    given = condition(family, pipeline, PROMPTS, case.length)
    known = {weight.untyped_storage().data_ptr() for weight in transformer.parameters()}
    saved: list[int] = []
    inside: list[torch.nn.Module] = []

    def enter(block: torch.nn.Module, *given: object) -> None:
        inside.append(block)
        saved.append(0)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if inside and storage.data_ptr() not in known:
            saved[-1] += storage.nbytes()
        known.add(storage.data_ptr())
        return tensor

    for block in family.blocks(transformer):
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(lambda *_: inside.clear())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        velocity = forward(case, family, transformer, given, noise_of(family, case.size, len(PROMPTS)))
    assert velocity.requires_grad  # and so all that was saved is still there: no storage was used twice
    return saved


class Attention(TorchFunctionMode):
    """Counts the calls of attention by batch, tokens, heads and width."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter = Counter()

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            batch, heads, tokens, width = (args[0] if args else kwargs["query"]).shape
            self.calls[batch, tokens, heads, width] += 1
        return func(*args, **kwargs)
