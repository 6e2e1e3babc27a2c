"""The Triton kernels run on a GPU where there is one, else in Triton's interpreter.

The interpreter has to be chosen before Triton is imported, and other tests import Triton. So ``fused/`` is collected
where its tests can run, on a GPU or under ``TRITON_INTERPRET=1``, and ``test_kernels_interpreter.py`` runs it in a
process of its own otherwise.
"""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

collect_ignore = [] if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else ["fused"]


@pytest.fixture(scope="session")
def within_budget() -> Callable[..., None]:
    """Checks a result against a float64 oracle: at most twice the error of eager in the same dtypes, and one rounding.

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
