"""GPUs by name: what Inductor asks of a device before it decides what to fuse."""

from dataclasses import dataclass
from types import SimpleNamespace

from dgpo_fast.errors import UserError

KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclass(frozen=True)
class GPU:
    """Properties of one device, from CUDA's table of compute capabilities and the maker's datasheets.

    Attributes:
        capability: compute capability, major and minor.
        multiprocessors: their number.
        threads: resident in one multiprocessor, at most.
        shared_kib: shared memory of one multiprocessor; one block can have 1 KiB less.
        l2_mib: second-level cache.
        memory_gib: of the card.
    """

    capability: tuple[int, int]
    multiprocessors: int
    threads: int
    shared_kib: int
    l2_mib: int
    memory_gib: int

    def properties(self, name: str) -> SimpleNamespace:
        """As `torch.cuda.get_device_properties` gives them."""
        major, minor = self.capability
        return SimpleNamespace(
            name=f"NVIDIA {name}",
            major=major,
            minor=minor,
            multi_processor_count=self.multiprocessors,
            max_threads_per_multi_processor=self.threads,
            max_threads_per_block=1024,
            warp_size=32,
            regs_per_multiprocessor=65536,
            shared_memory_per_multiprocessor=self.shared_kib * KIB,
            shared_memory_per_block=48 * KIB,
            shared_memory_per_block_optin=(self.shared_kib - 1) * KIB,
            L2_cache_size=self.l2_mib * MIB,
            total_memory=self.memory_gib * GIB,
            gcnArchName="",
        )


GPUS = {
    "H200": GPU((9, 0), 132, 2048, 228, 50, 141),
    "H100": GPU((9, 0), 132, 2048, 228, 50, 80),
    "A100": GPU((8, 0), 108, 2048, 164, 40, 80),
    "L40S": GPU((8, 9), 142, 1536, 100, 96, 48),
    "RTX 4090": GPU((8, 9), 128, 1536, 100, 72, 24),
}


def find(name: str) -> GPU:
    """The GPU called `name`. Raises UserError if it is not in the table."""
    if name not in GPUS:
        raise UserError(f"GPU '{name}' is not known; known are {', '.join(GPUS)}")
    return GPUS[name]
