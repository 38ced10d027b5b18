"""The noise: Philox, and the normals that Box and Muller's transform makes of its words.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; constants of Random123.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .access import FLAT, WIDE, split_number
from .arithmetic import log_unit, radius_of_the_chip, sincos_of_the_chip, sincos_turns


@triton.jit
def product(word, factor: tl.constexpr):
    """The upper and the lower word of a product of words.

    In 64 bits, which is one instruction of NVIDIA's and of AMD's; with umulhi it would be two.
    """
    both = word.to(tl.uint64) * tl.full((), factor, tl.uint64)
    return (both >> 32).to(tl.uint32), both.to(tl.uint32)


@triton.jit
def philox4x32(c0, c1, c2, c3, seed):
    """Ten rounds on uint32 counter words, keyed by a 64-bit seed."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        h0, l0 = product(c0, 0xD2511F53)
        h1, l1 = product(c2, 0xCD9E8D57)
        c0, c2 = h1 ^ c1 ^ k0, h0 ^ c3 ^ k1
        c1, c3 = l1, l0
        k0 += tl.full((), 0x9E3779B9, tl.uint32)
        k1 += tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def unit_interval(word):
    """Uniform in (0, 1] of a word: float(word >> 1) * 2^-31 + 2^-32."""
    half_word = (word >> 1).to(tl.int32, bitcast=True).to(tl.float32)
    return half_word * 4.656612873077393e-10 + 2.3283064365386963e-10


@triton.jit
def box_muller(word0, word1, rough: tl.constexpr):
    """Two words, as uniforms, to two normals: sqrt(-2 ln u0) * (cos 2 pi u1, sin 2 pi u1)."""
    u0 = unit_interval(word0)
    if rough:
        radius = radius_of_the_chip(u0)
        sine, cosine = sincos_of_the_chip(word1)
    else:
        radius = tl.sqrt(-2.0 * log_unit(u0))
        sine, cosine = sincos_turns(unit_interval(word1))
    return radius * cosine, radius * sine


@triton.jit
def words_of(quad, seed, wide: tl.constexpr):
    """The Philox words of elements 4 * quad to 4 * quad + 3 of the stream."""
    low = quad.to(tl.uint32)
    zero = low ^ low
    high = zero
    if wide:
        high = (quad >> 32).to(tl.uint32)
    return philox4x32(low, high, zero, zero, seed)


@triton.jit
def noise_of_quad(seed, quad, wide: tl.constexpr, rough: tl.constexpr):
    """The noise of elements 4 * quad to 4 * quad + 3 of the stream."""
    w0, w1, w2, w3 = words_of(quad, seed, wide)
    n0, n1 = box_muller(w0, w1, rough)
    n2, n3 = box_muller(w2, w3, rough)
    return n0, n1, n2, n3


@triton.jit
def noise_in_quads(seed, quad, quads: tl.constexpr, wide: tl.constexpr, rough: tl.constexpr):
    """The noise of as many ``quads`` from each ``quad`` on, one element after the other along inner."""
    n0, n1, n2, n3 = noise_of_quad(seed, quad, wide, rough)
    if quads == 2:
        n4, n5, n6, n7 = noise_of_quad(seed, quad + 1, wide, rough)
        n0, n1, n2, n3 = tl.interleave(n0, n4), tl.interleave(n1, n5), tl.interleave(n2, n6), tl.interleave(n3, n7)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def noise_one_by_one(seed, index, wide: tl.constexpr, rough: tl.constexpr):
    """The noise of the elements ``index`` of the stream: each makes its own four, and picks its lane."""
    w0, w1, w2, w3 = words_of(index >> 2, seed, wide)
    second_pair = (index & 2) != 0
    n0, n1 = box_muller(tl.where(second_pair, w2, w0), tl.where(second_pair, w3, w1), rough)
    return tl.where((index & 1) != 0, n1, n0)


@triton.jit
def noise_tile(
    seed, offset, l0, l1, l2, b, o, i, tile, inner, quads: tl.constexpr, rough: tl.constexpr,
    tile_i: tl.constexpr, walk: tl.constexpr,
):  # fmt: skip
    """The noise of a tile, in float32; l0, l1, l2 are the strides of the logical index, which begins at ``offset``.

    ``quads``: how many counters make four neighbours each for a thread, one or two; then inner is logically contiguous,
    and its rows begin at multiples of 4, as does ``offset``, if it came as a number. 0: each element has a counter.
    ``rough``: for results in bfloat16.
    """
    wide: tl.constexpr = WIDE & walk
    if quads:
        first = tile
        if not FLAT & walk:
            _, first = split_number(tile, tl.cdiv(inner, tile_i))
        if wide:
            first = first.to(tl.int64)
        quad = first * (tile_i // 4) + tl.arange(0, tile_i // (4 * quads))[None, None, :] * quads
        if not FLAT & walk:
            quad = (b * l0 + o * l1) // 4 + quad
        if offset is None:
            noise = noise_in_quads(seed, quad, quads, wide, rough)
        elif offset.dtype.is_ptr():
            start = tl.load(offset).to(tl.int64)
            if start % 4 == 0:
                noise = noise_in_quads(seed, quad + start // 4, quads, True, rough)
            else:
                noise = noise_one_by_one(seed, b * l0 + o * l1 + i + start, True, rough)
        else:
            noise = noise_in_quads(seed, quad + offset.to(tl.int64) // 4, quads, True, rough)
    else:
        index = b * l0 + o * l1 + i * l2
        if offset is None:
            noise = noise_one_by_one(seed, index, wide, rough)
        else:
            start = tl.load(offset).to(tl.int64) if offset.dtype.is_ptr() else offset.to(tl.int64)
            noise = noise_one_by_one(seed, index + start, True, rough)
    return noise
