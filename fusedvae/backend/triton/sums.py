"""Sums, the same on every run.

A tile's is a tree, in the dtype of the arithmetic. Where others of the tiles have a part in it, it goes to a workspace,
at an offset of its own, and the program that finishes last adds them in order, in float64. Where they are many,
``split`` is how many are added up so, by as many programs as that takes, before the last one of these adds up their
sums. The counters that tell who is last are zero again afterwards.

An output that shares its sums has one of the launch's ``slots`` (four bits each), else ABSENT: slot k of ``partials``
begins at k * ``partials_step``, that of ``counters`` at k * ``counters_step``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import codes
from .access import ABSENT, ALL, BATCH, INNER, OUTER, WHOLE, number, split_number, store

VALUE = tl.constexpr(16 ** codes.TERM_AXES.index("value"))
"""The first output's position among axes: what these are to be divided by, for its four bits."""

COMBINED = tl.constexpr(1024)
"""Partial sums that are read at once when they are added up."""


@triton.jit
def sum_tile(
    value, b, o, i, batch, outer, inner, axes: tl.constexpr, walk: tl.constexpr,
    tile_b: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr,
):  # fmt: skip
    """Sums of the elements of a tile that exist, over the dimensions that are not in ``axes``."""
    value = tl.broadcast_to(value, (tile_b, tile_o, tile_i))
    if not WHOLE & walk:
        value = tl.where((b < batch) & (o < outer) & (i < inner), value, 0.0)
    if not INNER & axes:
        value = tl.sum(value, 2, keep_dims=True)
    if not OUTER & axes:
        value = tl.sum(value, 1, keep_dims=True)
    if not BATCH & axes:
        value = tl.sum(value, 0, keep_dims=True)
    return value


@triton.jit
def membership(
    tile, batch, outer, inner, axes: tl.constexpr,
    tile_b: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr,
):  # fmt: skip
    """Tiles at one position along ``axes`` are a group, whose sums are added up.

    Returns a tile's group, the number of groups, its number within the group, and the members of a group.
    """
    tiles_b, tiles_o, tiles_i = tl.cdiv(batch, tile_b), tl.cdiv(outer, tile_o), tl.cdiv(inner, tile_i)
    row, i = split_number(tile, tiles_i)
    b, o = split_number(row, tiles_o)
    group, groups, member, members = tile * 0, 1, tile * 0, 1
    if BATCH & axes:
        group, groups = b, tiles_b
    else:
        member, members = b, tiles_b
    if OUTER & axes:
        group, groups = group * tiles_o + o, groups * tiles_o
    else:
        member, members = member * tiles_o + o, members * tiles_o
    if INNER & axes:
        group, groups = group * tiles_i + i, groups * tiles_i
    else:
        member, members = member * tiles_i + i, members * tiles_i
    return group, groups, member, members


@triton.jit
def publish(partials, offsets, value, lanes: tl.constexpr):
    """Write partial sums for another program to read."""
    if lanes == 1:
        tl.store(partials + offsets, value)  # by the thread that comes to the counter, in order
    else:
        # AMD's barrier does not wait for the stores of other wavefronts; an exchange that acquires is waited for.
        bits: tl.constexpr = tl.int64 if value.dtype == tl.float64 else tl.int32
        where = (partials + offsets).to(tl.pointer_type(bits), bitcast=True)
        tl.atomic_xchg(where, value.to(bits, bitcast=True), sem="acq_rel", scope="gpu")


@triton.jit
def is_last(counter, programs):
    """Whether this is the last of as many programs to come here; what they all wrote before can then be read."""
    tl.debug_barrier()  # the writes of all threads come before the one thread's release
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def add_up(values, first, step, count, lanes: tl.constexpr, available):
    """Sums over k < count of the values at first + k * step + lane, in a fixed order, in float64."""
    rows: tl.constexpr = COMBINED // lanes if lanes < COMBINED else 1
    row, lane = tl.arange(0, rows)[:, None], tl.arange(0, lanes)[None, :]
    total = tl.zeros((rows, lanes), tl.float64)
    for k in range(0, count, rows):
        exists = (k + row < count) & (lane < available)
        # Past the first-level cache, which is not coherent with other programs' writes.
        total += tl.load(values + first + (k + row) * step + lane, mask=exists, other=0, cache_modifier=".cg").to(
            tl.float64
        )
    return tl.sum(total, 0)


@triton.jit
def store_output(
    data, s0, s1, value, tile, b, o, i, batch, outer, inner,
    partials, counters, partials_step, counters_step, split,
    output: tl.constexpr, axes: tl.constexpr, slots: tl.constexpr, walk: tl.constexpr,
    tile_b: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr,
):  # fmt: skip
    """Write a value or a gradient where it was given, summed over the dimensions that are not in its axes.

    ``output`` is its position in ``axes``.
    """
    if data is not None:
        kept: tl.constexpr = axes // output & 15
        slot: tl.constexpr = slots // (output // VALUE) & 15
        if kept == ALL:
            store(data, s0, s1, value, b, o, i, batch, outer, inner, ALL, walk)
        else:
            sums = sum_tile(value, b, o, i, batch, outer, inner, kept, walk, tile_b, tile_o, tile_i)
            if slot == ABSENT:
                store(data, s0, s1, sums, b, o, i, batch, outer, inner, kept, walk)
            else:
                store_shared(
                    data, s0, s1, sums, tile, b, o, i, batch, outer, inner,
                    partials + slot * number(partials_step, tl.int64),
                    counters + slot * number(counters_step, tl.int64), split, kept, walk, tile_b, tile_o, tile_i,
                )  # fmt: skip


@triton.jit
def store_shared(
    data, s0, s1, sums, tile, b, o, i, batch, outer, inner, partials, counters, split,
    axes: tl.constexpr, walk: tl.constexpr, tile_b: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr,
):  # fmt: skip
    """Write a tile's sums over the dimensions that are not in ``axes``, added to those of the other tiles."""
    group, groups, member, members = membership(tile, batch, outer, inner, axes, tile_b, tile_o, tile_i)
    lanes: tl.constexpr = (
        (tile_b if BATCH & axes else 1) * (tile_o if OUTER & axes else 1) * (tile_i if INNER & axes else 1)
    )
    lane, step = tl.arange(0, lanes), groups * lanes
    publish(partials, member * step + group * lanes + lane, tl.reshape(sums, (lanes,)), lanes)
    if split is None:
        if is_last(counters + group, members):
            total = add_up(partials, group * lanes, step, members, lanes, lanes)
            store(data, s0, s1, tl.reshape(total, sums.shape), b, o, i, batch, outer, inner, axes, walk)
    else:
        part, parts = member // split, tl.cdiv(members, split)
        count = tl.minimum(members - part * split, split)
        if is_last(counters + part * groups + group, count):
            part_of_it = add_up(partials, part * split * step + group * lanes, step, count, lanes, lanes)
            again = partials + members * number(step, tl.int64)
            publish(again, part * step + group * lanes + lane, part_of_it.to(sums.dtype), lanes)
            if is_last(counters + parts * groups + group, parts):
                total = add_up(again, group * lanes, step, parts, lanes, lanes)
                store(data, s0, s1, tl.reshape(total, sums.shape), b, o, i, batch, outer, inner, axes, walk)
