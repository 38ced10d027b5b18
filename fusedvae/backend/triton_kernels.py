"""The Triton kernels: one launch a stage over operands in canonical form, the formulas those of `triton_math`.

A program takes a tile of (tile_b, tile_o, tile_i) elements of the extent (batch, outer, inner). An operand comes as its
address, its strides over batch and outer, and its axes: the dimensions it varies along, one bit each (BATCH, OUTER,
INNER); it is read as a block of size 1 along the others. A number comes as ``..._value`` instead. An operand that was
not given is None, its axes ABSENT, and everything about it disappears when the kernel is compiled. What is a constexpr
selects code, and no number that a caller might change between calls is among these: that would compile a kernel a call.

The inputs of a formula are in0 to in3, the gradients by them g0 to g3; ``form0`` and ``form1`` are the forms of its
scales, as triton_math has them; ``bounds`` tells which inputs are bounded, two bits each, and ``low0``, ``high0`` and
``eps0`` are the numbers of the first scale. ``axes`` are those of the inputs, and of what the constants below say, four
bits each, in this order. ``walk`` says how tiles lie: WIDE where
offsets or indices might not fit 32 bits; FLAT where batch and outer are 1, so that all operands are gone through in one
line; WHOLE where no tile reaches past the extent, so that no access needs a mask.

A value or gradient is summed over the dimensions that are not among its axes. Where it shares its sums with other
tiles, it has one of the launch's ``slots`` (four bits each, too), else ABSENT: slot k of ``partials`` begins at k *
``partials_step``, that of ``counters`` at k * ``counters_step``.

Sums are the same on every run. A tile's is a tree, in the dtype of the arithmetic; the tiles' sums go to a workspace,
each at an offset of its own, and the program that finishes last adds them in order, in float64. Where they are many,
``split`` is how many are added up so, by as many programs as that takes, before the last one of these adds up their
sums. The counters that tell who is last are zero again afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_math import (
    MAP,
    ROUGH,
    SQUARED,
    box_muller,
    deviation_of,
    element_at_sample,
    formula_element,
    philox4x32,
    through,
    through_bounds,
    within_bounds,
)

BATCH = tl.constexpr(1)
OUTER = tl.constexpr(2)
INNER = tl.constexpr(4)
ALL = tl.constexpr(7)
ABSENT = tl.constexpr(8)

WIDE = tl.constexpr(1)
FLAT = tl.constexpr(2)
WHOLE = tl.constexpr(4)

# Positions in ``axes``: what is to be divided by, for the last four bits.
INCOMING = tl.constexpr(16**4)
VALUE = tl.constexpr(16**5)
GRADS = tl.constexpr(16**6)  # the first of four
WEIGHT = tl.constexpr(16**10)  # of a term
NOISE = tl.constexpr(16**10)  # of the latent
GRAD_Z = tl.constexpr(16**11)

COMBINED = tl.constexpr(1024)
"""Partial sums that are read at once when they are added up."""


# --- tiles ----------------------------------------------------------------------------------------------------------


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


# --- sums -----------------------------------------------------------------------------------------------------------


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


# --- noise ----------------------------------------------------------------------------------------------------------


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


# --- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def normal_kernel(out, seed, count, quads: tl.constexpr, tile: tl.constexpr, walk: tl.constexpr):
    """The noise stream of ``seed`` in a contiguous tensor."""
    program = tl.program_id(0)
    b, o, i = positions(program, 1, count, 1, 1, tile, walk)
    noise = noise_tile(tl.load(seed), None, 0, 0, 1, b, o, i, program, count, quads, False, tile, walk)
    store(out, 0, 0, noise, b, o, i, 1, 1, count, ALL, walk)


@triton.jit(do_not_specialize=["offset"])
def latent_kernel(
    batch, outer, inner, l0, l1, l2, seed, offset,
    in0, in0_0, in0_1,
    in1, in1_0, in1_1, in1_value: tl.float64,
    in2, in2_0, in2_1, in2_value: tl.float64,
    in3, in3_0, in3_1, in3_value: tl.float64,
    low0: tl.float64, high0: tl.float64, eps0: tl.float64, low1: tl.float64, high1: tl.float64, eps1: tl.float64,
    noise, noise_0, noise_1,
    grad_z, grad_z_0, grad_z_1,
    incoming, incoming_0, incoming_1, incoming_value: tl.float64,
    z, z_0, z_1,
    value, value_0, value_1,
    g0, g0_0, g0_1,
    g1, g1_0, g1_1,
    g2, g2_0, g2_1,
    g3, g3_0, g3_1,
    partials, counters, partials_step, counters_step, split, slots: tl.constexpr,
    formula: tl.constexpr, at_sample: tl.constexpr, form0: tl.constexpr, form1: tl.constexpr, bounds: tl.constexpr,
    axes: tl.constexpr, quads: tl.constexpr, dtype: tl.constexpr, walk: tl.constexpr,
    tile_b: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr,
):  # fmt: skip
    """The sample z = mean + deviation * noise of the first two inputs, beside a divergence, perhaps at the sample.

    Writes z, the divergence and the gradients of sum(grad_z * z) + sum(incoming * divergence), each where it was given.
    """
    tile = tl.program_id(0)
    b, o, i = positions(tile, outer, inner, tile_b, tile_o, tile_i, walk)
    v0 = load(in0, in0_0, in0_1, b, o, i, batch, outer, inner, axes & 15, walk, dtype)
    v1 = load_or_number(in1, in1_0, in1_1, in1_value, b, o, i, batch, outer, inner, axes // 16 & 15, walk, dtype)
    v2 = load_or_number(in2, in2_0, in2_1, in2_value, b, o, i, batch, outer, inner, axes // 16**2 & 15, walk, dtype)
    v3 = load_or_number(in3, in3_0, in3_1, in3_value, b, o, i, batch, outer, inner, axes // 16**3 & 15, walk, dtype)
    comes_in: tl.constexpr = ABSENT & (axes // INCOMING) == 0
    if comes_in:
        w = load_or_number(
            incoming, incoming_0, incoming_1, incoming_value,
            b, o, i, batch, outer, inner, axes // INCOMING & 15, walk, dtype,
        )  # fmt: skip
    else:
        w = number(1.0, dtype)
    low0, high0, eps0 = number(low0, dtype), number(high0, dtype), number(eps0, dtype)
    low1, high1, eps1 = number(low1, dtype), number(high1, dtype), number(eps1, dtype)
    s1, s3 = within_bounds(v1, bounds >> 2, low0, high0), within_bounds(v3, bounds >> 6, low1, high1)
    # The noise first: it takes the most registers, and what is loaded is not there yet.
    if seed is not None:
        key = tl.load(seed)
        rough: tl.constexpr = ROUGH & form0
        eps = noise_tile(key, offset, l0, l1, l2, b, o, i, tile, inner, quads, rough, tile_i, walk).to(dtype)
    elif noise is not None:
        eps = load(noise, noise_0, noise_1, b, o, i, batch, outer, inner, axes // NOISE & 15, walk, dtype)
    else:
        eps = number(0.0, dtype)  # of no consequence: nothing that depends on it is wanted
    if not at_sample:
        divergence, d0, d1, d2, d3 = formula_element(formula, v0, s1, v2, s3, w, form0, eps0, form1, eps1)
    deviation, d_deviation = deviation_of(s1, form0, eps0)
    sampled = v0 + deviation * eps
    store(z, z_0, z_1, sampled, b, o, i, batch, outer, inner, ALL, walk)
    if at_sample:
        divergence, d0, d1, d2, d3, d_z = element_at_sample(
            formula, v0, s1, v2, s3, sampled, eps, w, form0, eps0, form1, eps1
        )
    # Only what comes in is added: nothing times a divergence that is infinite would be NaN.
    if not comes_in:
        d0, d1, d2, d3 = number(0.0, dtype), number(0.0, dtype), number(0.0, dtype), number(0.0, dtype)
    if grad_z is not None or (at_sample and comes_in):
        if grad_z is not None:
            pull = load(
                grad_z, grad_z_0, grad_z_1, b, o, i, batch, outer, inner, axes // GRAD_Z & 15, walk, dtype
            )  # fmt: skip
            if at_sample and comes_in:
                pull += d_z
        else:
            pull = d_z
        d_spread = through(pull * eps, d_deviation, form0) if (MAP | SQUARED) & form0 else pull * (eps * d_deviation)
        if comes_in:
            d0, d1 = d0 + pull, d1 + d_spread
        else:
            d0, d1 = pull, d_spread
    d1, d3 = through_bounds(d1, v1, bounds >> 2, low0, high0), through_bounds(d3, v3, bounds >> 6, low1, high1)
    store_output(
        g0, g0_0, g0_1, d0, tile, b, o, i, batch, outer, inner,
        partials, counters, partials_step, counters_step, split,
        GRADS, axes, slots, walk, tile_b, tile_o, tile_i,
    )  # fmt: skip
    store_output(
        g1, g1_0, g1_1, d1, tile, b, o, i, batch, outer, inner,
        partials, counters, partials_step, counters_step, split,
        GRADS * 16, axes, slots, walk, tile_b, tile_o, tile_i,
    )  # fmt: skip
    store_output(
        g2, g2_0, g2_1, d2, tile, b, o, i, batch, outer, inner,
        partials, counters, partials_step, counters_step, split,
        GRADS * 16**2, axes, slots, walk, tile_b, tile_o, tile_i,
    )  # fmt: skip
    store_output(
        g3, g3_0, g3_1, d3, tile, b, o, i, batch, outer, inner,
        partials, counters, partials_step, counters_step, split,
        GRADS * 16**3, axes, slots, walk, tile_b, tile_o, tile_i,
    )  # fmt: skip
    store_output(
        value, value_0, value_1, divergence, tile, b, o, i, batch, outer, inner,
        partials, counters, partials_step, counters_step, split,
        VALUE, axes, slots, walk, tile_b, tile_o, tile_i,
    )  # fmt: skip


@triton.jit
def term_tile(
    tile, batch, outer, inner,
    in0, in0_0, in0_1,
    in1, in1_0, in1_1, in1_value,
    in2, in2_0, in2_1, in2_value,
    in3, in3_0, in3_1, in3_value,
    low0, high0, eps0, low1, high1, eps1,
    weight, weight_0, weight_1, weight_value,
    incoming, incoming_0, incoming_1, incoming_value,
    factor, constant,
    gain0, gain1, gain2, gain3,
    g0, g0_0, g0_1,
    g1, g1_0, g1_1,
    g2, g2_0, g2_1,
    g3, g3_0, g3_1,
    partials, counters, partials_step, counters_step, split, slots: tl.constexpr,
    formula: tl.constexpr, form0: tl.constexpr, form1: tl.constexpr, bounds: tl.constexpr, has_gains: tl.constexpr,
    axes: tl.constexpr, dtype: tl.constexpr, walk: tl.constexpr,
    tile_b: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr,
):  # fmt: skip
    """A formula on a tile: writes the gradients of sum(factor * incoming * weight * value) where they were given.

    Returns the value, and the positions of the elements. With a weight, that is weight * (value + constant): where the
    weight is 0, so are value and gradients, whatever the inputs hold.
    """
    b, o, i = positions(tile, outer, inner, tile_b, tile_o, tile_i, walk)
    v0 = load(in0, in0_0, in0_1, b, o, i, batch, outer, inner, axes & 15, walk, dtype)
    v1 = load_or_number(in1, in1_0, in1_1, in1_value, b, o, i, batch, outer, inner, axes // 16 & 15, walk, dtype)
    v2 = load_or_number(in2, in2_0, in2_1, in2_value, b, o, i, batch, outer, inner, axes // 16**2 & 15, walk, dtype)
    v3 = load_or_number(in3, in3_0, in3_1, in3_value, b, o, i, batch, outer, inner, axes // 16**3 & 15, walk, dtype)
    scale = factor.to(dtype)
    has_weight: tl.constexpr = ABSENT & (axes // WEIGHT) == 0
    if has_weight:
        w = load_or_number(
            weight, weight_0, weight_1, weight_value,
            b, o, i, batch, outer, inner, axes // WEIGHT & 15, walk, dtype,
        )  # fmt: skip
        scale = scale * w
    if ABSENT & (axes // INCOMING) == 0:
        scale = scale * load_or_number(
            incoming, incoming_0, incoming_1, incoming_value,
            b, o, i, batch, outer, inner, axes // INCOMING & 15, walk, dtype,
        )  # fmt: skip
    low0, high0, eps0 = number(low0, dtype), number(high0, dtype), number(eps0, dtype)
    low1, high1, eps1 = number(low1, dtype), number(high1, dtype), number(eps1, dtype)
    s0 = within_bounds(v0, bounds, low0, high0)
    s1 = within_bounds(v1, bounds >> 2, low0, high0)
    s2 = within_bounds(v2, bounds >> 4, low0, high0)
    s3 = within_bounds(v3, bounds >> 6, low1, high1)
    value, d0, d1, d2, d3 = formula_element(formula, s0, s1, s2, s3, scale, form0, eps0, form1, eps1)
    d0 = through_bounds(d0, v0, bounds, low0, high0)
    d1 = through_bounds(d1, v1, bounds >> 2, low0, high0)
    d2 = through_bounds(d2, v2, bounds >> 4, low0, high0)
    d3 = through_bounds(d3, v3, bounds >> 6, low1, high1)
    if has_gains:
        d0, d1 = d0 * number(gain0, dtype), d1 * number(gain1, dtype)
        d2, d3 = d2 * number(gain2, dtype), d3 * number(gain3, dtype)
    if has_weight:
        counts = w != 0.0
        value = tl.where(counts, w * (value + number(constant, dtype)), 0.0)
        d0, d1 = tl.where(counts, d0, 0.0), tl.where(counts, d1, 0.0)
        d2, d3 = tl.where(counts, d2, 0.0), tl.where(counts, d3, 0.0)
    store_output(
        g0, g0_0, g0_1, d0, tile, b, o, i, batch, outer, inner,
        partials, counters, partials_step, counters_step, split,
        GRADS, axes, slots, walk, tile_b, tile_o, tile_i,
    )  # fmt: skip
    store_output(
        g1, g1_0, g1_1, d1, tile, b, o, i, batch, outer, inner,
        partials, counters, partials_step, counters_step, split,
        GRADS * 16, axes, slots, walk, tile_b, tile_o, tile_i,
    )  # fmt: skip
    store_output(
        g2, g2_0, g2_1, d2, tile, b, o, i, batch, outer, inner,
        partials, counters, partials_step, counters_step, split,
        GRADS * 16**2, axes, slots, walk, tile_b, tile_o, tile_i,
    )  # fmt: skip
    store_output(
        g3, g3_0, g3_1, d3, tile, b, o, i, batch, outer, inner,
        partials, counters, partials_step, counters_step, split,
        GRADS * 16**3, axes, slots, walk, tile_b, tile_o, tile_i,
    )  # fmt: skip
    return value, b, o, i


@triton.jit
def gradient_factor(factor, normalizer, coefficient, coefficient_value, grad_scale, grad_scale_value):
    """What all of a term's gradients are multiplied by, in float64."""
    found = number(factor, tl.float64) * number_at(coefficient, coefficient_value)
    if normalizer is not None:
        found *= number_at(normalizer, 1.0)
    return found * number_at(grad_scale, grad_scale_value)


