"""Device, poison and error budgets of the fused kernels' tests."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def device() -> str:
    """The interpreter's CPU where it was asked for, else the GPU."""
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(autouse=True)
def nan_in_fresh_memory() -> Iterator[None]:
    """Whatever a kernel fails to write reads as NaN."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def within_budget() -> Callable[..., None]:
    """Checks fused against a float64 oracle: at most twice the error of eager in the same dtypes, and one rounding.

    ``extra`` is what one rounding of an intermediate value does to a result, where that is more than its own rounding.
    """

    def check(name: str, fused: Tensor, eager: Tensor, oracle: Tensor, extra: float = 0.0) -> None:
        assert fused.shape == eager.shape and fused.dtype == eager.dtype, name
        if fused.numel() == 0:
            return
        if fused.dtype == torch.bool:
            assert torch.equal(fused, eager), name
            return
        scale = oracle.abs().max()
        budget = 2 * ((eager.double() - oracle).abs().max() + torch.finfo(fused.dtype).eps * scale + extra)
        # A zero result has no scale; the smallest normal number stands for what flushes to zero.
        error = (fused.double() - oracle).abs().max()
        assert error <= budget + torch.finfo(fused.dtype).tiny, f"{name}: error {error:.3e}, budget {budget:.3e}"

    return check
