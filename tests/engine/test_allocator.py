"""Memory kept between tensors."""

import platform
import resource

import pytest
import torch

from dgpo_fast.engine.allocator import keep_freed_memory

PAGES, TENSORS, MIB = 2**20 // resource.getpagesize(), 20, 24


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_serves_the_next_tensor() -> None:
    """Most tensors filled one after another get pages that are there; without the setting none would."""
    assert keep_freed_memory()
    torch.ones(MIB * 2**18)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(TENSORS):
        torch.ones(MIB * 2**18)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < TENSORS // 2 * MIB * PAGES
