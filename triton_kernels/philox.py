"""Noise as a pure function of (key, stream, element): docs/mathematics.md §9, in Triton.

Arithmetic is that of csrc/include/fastdiff/philox.h: its polynomials, because the hardware's
approximate logarithm has no correct digit near u1 = 1.
"""

import triton
import triton.language as tl


@triton.jit
def sample_key(seed, sample):
    """Output number sample + 1 of SplitMix64(seed), as uint64."""
    z = seed.to(tl.uint64) + (sample.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def noise_key(keys, seed, sample):
    """Key of one sample: given, or derived from the seed."""
    if keys is not None:
        return tl.load(keys + sample).to(tl.uint64, bitcast=True)
    return sample_key(seed, sample)


@triton.jit
def log_positive(x):
    """Natural logarithm of positive normal floats, to 0.7 ulp."""
    bits = x.to(tl.uint32, bitcast=True)
    exponent = (bits - 0x3F3504F3).to(tl.int32, bitcast=True) >> 23
    d = (bits - (exponent << 23).to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    p = -0.07902744 * d + 0.12622319
    p = p * d - 0.12998183
    p = p * d + 0.14214496
    p = p * d - 0.16641282
    p = p * d + 0.20001045
    p = p * d - 0.25000307
    p = p * d + 0.3333333
    d2 = d * d
    y = p * (d2 * d)
    y = e * -2.12194440e-4 + y
    y = d2 * -0.5 + y
    return e * 0.693359375 + (d + y)


@triton.jit
def to_float(word):
    """uint32 to the nearest float: both halves convert exactly and their sum rounds once."""
    high = (word >> 16).to(tl.int32).to(tl.float32)
    low = (word & 0xFFFF).to(tl.int32).to(tl.float32)
    return high * 65536.0 + low


@triton.jit
def box_muller(w0, w1):
    """Two words to two standard normals."""
    u1 = to_float(w0) * 2.3283064365386962890625e-10 + 2.3283064365386962890625e-10
    quarters = to_float(w1) * 9.31322574615478515625e-10
    quadrant = (quarters + 0.5).to(tl.int32)
    f = quarters - quadrant.to(tl.float32)
    z = f * f
    s = 1.582063e-4 * z - 4.6812664e-3
    s = s * z + 7.969258e-2
    s = s * z - 6.459641e-1
    s = s * z + 1.5707964
    s = s * f
    c = 9.0362807e-4 * z - 2.086007e-2
    c = c * z + 2.536692e-1
    c = c * z - 1.2337005
    c = c * z + 1.0
    swap = (quadrant & 1) == 1
    sine = tl.where(swap, c, s)
    cosine = tl.where(swap, s, c)
    sine = tl.where((quadrant & 2) == 0, sine, -sine)
    cosine = tl.where(((quadrant + 1) & 2) == 0, cosine, -cosine)
    radius = tl.sqrt_rn(-2.0 * log_positive(u1))
    return radius * cosine, radius * sine


@triton.jit
def philox4x32(key, stream, block):
    """The four words of Philox4x32-10 at counter (block, stream), both 64 bits wide."""
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    # Zeros of the block's shape make the scalars tensors.
    c2 = (c0 ^ c0) + stream.to(tl.uint32)
    c3 = (c0 ^ c0) + (stream.to(tl.uint64) >> 32).to(tl.uint32)
    return tl.philox(key, c0, c1, c2, c3)


@triton.jit
def normal_blocks(key, stream, block, BLOCKS: tl.constexpr):
    """The normals of elements 4 block .. 4 block + 3 for BLOCKS consecutive blocks, in order."""
    w0, w1, w2, w3 = philox4x32(key, stream, block)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (4 * BLOCKS,))


@triton.jit
def normal_elements(key, stream, element):
    """The normals of any elements: each makes its own Philox block and throws three away."""
    w0, w1, w2, w3 = philox4x32(key, stream, element >> 2)
    first_pair = (element & 2) == 0
    n0, n1 = box_muller(tl.where(first_pair, w0, w2), tl.where(first_pair, w1, w3))
    return tl.where((element & 1) == 0, n0, n1)


@triton.jit
def chunk_normals(
    key, stream, first, i, numel, inner, LOGICAL_ORDER: tl.constexpr, BLOCK: tl.constexpr
):
    """Normals of memory indices `i` = first .. first + BLOCK - 1 of a sample.

    LOGICAL_ORDER: memory order is logical order and `first` is a multiple of 4. Otherwise (in
    channels_last) the four normals of a Philox block lie far apart and every element makes its own:
    four times the arithmetic, no more memory traffic.
    """
    if LOGICAL_ORDER:
        block = (first >> 2) + tl.arange(0, BLOCK // 4)
        return normal_blocks(key, stream, block, BLOCK // 4)
    element = (i % inner) * (numel // inner) + i // inner
    return normal_elements(key, stream, element)


@triton.jit
def dropout_words(key, stream, block, ROWS: tl.constexpr):
    """Words that decide about ROWS channels at 4 pixels each (csrc/include/fastdiff/dropout.h).

    A block has a word for each of 4 channels: `block` is (ROWS / 4, pixels / 4), the result
    (ROWS, pixels / 4).
    """
    w0, w1, w2, w3 = philox4x32(key, stream, block)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(tl.permute(words, (0, 2, 3, 1)), (ROWS, block.shape[1]))


@triton.jit
def dropout_words_of_rows(key, stream, block, channel):
    """The same for channels that are not four to a block: `block` is (rows, pixels / 4).

    Each makes its own blocks and throws three words away.
    """
    w0, w1, w2, w3 = philox4x32(key, stream, block)
    low = tl.where((channel & 1) == 0, w0, w1)
    high = tl.where((channel & 1) == 0, w2, w3)
    return tl.where((channel & 2) == 0, low, high)


@triton.jit
def dropout_bytes(
    words, ROWS: tl.constexpr, PIXELS: tl.constexpr, FIRST: tl.constexpr = 0, STEP: tl.constexpr = 1
):
    """The bytes FIRST, FIRST + STEP, ... of every word, from the low end, as (ROWS, PIXELS) int32.

    Byte p mod 4 belongs to pixel p: fewer than 4 pixels take the first bytes.
    """
    BYTES: tl.constexpr = PIXELS // words.shape[1]
    shift = (8 * (FIRST + STEP * tl.arange(0, BYTES))).to(tl.uint32)
    decisions = (words[:, :, None] >> shift[None, None, :]) & 255
    return tl.reshape(decisions.to(tl.int32), (ROWS, PIXELS))
