"""Memory that a CPU run keeps between its tensors.

The C library returns large freed blocks to the system, and the next tensor of that size gets new pages, which must be
cleared. A run creates and frees tensors of the same few sizes thousands of times per iteration.
"""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_THRESHOLD = 32 * 2**20
"""Of glibc: larger blocks are always the system's."""
KEPT_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Has this process keep freed blocks of up to 32 MiB, a GiB in all; says whether its C library can."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
