"""Group noise, stored or applied: x_t = (1 − σ)·x0 + σ·ε in one read and one write, ε made in registers.

A program takes one tile of BLOCK Philox counters, hence 4·BLOCK elements, through `span` consecutive samples. It makes
the tile's noise once for each run of equal groups, so that groups that lie together pay for one ε and others stay
correct.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgpo_kernels import layout
from dgpo_kernels.triton.launch import COMPILER_OPTIONS, NOISE_CONFIG, TileConfig, device_of, tile_grid
from dgpo_kernels.triton.philox import (
    group_normals,
    load_group,
    load_words,
    no_normals,
    store,
    tile_places,
    word_mask,
    word_shift,
)


@triton.jit(do_not_specialize=["samples", "tiles", "span"])
def _group_noise_kernel(
    x0,
    sigma,
    group_index,
    seed,
    draw,
    out,
    samples,
    tiles,
    numel,
    quarter,
    span,
    x0_stride,
    SIGMA_STRIDE: tl.constexpr,
    HAS_X0: tl.constexpr,
    CHANNELS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    first = (tl.program_id(0) // tiles).to(tl.int64) * span
    counter, start, offset, lane = tile_places(tile, quarter, CHANNELS, BLOCK, VECTOR)
    seed_value = tl.load(seed)
    draw_value = tl.load(draw)
    group = tl.load(group_index + first)
    noise = no_normals(BLOCK, VECTOR)
    for step in range(0, tl.minimum(span, samples - first)):
        sample = first + step
        # The sample's loads come first: memory works while the noise is made.
        clean = noise
        level = 1.0
        if HAS_X0:
            clean = load_words(
                x0 + sample * x0_stride, tile, start, offset, lane, numel, quarter, CHANNELS, EVEN, BLOCK
            )
            level = tl.load(sigma + sample * SIGMA_STRIDE).to(tl.float32)
        sample_group, late = load_group(group_index + sample)
        if (step == 0) | (sample_group != group):
            group = sample_group
            noise = group_normals(seed_value, draw_value, group, counter + late)
        for word in tl.static_range(4):
            place = start + word_shift(word, quarter, CHANNELS)
            mask = word_mask(word, tile, lane, numel, quarter, BLOCK)
            value = noise[word]
            if HAS_X0:
                value = (1.0 - level) * clean[word].to(tl.float32) + level * value
            store(out + sample * numel + place, offset, value, mask, EVEN)


def group_noise(x0: Tensor, sigma: Tensor, group_index: Tensor, seed: Tensor, draw: Tensor) -> Tensor:
    """x_t of :func:`dgpo_kernels.group_noise`, in x0's layout."""
    channels = layout.channels_of(x0)
    x0 = layout.in_layout(x0, channels)
    out = layout.empty_like(x0, channels)
    _launch(x0, sigma, group_index, seed, draw, out, channels)
    return out


def philox_normal(shape: Sequence[int], group_index: Tensor, seed: Tensor, draw: Tensor, dtype: torch.dtype) -> Tensor:
    """The noise of :func:`dgpo_kernels.philox_normal`."""
    out = torch.empty((group_index.shape[0], *shape), dtype=dtype, device=group_index.device)
    _launch(None, None, group_index, seed, draw, out, 0)
    return out


def _launch(
    x0: Tensor | None,
    sigma: Tensor | None,
    group_index: Tensor,
    seed: Tensor,
    draw: Tensor,
    out: Tensor,
    channels: int,
    config: TileConfig = NOISE_CONFIG,
) -> None:
    samples = out.shape[0]
    if samples == 0:
        return
    numel = out.numel() // samples
    quarter, tiles, block, vector, num_warps = config.tiles(numel, out.element_size())
    span = config.span_of(samples, tiles, num_warps, out.device)
    with device_of(out):
        _group_noise_kernel[tile_grid(tiles, samples, span)](
            x0,
            sigma,
            group_index.contiguous(),
            seed,
            draw,
            out,
            samples,
            tiles,
            numel,
            quarter,
            span,
            0 if x0 is None else x0.stride(0),
            SIGMA_STRIDE=1 if sigma is not None and sigma.dim() else 0,
            HAS_X0=x0 is not None,
            CHANNELS=channels,
            EVEN=numel == 4 * tiles * block,
            BLOCK=block,
            VECTOR=vector,
            num_warps=num_warps,
            maxnreg=config.max_registers,
            **COMPILER_OPTIONS,
        )
