"""Group noise in registers: Philox-4x32-10 words to standard normals, as :func:`dgpo_kernels.reference.philox_normal`.

    counter = (i, group's low word, group's high word, draw), key = seed
    u = (word_u + ½)·2⁻³²,  θ = (word_v's low 30 bits − 2²⁹)·π·2⁻³¹
    normals = ±√(−ln u)·(cos θ − sin θ), ±√(−ln u)·(cos θ + sin θ), signs from word_v's two high bits

The logarithm, sine and cosine are polynomials of our own. The hardware's ``lg2.approx`` has an absolute error that is
far too large for u near 1, where the radius is a root of it, and the libraries' sine spills to local memory for its
range reduction, which the integer angle makes needless. The same few fused multiply-adds also serve the interpreter.
"""

import triton
import triton.language as tl


@triton.jit
def log(x):
    """ln x of a positive normal float32, to 2 units in the last place.

    x = 2^e·(1 + f) with 1 + f in [2/3, 4/3); ln(1 + f) = f − f²/2 + f³·P(f), P a minimax polynomial (relative error
    5e-9).
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = 0.139844403 - 0.128916785 * f
    p = p * f - 0.121842623
    p = p * f + 0.140058681
    p = p * f - 0.16680488
    p = p * f + 0.200104058
    p = p * f - 0.249997973
    p = p * f + 0.333332151
    square = f * f
    return exponent.to(tl.float32) * 0.693147182 + (f + square * (p * f - 0.5))


@triton.jit
def box_muller(word_u, word_v):
    """Two independent standard normals from two uint32 words."""
    u = word_u.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    theta = ((word_v & 0x3FFFFFFF).to(tl.int32) - 536870912).to(tl.float32) * 1.4629180792671596e-09
    # Minimax on [−π/4, π/4], absolute errors 2e-9 and 1e-10.
    z = theta * theta
    sine = theta + theta * z * (-0.166666508 + z * (0.00833197869 - 0.000194956025 * z))
    cosine = 1.0 + z * (-0.5 + z * (0.0416666456 + z * (-0.00138873677 + 2.44384155e-05 * z)))
    radius = tl.sqrt(-log(u))
    first = radius * (cosine - sine)
    second = radius * (cosine + sine)
    return tl.where(word_v >= 0x80000000, -first, first), tl.where((word_v & 0x40000000) != 0, -second, second)


@triton.jit
def group_words(seed, draw, group, counter):
    """The four uint32 words of each counter (int32 read as unsigned); seed, draw and group are int64 scalars."""
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    high = ((group >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, counter.to(tl.uint32, bitcast=True), low, high, (draw & 0xFFFFFFFF).to(tl.uint32))


@triton.jit
def tile_places(tile, quarter, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Where a tile lies: its counters (int32 as unsigned), their elements (int64 scalar start, int32 offsets) and
    lanes.

    A tile has the shape (VECTOR, BLOCK / VECTOR), neighbours down a column. Triton gives whole columns to threads
    both by default, hence for the noise, and where it arranges for wide loads; a flat tile would have the noise go
    through shared memory to meet the loads. Sums over a column stay in a thread as well.

    Elements are those of the first quarter. If samples are channels_last (CHANNELS of them), a tile runs along
    memory all the same: over pixels, and for each over the first quarter of the channels.
    """
    lane = tl.arange(0, VECTOR)[:, None] + tl.arange(0, BLOCK // VECTOR)[None, :] * VECTOR
    start = tile.to(tl.int64) * BLOCK
    counter = start.to(tl.int32) + lane
    offset = lane
    if CHANNELS != 0:
        pixel = counter // (CHANNELS // 4)
        channel = counter % (CHANNELS // 4)
        counter = channel * (tl.cast(quarter, tl.int32) // (CHANNELS // 4)) + pixel
        start = start * 0
        offset = pixel * CHANNELS + channel
    return counter, start, offset, lane


@triton.jit
def word_shift(word, quarter, CHANNELS: tl.constexpr):
    """Distance in elements (int64) from the first quarter to the quarter of a Philox word."""
    distance = quarter
    if CHANNELS != 0:
        distance = CHANNELS // 4
    return tl.cast(distance, tl.int64) * word


@triton.jit
def word_mask(word, tile, lane, numel, quarter, BLOCK: tl.constexpr):
    """Which of a tile's elements exist in a Philox word's quarter: the last ones may be shorter than the first."""
    length = tl.minimum(tl.cast(quarter, tl.int64), tl.cast(numel, tl.int64) - tl.cast(quarter, tl.int64) * word)
    return lane < tl.minimum(length - tile.to(tl.int64) * BLOCK, BLOCK).to(tl.int32)


@triton.jit
def load_word(
    word: tl.constexpr,
    pointer,
    tile,
    start,
    offset,
    lane,
    numel,
    quarter,
    CHANNELS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile's elements in a word's quarter, in the tensor's dtype, 0 outside the sample; EVEN says that tiles divide
    the sample, which makes masks needless."""
    place = pointer + start + word_shift(word, quarter, CHANNELS)
    if EVEN:
        return tl.load(place + offset)
    return tl.load(place + offset, mask=word_mask(word, tile, lane, numel, quarter, BLOCK), other=0.0)


@triton.jit
def load_words(
    pointer, tile, start, offset, lane, numel, quarter, CHANNELS: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr
):
    """A tile's elements in the quarters of the four words. They arrive where they are used; until then, other work."""
    w0 = load_word(0, pointer, tile, start, offset, lane, numel, quarter, CHANNELS, EVEN, BLOCK)
    w1 = load_word(1, pointer, tile, start, offset, lane, numel, quarter, CHANNELS, EVEN, BLOCK)
    w2 = load_word(2, pointer, tile, start, offset, lane, numel, quarter, CHANNELS, EVEN, BLOCK)
    w3 = load_word(3, pointer, tile, start, offset, lane, numel, quarter, CHANNELS, EVEN, BLOCK)
    return w0, w1, w2, w3


@triton.jit
def store(pointer, offset, value, mask, EVEN: tl.constexpr):
    """Stores elements in the tensor's dtype."""
    if EVEN:
        tl.store(pointer + offset, value.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def group_normals(seed, draw, group, counter):
    """The four standard normals of each counter: those of elements i, Q + i, 2Q + i and 3Q + i."""
    w0, w1, w2, w3 = group_words(seed, draw, group, counter)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def load_group(pointer):
    """A sample's group, and a 0 (int32) that the compiler cannot know before it is loaded.

    Added to the counters, it keeps the first rounds of Philox, which do not depend on the group, from being computed
    ahead of a program's first loads.
    """
    group = tl.load(pointer)
    return group, (tl.load(pointer, volatile=True) ^ group).to(tl.int32)


@triton.jit
def no_normals(BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """What stands for a tile's normals before the first ones are made."""
    zero = tl.zeros([VECTOR, BLOCK // VECTOR], tl.float32)
    return zero, zero, zero, zero
