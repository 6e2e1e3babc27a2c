"""What the launchers share: how a sample is cut into tiles, and on which device a kernel runs. Needs torch alone."""

import contextlib
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

# One access of a thread moves as much as the hardware allows.
ACCESS_BYTES = 16
# With more, a thread could not have 255 registers.
MAX_WARPS = 8


@dataclass(frozen=True)
class TileConfig:
    """Shape of a program's work.

    block: Philox counters in a tile at most, a power of two ≥ 256; a tile has four elements for each.
    warps_per_sm: that fit on an SM with the registers that the kernel takes.
    span: consecutive samples that a program takes through its tile; None: by the number of samples.
    max_registers: a thread's. Without a bound the assembler spills a few registers to fit one more program.
    """

    block: int
    warps_per_sm: int
    span: int | None = None
    max_registers: int = 255

    def tiles(self, numel: int, itemsize: int) -> tuple[int, int, int, int, int]:
        """How a sample of ``numel`` elements is cut, where an element of the narrowest tensor takes ``itemsize`` bytes.

        Returns (counters in a sample, tiles, counters in a tile, neighbours to a thread, warps in a program).
        """
        quarter = (numel + 3) // 4
        # Triton makes accesses wide where it knows sizes to be multiples of 16; elsewhere neighbours had better go to
        # neighbouring threads.
        vector = ACCESS_BYTES // itemsize if quarter % 16 == 0 else 2
        block = 32 * vector
        while block < min(self.block, quarter, 32 * vector * MAX_WARPS):
            block *= 2
        return quarter, (quarter + block - 1) // block, block, vector, block // (32 * vector)

    def waves(self, samples: int, tiles: int, num_warps: int, span: int, sms: int) -> int:
        """How many times the GPU is filled with programs."""
        programs = tiles * ((samples + span - 1) // span)
        slots = sms * (self.warps_per_sm // num_warps)
        return (programs + slots - 1) // slots

    def span_of(self, samples: int, tiles: int, num_warps: int, device: torch.device) -> int:
        """Samples that a program takes through its tile, for `samples` on `device`.

        A program makes its noise once, which costs about as much as a sample's memory traffic. A wave that is not full
        takes as long as a full one.
        """
        if self.span is not None:
            return self.span
        sms = multiprocessors(device)

        def cost(span: int) -> int:
            return self.waves(samples, tiles, num_warps, span, sms) * (span + 1)

        return min(range(1, MAX_SPAN + 1), key=cost)


MAX_SPAN = 8
# Those of an H200, for the interpreter.
MULTIPROCESSORS = 132


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """SMs of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else MULTIPROCESSORS


# Fused multiply-adds are wanted: the polynomials and sums are written for them, and from Triton 3.10 on they are off by
# default.
COMPILER_OPTIONS = {"enable_fp_fusion": True}

# Block sizes of the kernels that run over tiles. They stay until a measurement on a GPU says better.
NOISE_CONFIG = TileConfig(block=1024, warps_per_sm=12)
FORWARD_CONFIG = TileConfig(block=1024, warps_per_sm=8)
BACKWARD_CONFIG = TileConfig(block=1024, warps_per_sm=8)


def tile_grid(tiles: int, samples: int, span: int) -> tuple[int]:
    """One axis, tiles fastest: neighbouring programs read neighbouring memory; other axes end at 65,535."""
    return (tiles * ((samples + span - 1) // span),)


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one: Triton launches there."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
