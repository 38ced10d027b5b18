"""Tiles, and the elements of operands in them.

A program takes a tile of (tile_b, tile_o, tile_i) elements of the extent (batch, outer, inner). An operand comes as its
address, its strides over batch and outer, and its axes (see `codes`): it is read as a block of size 1 along the
dimensions that are not among these. ``walk`` says how tiles lie.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import codes

BATCH = tl.constexpr(codes.BATCH)
OUTER = tl.constexpr(codes.OUTER)
INNER = tl.constexpr(codes.INNER)
ALL = tl.constexpr(codes.ALL)
ABSENT = tl.constexpr(codes.ABSENT)

WIDE = tl.constexpr(codes.WIDE)
FLAT = tl.constexpr(codes.FLAT)
WHOLE = tl.constexpr(codes.WHOLE)


@triton.jit
def split_number(number_of_tile, count):
    """A tile's number, divided by a count of tiles: the quotient and the rest. Unsigned, that takes fewer steps."""
    dividend, divisor = number_of_tile.to(tl.uint32), number(count, tl.uint32)
    return (dividend // divisor).to(tl.int32), (dividend % divisor).to(tl.int32)


@triton.jit
def positions(tile, outer, inner, tile_b: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr, walk: tl.constexpr):
    """The elements of a tile along each dimension, as blocks that broadcast to the tile."""
    if FLAT & walk:
        b, o, i = tile * 0, tile * 0, tile
    else:
        row, i = split_number(tile, tl.cdiv(inner, tile_i))
        b, o = split_number(row, tl.cdiv(outer, tile_o))
    if WIDE & walk:
        b, o, i = b.to(tl.int64), o.to(tl.int64), i.to(tl.int64)
    b = b * tile_b + tl.arange(0, tile_b)[:, None, None]
    o = o * tile_o + tl.arange(0, tile_o)[None, :, None]
    return b, o, i * tile_i + tl.arange(0, tile_i)[None, None, :]


@triton.jit
def offsets_of(s0, s1, b, o, i, batch, outer, inner, axes: tl.constexpr):
    """Offsets of an operand's elements, and which of them exist."""
    offsets = tl.zeros((1, 1, 1), tl.int32)
    exists = offsets == 0
    if BATCH & axes:
        offsets, exists = offsets + b * s0, exists & (b < batch)
    if OUTER & axes:
        offsets, exists = offsets + o * s1, exists & (o < outer)
    if INNER & axes:
        offsets, exists = offsets + i, exists & (i < inner)
    return offsets, exists


@triton.jit
def load(
    data, s0, s1, b, o, i, batch, outer, inner, axes: tl.constexpr, walk: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """An operand's elements of a tile, in the dtype of the arithmetic."""
    offsets, exists = offsets_of(s0, s1, b, o, i, batch, outer, inner, axes)
    where = data + offsets
    return (tl.load(where) if WHOLE & walk else tl.load(where, mask=exists, other=0)).to(dtype)


@triton.jit
def number(value, dtype: tl.constexpr):
    """A number that came as an argument, in some dtype."""
    return tl.full((), value, dtype)


@triton.jit
def number_at(data, value):
    """A number that came in memory or, without ``data``, as ``value``; in float64."""
    return tl.load(data).to(tl.float64) if data is not None else number(value, tl.float64)


@triton.jit
def load_or_number(
    data, s0, s1, value, b, o, i, batch, outer, inner, axes: tl.constexpr, walk: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """An operand's elements of a tile or, where it came as a number, that; in the dtype of the arithmetic."""
    if data is not None:
        found = load(data, s0, s1, b, o, i, batch, outer, inner, axes, walk, dtype)
    else:
        found = number(value, dtype)
    return found


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """To an operand's dtype; no chip rounds float64 to 16 bits in one go."""
    if (dtype == tl.bfloat16) or (dtype == tl.float16):
        value = value.to(tl.float32)
    return value.to(dtype)


@triton.jit
def store(data, s0, s1, value, b, o, i, batch, outer, inner, axes: tl.constexpr, walk: tl.constexpr):
    """Write an operand's elements of a tile, where the operand was given."""
    if data is not None:
        offsets, exists = offsets_of(s0, s1, b, o, i, batch, outer, inner, axes)
        value = narrow(value, data.dtype.element_ty)
        if WHOLE & walk:
            tl.store(data + offsets, value)
        else:
            tl.store(data + offsets, value, mask=exists)