@triton.jit
def elementwise_kernel(
    batch, outer, inner,
    in0, in0_0, in0_1,
    in1, in1_0, in1_1, in1_value: tl.float64,
    in2, in2_0, in2_1, in2_value: tl.float64,
    in3, in3_0, in3_1, in3_value: tl.float64,
    low0: tl.float64, high0: tl.float64, eps0: tl.float64, low1: tl.float64, high1: tl.float64, eps1: tl.float64,
    weight, weight_0, weight_1, weight_value: tl.float64,
    incoming, incoming_0, incoming_1, incoming_value: tl.float64,
    factor: tl.float64, constant: tl.float64, normalizer,
    coefficient, coefficient_value: tl.float64, grad_scale, grad_scale_value: tl.float64,
    gain0: tl.float64, gain1: tl.float64, gain2: tl.float64, gain3: tl.float64,
    value, value_0, value_1,
    g0, g0_0, g0_1,
    g1, g1_0, g1_1,
    g2, g2_0, g2_1,
    g3, g3_0, g3_1,
    partials, counters, partials_step, counters_step, split, slots: tl.constexpr,
    formula: tl.constexpr, form0: tl.constexpr, form1: tl.constexpr, bounds: tl.constexpr, has_gains: tl.constexpr,
    axes: tl.constexpr, dtype: tl.constexpr, walk: tl.constexpr,
    tile_b: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr,
):  # fmt: skip
    """A term element by element: its weighted values, the constant added, and its gradients."""
    tile = tl.program_id(0)
    values, b, o, i = term_tile(
        tile, batch, outer, inner,
        in0, in0_0, in0_1,
        in1, in1_0, in1_1, in1_value,
        in2, in2_0, in2_1, in2_value,
        in3, in3_0, in3_1, in3_value,
        low0, high0, eps0, low1, high1, eps1,
        weight, weight_0, weight_1, weight_value,
        incoming, incoming_0, incoming_1, incoming_value,
        gradient_factor(factor, normalizer, coefficient, coefficient_value, grad_scale, grad_scale_value), constant,
        gain0, gain1, gain2, gain3,
        g0, g0_0, g0_1,
        g1, g1_0, g1_1,
        g2, g2_0, g2_1,
        g3, g3_0, g3_1,
        partials, counters, partials_step, counters_step, split, slots,
        formula, form0, form1, bounds, has_gains, axes, dtype, walk, tile_b, tile_o, tile_i,
    )  # fmt: skip
    if ABSENT & (axes // WEIGHT):
        values += number(constant, dtype)
    store_output(
        value, value_0, value_1, values, tile, b, o, i, batch, outer, inner,
        partials, counters, partials_step, counters_step, split,
        VALUE, axes, slots, walk, tile_b, tile_o, tile_i,
    )  # fmt: skip


# --- objectives -----------------------------------------------------------------------------------------------------
#
# A tile's sum of values goes to ``totals``: the first member of each group, then the second, and so on. A group is a
# row of tiles, where there is a value for each sample, else all tiles. The values are finished ``rows`` at a time, a
# chunk: by the program that is the last of those that take its samples, of both terms.


@triton.jit
def publish_total(
    totals, value, tile, b, o, i, batch, outer, inner, by_sample: tl.constexpr, walk: tl.constexpr,
    tile_b: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr,
):  # fmt: skip
    """Write a tile's part of an objective."""
    axes: tl.constexpr = BATCH if by_sample else 0
    sums = sum_tile(value, b, o, i, batch, outer, inner, axes, walk, tile_b, tile_o, tile_i)
    group, groups, member, _ = membership(tile, batch, outer, inner, axes, tile_b, tile_o, tile_i)
    lanes: tl.constexpr = tile_b if by_sample else 1
    offsets = (member * groups + group) * lanes + tl.arange(0, lanes)
    publish(totals, offsets, tl.reshape(sums, (lanes,)).to(tl.float64), lanes)


@triton.jit
def addends_of(tiles, batch, by_sample: tl.constexpr, tile_b: tl.constexpr):
    """How many tiles' sums make a value of a term, and how far they are apart in ``totals``."""
    if by_sample:
        groups = tl.cdiv(batch, tile_b)
        addends, step = tiles // groups, groups * tile_b
    else:
        addends, step = tiles, 1
    return addends, step


@triton.jit
def blocks_of(chunk, batch, by_sample: tl.constexpr, tile_b: tl.constexpr, rows: tl.constexpr):
    """How many rows of tiles there are in a chunk."""
    return tl.cdiv(tl.minimum(batch - chunk * rows, rows), tile_b) if by_sample else 1


@triton.jit
def is_last_of_part(
    totals, again, counters, tile, tiles, batch, chunk, chunks, first_part, split,
    by_sample: tl.constexpr, tile_b: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """Whether a tile is the last of the ``split`` whose sums are added up first. If so, writes these sums to ``again``.

    The term's parts begin at ``first_part``.
    """
    addends, step = addends_of(tiles, batch, by_sample, tile_b)
    member = tile % addends if by_sample else tile
    part = member // split
    count = tl.minimum(addends - part * split, split)
    at = (first_part + part) * chunks + chunk
    last = is_last(counters + at, count * blocks_of(chunk, batch, by_sample, tile_b, rows))
    if last:
        first = chunk * rows
        found = add_up(totals, first + part * split * step, step, count, rows, batch - first if by_sample else 1)
        publish(again, at * rows + tl.arange(0, rows), found, rows)
    return last


@triton.jit
def term_values(
    formula: tl.constexpr, totals, first_total, step, addends, batch, given, given_0, factor, normalizer, constant,
    out, out_0, first, values, by_sample: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    """factor * normalizer * (sum + constant), ``rows`` of them from the first on; written where that is wanted.

    The sums are those of as many ``addends`` in ``totals`` or, without a formula, of ``batch`` given values.
    """
    at = first + tl.arange(0, rows)
    if formula is not None:
        found = add_up(totals, first_total, step, addends, rows, values - first)
    elif by_sample:
        found = tl.load(given + at * given_0, mask=at < values, other=0).to(tl.float64)
    else:
        found = add_up(given, 0, given_0, batch, rows, 1)
    if constant is not None:
        found += number(constant, tl.float64)
    found *= number(factor, tl.float64)
    if normalizer is not None:
        found *= number_at(normalizer, 1.0)
    if out is not None:
        tl.store(out + at * out_0, narrow(found, out.dtype.element_ty), mask=at < values)
    return found


@triton.jit
def objective_kernel(
    a_tiles, a_batch, a_outer, a_inner,
    a_in0, a_in0_0, a_in0_1,
    a_in1, a_in1_0, a_in1_1, a_in1_value: tl.float64,
    a_in2, a_in2_0, a_in2_1, a_in2_value: tl.float64,
    a_in3, a_in3_0, a_in3_1, a_in3_value: tl.float64,
    a_low0: tl.float64, a_high0: tl.float64, a_eps0: tl.float64,
    a_low1: tl.float64, a_high1: tl.float64, a_eps1: tl.float64,
    a_weight, a_weight_0, a_weight_1, a_weight_value: tl.float64,
    a_factor: tl.float64, a_constant: tl.float64, a_normalizer, a_coefficient, a_coefficient_value: tl.float64,
    a_gain0: tl.float64, a_gain1: tl.float64, a_gain2: tl.float64, a_gain3: tl.float64,
    a_g0, a_g0_0, a_g0_1,
    a_g1, a_g1_0, a_g1_1,
    a_g2, a_g2_0, a_g2_1,
    a_g3, a_g3_0, a_g3_1,
    a_partials, a_counters, a_partials_step, a_counters_step, a_split, a_slots: tl.constexpr, a_out, a_out_0,
    a_formula: tl.constexpr, a_form0: tl.constexpr, a_form1: tl.constexpr, a_bounds: tl.constexpr,
    a_has_gains: tl.constexpr, a_axes: tl.constexpr, a_dtype: tl.constexpr, a_walk: tl.constexpr,
    a_tile_b: tl.constexpr, a_tile_o: tl.constexpr, a_tile_i: tl.constexpr,
    b_tiles, b_batch, b_outer, b_inner,
    b_in0, b_in0_0, b_in0_1,
    b_in1, b_in1_0, b_in1_1, b_in1_value: tl.float64,
    b_in2, b_in2_0, b_in2_1, b_in2_value: tl.float64,
    b_in3, b_in3_0, b_in3_1, b_in3_value: tl.float64,
    b_low0: tl.float64, b_high0: tl.float64, b_eps0: tl.float64,
    b_low1: tl.float64, b_high1: tl.float64, b_eps1: tl.float64,
    b_weight, b_weight_0, b_weight_1, b_weight_value: tl.float64,
    b_factor: tl.float64, b_constant: tl.float64, b_normalizer, b_coefficient, b_coefficient_value: tl.float64,
    b_gain0: tl.float64, b_gain1: tl.float64, b_gain2: tl.float64, b_gain3: tl.float64,
    b_g0, b_g0_0, b_g0_1,
    b_g1, b_g1_0, b_g1_1,
    b_g2, b_g2_0, b_g2_1,
    b_g3, b_g3_0, b_g3_1,
    b_partials, b_counters, b_partials_step, b_counters_step, b_split, b_slots: tl.constexpr, b_out, b_out_0,
    b_formula: tl.constexpr, b_form0: tl.constexpr, b_form1: tl.constexpr, b_bounds: tl.constexpr,
    b_has_gains: tl.constexpr, b_axes: tl.constexpr, b_dtype: tl.constexpr, b_walk: tl.constexpr,
    b_tile_b: tl.constexpr, b_tile_o: tl.constexpr, b_tile_i: tl.constexpr,
    loss, loss_0, values, totals, again, counters, chunks, split, grad_scale, grad_scale_value: tl.float64,
    by_sample: tl.constexpr, rows: tl.constexpr, has_tiles: tl.constexpr,
):  # fmt: skip
    """loss = sum of coefficient * term over one or two terms, a and b; the gradients of the loss times grad_scale.

    There are ``values`` values: one, or one for each sample. A term without a formula is given: ``in0`` has ``batch``
    values. The first programs take the tiles of a, the others those of b, or where there are none, a chunk each;
    ``totals`` holds the sums of the tiles of both, ``again`` those of ``split`` of them. The first of ``counters``
    count what comes to a chunk; those of a term's gradients begin where its own parameter says. Without a weight, a
    term's constant is what is added to each sum, not to each element.
    """
    program = tl.program_id(0)
    chunk = program
    last = program >= 0
    a_addends, a_step, b_addends, b_step = 0, 1, 0, 1
    first_b = 0  # the first program that takes a tile of b
    a_totals = 0
    a_arrivals = 0  # at the counter of a chunk, or where sums are split, the parts of a term
    if a_formula is not None:
        a_addends, a_step = addends_of(a_tiles, a_batch, by_sample, a_tile_b)
        first_b = a_tiles
        a_totals = a_tiles * (a_tile_b if by_sample else 1)
        if split is not None:
            a_arrivals = tl.cdiv(a_addends, split)
    if b_formula is not None:
        b_addends, b_step = addends_of(b_tiles, b_batch, by_sample, b_tile_b)
    if has_tiles:
        if not by_sample:
            chunk = program * 0
        arrived = program >= 0
        if a_formula is not None:  # noqa: SIM102 - known when compiling, the other is not
            if program < first_b:
                value, b, o, i = term_tile(
                    program, a_batch, a_outer, a_inner,
                    a_in0, a_in0_0, a_in0_1,
                    a_in1, a_in1_0, a_in1_1, a_in1_value,
                    a_in2, a_in2_0, a_in2_1, a_in2_value,
                    a_in3, a_in3_0, a_in3_1, a_in3_value,
                    a_low0, a_high0, a_eps0, a_low1, a_high1, a_eps1,
                    a_weight, a_weight_0, a_weight_1, a_weight_value, None, 0, 0, 1.0,
                    gradient_factor(
                        a_factor, a_normalizer, a_coefficient, a_coefficient_value, grad_scale, grad_scale_value
                    ),
                    a_constant,
                    a_gain0, a_gain1, a_gain2, a_gain3,
                    a_g0, a_g0_0, a_g0_1,
                    a_g1, a_g1_0, a_g1_1,
                    a_g2, a_g2_0, a_g2_1,
                    a_g3, a_g3_0, a_g3_1,
                    a_partials, counters + a_counters, a_partials_step, a_counters_step, a_split, a_slots,
                    a_formula, a_form0, a_form1, a_bounds, a_has_gains, a_axes, a_dtype, a_walk,
                    a_tile_b, a_tile_o, a_tile_i,
                )  # fmt: skip
                publish_total(
                    totals, value, program, b, o, i, a_batch, a_outer, a_inner, by_sample, a_walk,
                    a_tile_b, a_tile_o, a_tile_i,
                )  # fmt: skip
                if by_sample:
                    chunk = (program // a_addends) * a_tile_b // rows
                if split is not None:
                    arrived = is_last_of_part(
                        totals, again, counters + chunks, program, a_tiles, a_batch, chunk, chunks, 0, split,
                        by_sample, a_tile_b, rows,
                    )  # fmt: skip
        if b_formula is not None:
            tile = program - first_b
            if tile >= 0:
                value, b, o, i = term_tile(
                    tile, b_batch, b_outer, b_inner,
                    b_in0, b_in0_0, b_in0_1,
                    b_in1, b_in1_0, b_in1_1, b_in1_value,
                    b_in2, b_in2_0, b_in2_1, b_in2_value,
                    b_in3, b_in3_0, b_in3_1, b_in3_value,
                    b_low0, b_high0, b_eps0, b_low1, b_high1, b_eps1,
                    b_weight, b_weight_0, b_weight_1, b_weight_value, None, 0, 0, 1.0,
                    gradient_factor(
                        b_factor, b_normalizer, b_coefficient, b_coefficient_value, grad_scale, grad_scale_value
                    ),
                    b_constant,
                    b_gain0, b_gain1, b_gain2, b_gain3,
                    b_g0, b_g0_0, b_g0_1,
                    b_g1, b_g1_0, b_g1_1,
                    b_g2, b_g2_0, b_g2_1,
                    b_g3, b_g3_0, b_g3_1,
                    b_partials, counters + b_counters, b_partials_step, b_counters_step, b_split, b_slots,
                    b_formula, b_form0, b_form1, b_bounds, b_has_gains, b_axes, b_dtype, b_walk,
                    b_tile_b, b_tile_o, b_tile_i,
                )  # fmt: skip
                publish_total(
                    totals + a_totals, value, tile, b, o, i, b_batch, b_outer, b_inner, by_sample, b_walk,
                    b_tile_b, b_tile_o, b_tile_i,
                )  # fmt: skip
                if by_sample:
                    chunk = (tile // b_addends) * b_tile_b // rows
                if split is not None:
                    arrived = is_last_of_part(
                        totals + a_totals, again, counters + chunks, tile, b_tiles, b_batch, chunk, chunks, a_arrivals,
                        split, by_sample, b_tile_b, rows,
                    )  # fmt: skip
        if split is None:
            arrivals = 0
            if a_formula is not None:
                arrivals += a_addends * blocks_of(chunk, a_batch, by_sample, a_tile_b, rows)
            if b_formula is not None:
                arrivals += b_addends * blocks_of(chunk, b_batch, by_sample, b_tile_b, rows)
            last = is_last(counters + chunk, arrivals)
        else:
            b_arrivals = tl.cdiv(b_addends, split)
            last = arrived
            if arrived:
                last = is_last(counters + chunk, a_arrivals + b_arrivals)
    if last:
        first = chunk * rows
        total = tl.zeros((rows,), tl.float64)
        # The coefficients are read here, not before: two values more over the whole of a tile's work would be two
        # registers too many.
        if a_formula is not None or a_in0 is not None:
            if split is None:
                found = term_values(
                    a_formula, totals, first, a_step, a_addends, a_batch, a_in0, a_in0_0, a_factor, a_normalizer,
                    a_constant if ABSENT & (a_axes // WEIGHT) else None, a_out, a_out_0, first, values, by_sample, rows,
                )  # fmt: skip
            else:
                found = term_values(
                    a_formula, again, first, chunks * rows, a_arrivals, a_batch, a_in0, a_in0_0, a_factor, a_normalizer,
                    a_constant if ABSENT & (a_axes // WEIGHT) else None, a_out, a_out_0, first, values, by_sample, rows,
                )  # fmt: skip
            total += number_at(a_coefficient, a_coefficient_value) * found
        if b_formula is not None or b_in0 is not None:
            if split is None:
                found = term_values(
                    b_formula, totals, a_totals + first, b_step, b_addends, b_batch, b_in0, b_in0_0, b_factor,
                    b_normalizer, b_constant if ABSENT & (b_axes // WEIGHT) else None, b_out, b_out_0, first, values,
                    by_sample, rows,
                )  # fmt: skip
            else:
                found = term_values(
                    b_formula, again, (a_arrivals * chunks + chunk) * rows, chunks * rows, b_arrivals, b_batch, b_in0,
                    b_in0_0, b_factor, b_normalizer, b_constant if ABSENT & (b_axes // WEIGHT) else None, b_out,
                    b_out_0, first, values, by_sample, rows,
                )  # fmt: skip
            total += number_at(b_coefficient, b_coefficient_value) * found
        at = first + tl.arange(0, rows)
        tl.store(loss + at * loss_0, narrow(total, loss.dtype.element_ty), mask=at < values)


# --- the incoming factor --------------------------------------------------------------------------------------------


@triton.jit
def scale_blocks(data, count, factor, tile: tl.constexpr, walk: tl.constexpr):
    """Multiply every so many blocks of a dense tensor in place, if the tensor was given: a program's share of them."""
    if data is not None:
        dtype: tl.constexpr = tl.float64 if data.dtype.element_ty == tl.float64 else tl.float32
        for block in range(tl.program_id(0), tl.cdiv(count, tile), tl.num_programs(0)):
            first = number(block, tl.int64 if WIDE & walk else tl.int32) * tile
            at = first + tl.arange(0, tile)
            value = tl.load(data + at, mask=at < count, other=0).to(dtype) * factor.to(dtype)
            tl.store(data + at, narrow(value, data.dtype.element_ty), mask=at < count)


@triton.jit
def scale_kernel(
    factor, coefficient_value: tl.float64, product,
    data_0, count_0,
    data_1, count_1,
    data_2, count_2,
    data_3, count_3,
    data_4, count_4,
    data_5, count_5,
    data_6, count_6,
    data_7, count_7,
    tile: tl.constexpr, walk: tl.constexpr,
):  # fmt: skip
    """Multiply up to eight dense tensors by one factor, in place; touch none of them when it is 1. Its product with a
    coefficient goes where that is wanted, if it is."""
    by = tl.load(factor)
    if product is not None:
        multiple = narrow(by.to(tl.float64) * coefficient_value, product.dtype.element_ty)
        tl.store(product, multiple, mask=tl.program_id(0) == 0)
    if by != 1.0:
        scale_blocks(data_0, count_0, by, tile, walk)
        scale_blocks(data_1, count_1, by, tile, walk)
        scale_blocks(data_2, count_2, by, tile, walk)
        scale_blocks(data_3, count_3, by, tile, walk)
        scale_blocks(data_4, count_4, by, tile, walk)
        scale_blocks(data_5, count_5, by, tile, walk)
        scale_blocks(data_6, count_6, by, tile, walk)
        scale_blocks(data_7, count_7, by, tile, walk)
