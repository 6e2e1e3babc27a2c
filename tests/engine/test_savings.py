"""The engine's savings compute what the plain path computes: each alone, and all together."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dgpo_fast.engine import compile
from dgpo_fast.models.forward import batch_slices
from tests.engine.cases import EngineCase, make_config

SAVINGS: dict[str, dict[str, Any]] = {
    "attention": {"attention": "matmul"},
    "linear": {"linear": "onednn"},
    "epilogue": {"epilogue": "on"},
    "compile": {"compile": "on"},
    "decoder": {"decoder": "fast"},
    "decoder in phases": {"decoder": "phases"},
    "timesteps at once": {"batch_timesteps": True},
    "first level": {"share_first_level": "auto"},
    "equal groups": {"skip_equal_groups": True},
    "checkpointing": {"checkpointing": "blocks"},
    "selective checkpointing": {"checkpointing": "selective"},
}
REGRESSIONS = ("nft", "awm", "ram", "crd")


def everything() -> dict[str, Any]:
    return {name: value for settings in SAVINGS.values() for name, value in settings.items()}


@pytest.fixture(scope="module", autouse=True)
def quick_compiler() -> Iterator[None]:
    """Graphs as torch.compile makes them, without the minutes that code generation takes; shared by all tests."""
    torch._dynamo.reset()
    with patch.object(compile, "BACKEND", "aot_eager"):
        yield


@pytest.fixture(params=["shipped", "random"])
def folder(request: pytest.FixtureRequest, random_pipeline: Path) -> Path | str:
    return "tiny" if request.param == "shipped" else random_pipeline


@cache
def plain(folder: Path | str, train: str, dtype: torch.dtype, objective: str = "dgpo") -> tuple[Tensor, ...]:
    """What is compared, with all savings off."""
    return computed(EngineCase(folder, make_config(train, objective), dtype))


def computed(case: EngineCase) -> tuple[Tensor, ...]:
    """Latents of a rollout, the pictures that the engine's decoder makes of them, loss and gradient."""
    x0, decoder = case.rollout(), case.engine.decoder
    with torch.no_grad():
        pictures = [decoder._pixels(x0[rows]) for rows in batch_slices(len(x0), decoder.batch_size)]
    return x0, torch.cat(pictures), *case.gradient()


def assert_within_budget(
    folder: Path | str, train: str, dtype: torch.dtype, found: tuple[Tensor, ...], objective: str = "dgpo"
) -> None:
    """Each of `found` is as near to float64 as the plain path in the same dtype, within a factor of two."""
    exact, same = plain(folder, train, torch.float64, objective), plain(folder, train, dtype, objective)
    eps = torch.finfo(dtype).eps
    # A single number may come out right by chance; of many, their norm does not. Pictures are those of the latents
    # found, whose error the decoder can make larger.
    floors = {"latents": eps, "pictures": 4 * eps, "loss": 8 * eps, "gradient": eps}
    for (name, floor), value, oracle, reference in zip(floors.items(), found, exact, same, strict=True):
        scale = torch.linalg.norm(oracle.double())
        error, allowed = (torch.linalg.norm(v.double() - oracle.double()) / scale for v in (value, reference))
        assert error <= 2 * (allowed + floor), f"{name}: {error:.2e} from float64, plain {allowed:.2e}"


@pytest.mark.parametrize("saving", [saving for saving in SAVINGS if saving != "compile"])
def test_each_saving_alone(saving: str, folder: Path | str) -> None:
    case = EngineCase(folder, make_config(**SAVINGS[saving]))
    assert_within_budget(folder, "lora", torch.float32, computed(case))


@pytest.mark.parametrize("saving", ["timesteps at once", "equal groups"])
@pytest.mark.parametrize("objective", ["diffusion_dpo", "flow_grpo", "flow_grpo, detached", *REGRESSIONS])
def test_savings_of_the_other_objectives(objective: str, saving: str, random_pipeline: Path) -> None:
    """Those that an objective has a part in."""
    case = EngineCase(random_pipeline, make_config(objective=objective, **SAVINGS[saving]))
    assert_within_budget(random_pipeline, "lora", torch.float32, computed(case), objective)


@pytest.mark.parametrize("objective", REGRESSIONS)
def test_compiled_blocks_of_the_other_objectives(objective: str, random_pipeline: Path) -> None:
    """Whose forwards have other numbers of rows."""
    case = EngineCase(random_pipeline, make_config(objective=objective, **SAVINGS["compile"]))
    assert_within_budget(random_pipeline, "lora", torch.float32, computed(case), objective)


def test_compiled_blocks_alone(random_pipeline: Path) -> None:
    case = EngineCase(random_pipeline, make_config(**SAVINGS["compile"]))
    assert_within_budget(random_pipeline, "lora", torch.float32, computed(case))


def test_all_savings_together() -> None:
    case = EngineCase("tiny", make_config("full", **everything()))
    assert_within_budget("tiny", "full", torch.float32, computed(case))


def test_all_savings_together_in_bf16(random_pipeline: Path) -> None:
    fp32_alone = {"linear": "torch", "attention": "native"}
    case = EngineCase(random_pipeline, make_config(**{**everything(), **fp32_alone}), torch.bfloat16)
    assert_within_budget(random_pipeline, "lora", torch.bfloat16, computed(case))
