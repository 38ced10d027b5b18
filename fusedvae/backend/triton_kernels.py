"""The Triton kernels: one launch a stage over operands in canonical form, the formulas those of `triton_math`.

A program takes a tile of (tile_b, tile_o, tile_i) elements of the extent (batch, outer, inner). An operand comes as its
address, its strides over batch and outer, and its axes: the dimensions it varies along, one bit each (BATCH, OUTER,
INNER); it is read as a block of size 1 along the others. A number comes as ``..._value`` instead. An operand that was
not given is None, its axes too, and everything about it disappears when the kernel is compiled.

The inputs of a formula are in0 to in3, the gradients by them g0 to g3; ``form0`` and ``form1`` are the forms of its
scales, as triton_math has them. ``axes`` are those of the inputs, and of
what the constants below say, in this order.

A value or gradient is summed over the dimensions that are not among its axes. Where it shares its sums with other
tiles, it has one of the launch's ``slots``, else None: slot k of ``partials`` begins at k * ``partials_step``, that of
``counters`` at k * ``counters_step``.

Sums are the same on every run. A tile's is a tree, in the dtype of the arithmetic; the tiles' sums go to a workspace,
each at an offset of its own, and the program that finishes last adds them in order, in float64. The counter that tells
which one that is is zero again afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_math import (
    box_muller,
    deviation_of,
    element_at_sample,
    formula_element,
    philox4x32,
    through,
    unit_interval,
)

BATCH = tl.constexpr(1)
OUTER = tl.constexpr(2)
INNER = tl.constexpr(4)
ALL = tl.constexpr(7)

# Positions in ``axes``.
INCOMING = tl.constexpr(4)
VALUE = tl.constexpr(5)
GRADS = tl.constexpr(6)  # the first of four
WEIGHT = tl.constexpr(10)  # of a term
NOISE = tl.constexpr(10)  # of the latent
GRAD_Z = tl.constexpr(11)

COMBINED = tl.constexpr(1024)
"""Partial sums that are read at once when they are added up."""


# --- tiles ----------------------------------------------------------------------------------------------------------


@triton.jit
def positions(tile, outer, inner, tile_b: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr, wide: tl.constexpr):
    """The elements of a tile along each dimension, as blocks that broadcast to the tile."""
    tiles_o, tiles_i = tl.cdiv(outer, tile_o), tl.cdiv(inner, tile_i)
    if wide:  # elements or strides that 32 bits cannot count
        tile = tile.to(tl.int64)
    row = tile // tiles_i
    b = (row // tiles_o) * tile_b + tl.arange(0, tile_b)[:, None, None]
    o = (row % tiles_o) * tile_o + tl.arange(0, tile_o)[None, :, None]
    i = (tile % tiles_i) * tile_i + tl.arange(0, tile_i)[None, None, :]
    return b, o, i


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
def load(data, s0, s1, b, o, i, batch, outer, inner, axes: tl.constexpr, dtype: tl.constexpr):
    """An operand's elements of a tile, in the dtype of the arithmetic."""
    offsets, exists = offsets_of(s0, s1, b, o, i, batch, outer, inner, axes)
    return tl.load(data + offsets, mask=exists, other=0).to(dtype)


@triton.jit
def number(value, dtype: tl.constexpr):
    """A number that came as an argument, in some dtype."""
    return tl.full((), value, dtype)


@triton.jit
def number_at(data, value):
    """A number that came in memory or, without ``data``, as ``value``; in float64."""
    return tl.load(data).to(tl.float64) if data is not None else number(value, tl.float64)


@triton.jit
def load_or_number(data, s0, s1, value, b, o, i, batch, outer, inner, axes: tl.constexpr, dtype: tl.constexpr):
    """An operand's elements of a tile or, where it came as a number, that; in the dtype of the arithmetic."""
    return load(data, s0, s1, b, o, i, batch, outer, inner, axes, dtype) if data is not None else number(value, dtype)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """To an operand's dtype; no chip rounds float64 to 16 bits in one go."""
    if dtype.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(dtype)


@triton.jit
def store(data, s0, s1, value, b, o, i, batch, outer, inner, axes: tl.constexpr):
    """Write an operand's elements of a tile, where the operand was given."""
    if data is not None:
        offsets, exists = offsets_of(s0, s1, b, o, i, batch, outer, inner, axes)
        tl.store(data + offsets, narrow(value, data.dtype.element_ty), mask=exists)


# --- sums -----------------------------------------------------------------------------------------------------------


@triton.jit
def sum_tile(
    value, b, o, i, batch, outer, inner, axes: tl.constexpr,
    tile_b: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr,
):  # fmt: skip
    """Sums of the elements of a tile that exist, over the dimensions that are not in ``axes``."""
    exists = (b < batch) & (o < outer) & (i < inner)
    value = tl.where(exists, tl.broadcast_to(value, (tile_b, tile_o, tile_i)), 0.0)
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
    row = tile // tiles_i
    group, groups, member, members = tile * 0, 1, tile * 0, 1
    if BATCH & axes:
        group, groups = row // tiles_o, tiles_b
    else:
        member, members = row // tiles_o, tiles_b
    if OUTER & axes:
        group, groups = group * tiles_o + row % tiles_o, groups * tiles_o
    else:
        member, members = member * tiles_o + row % tiles_o, members * tiles_o
    if INNER & axes:
        group, groups = group * tiles_i + tile % tiles_i, groups * tiles_i
    else:
        member, members = member * tiles_i + tile % tiles_i, members * tiles_i
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
def publish_sum(
    totals, value, tile, b, o, i, batch, outer, inner, axes: tl.constexpr,
    tile_b: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr,
):  # fmt: skip
    """Write a tile's part of an objective: the first member of each group, then the second, and so on."""
    sums = sum_tile(value, b, o, i, batch, outer, inner, axes, tile_b, tile_o, tile_i)
    group, groups, member, _ = membership(tile, batch, outer, inner, axes, tile_b, tile_o, tile_i)
    lanes: tl.constexpr = sums.numel
    offsets = (member * groups + group) * lanes + tl.arange(0, lanes)
    publish(totals, offsets, tl.reshape(sums, (lanes,)).to(tl.float64), lanes)


@triton.jit
def store_output(
    data, s0, s1, value, tile, b, o, i, batch, outer, inner,
    partials, counters, partials_step, counters_step, axes: tl.constexpr, slot: tl.constexpr,
    tile_b: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr,
):  # fmt: skip
    """Write a value or a gradient where it was given, summed over the dimensions that are not in ``axes``."""
    if data is not None:
        if axes == ALL:
            store(data, s0, s1, value, b, o, i, batch, outer, inner, ALL)
        elif slot is None:
            store_sum(data, s0, s1, value, tile, b, o, i, batch, outer, inner, None, None, axes, tile_b, tile_o, tile_i)
        else:
            store_sum(
                data, s0, s1, value, tile, b, o, i, batch, outer, inner,
                partials + slot * number(partials_step, tl.int64), counters + slot * number(counters_step, tl.int64),
                axes, tile_b, tile_o, tile_i,
            )  # fmt: skip


@triton.jit
def store_sum(
    data, s0, s1, value, tile, b, o, i, batch, outer, inner, partials, counters, axes: tl.constexpr,
    tile_b: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr,
):  # fmt: skip
    """Write an operand that is summed over the dimensions that are not in ``axes``.

    Without ``partials``, tiles share no sum.
    """
    sums = sum_tile(value, b, o, i, batch, outer, inner, axes, tile_b, tile_o, tile_i)
    if partials is None:
        store(data, s0, s1, sums, b, o, i, batch, outer, inner, axes)
    else:
        group, groups, member, members = membership(tile, batch, outer, inner, axes, tile_b, tile_o, tile_i)
        lanes: tl.constexpr = sums.numel
        lane = tl.arange(0, lanes)
        publish(partials, (member * groups + group) * lanes + lane, tl.reshape(sums, (lanes,)), lanes)
        if is_last(counters + group, members):
            total = add_up(partials, group * lanes, groups * lanes, members, lanes, lanes)
            store(data, s0, s1, tl.reshape(total, sums.shape), b, o, i, batch, outer, inner, axes)


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
def noise_in_quads(seed, quad, wide: tl.constexpr):
    """The noise of elements 4 * quad to 4 * quad + 3 of the stream, one after the other along inner."""
    w0, w1, w2, w3 = words_of(quad, seed, wide)
    n0, n1 = box_muller(unit_interval(w0), unit_interval(w1))
    n2, n3 = box_muller(unit_interval(w2), unit_interval(w3))
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def noise_one_by_one(seed, index, wide: tl.constexpr):
    """The noise of the elements ``index`` of the stream: each makes its own four, and picks its lane."""
    w0, w1, w2, w3 = words_of(index >> 2, seed, wide)
    second_pair = (index & 2) != 0
    n0, n1 = box_muller(unit_interval(tl.where(second_pair, w2, w0)), unit_interval(tl.where(second_pair, w3, w1)))
    return tl.where((index & 1) != 0, n1, n0)


@triton.jit
def noise_tile(
    seed, offset, l0, l1, l2, b, o, i, tile, inner, in_quads: tl.constexpr, tile_i: tl.constexpr, wide: tl.constexpr
):  # fmt: skip
    """The noise of a tile, in float32; l0, l1, l2 are the strides of the logical index, which begins at ``offset``.

    ``in_quads``: inner is logically contiguous, and its rows begin at multiples of 4. Then a counter makes four
    neighbours, as long as ``offset`` is a multiple of 4 too: one that came as a number is.
    """
    if in_quads:
        first = (tile % tl.cdiv(inner, tile_i)) * (tile_i // 4)
        if wide:
            first = first.to(tl.int64)
        quad = (b * l0 + o * l1) // 4 + (first + tl.arange(0, tile_i // 4)[None, None, :])
        if offset is None:
            noise = noise_in_quads(seed, quad, wide)
        elif offset.dtype.is_ptr():
            start = tl.load(offset).to(tl.int64)
            if start % 4 == 0:
                noise = noise_in_quads(seed, quad + start // 4, True)
            else:
                noise = noise_one_by_one(seed, b * l0 + o * l1 + i + start, True)
        else:
            noise = noise_in_quads(seed, quad + offset.to(tl.int64) // 4, True)
    else:
        index = b * l0 + o * l1 + i * l2
        if offset is None:
            noise = noise_one_by_one(seed, index, wide)
        else:
            start = tl.load(offset).to(tl.int64) if offset.dtype.is_ptr() else offset.to(tl.int64)
            noise = noise_one_by_one(seed, index + start, True)
    return noise


# --- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def normal_kernel(
    out, seed, count, tile: tl.constexpr, wide: tl.constexpr
):  # fmt: skip
    """The noise stream of ``seed`` in a contiguous tensor."""
    program = tl.program_id(0)
    b, o, i = positions(program, 1, count, 1, 1, tile, wide)
    noise = noise_tile(tl.load(seed), None, 0, 0, 1, b, o, i, program, count, True, tile, wide)
    store(out, 0, 0, noise, b, o, i, 1, 1, count, ALL)


@triton.jit(do_not_specialize=["offset"])
def latent_kernel(
    batch, outer, inner, l0, l1, l2, seed, offset,
    in0, in0_0, in0_1,
    in1, in1_0, in1_1, in1_value: tl.float64,
    in2, in2_0, in2_1, in2_value: tl.float64,
    in3, in3_0, in3_1, in3_value: tl.float64,
    noise, noise_0, noise_1,
    grad_z, grad_z_0, grad_z_1,
    incoming, incoming_0, incoming_1, incoming_value: tl.float64,
    z, z_0, z_1,
    value, value_0, value_1,
    g0, g0_0, g0_1,
    g1, g1_0, g1_1,
    g2, g2_0, g2_1,
    g3, g3_0, g3_1,
    partials, counters, partials_step, counters_step, slots: tl.constexpr,
    formula: tl.constexpr, at_sample: tl.constexpr, form0: tl.constexpr, form1: tl.constexpr,
    axes: tl.constexpr, in_quads: tl.constexpr, dtype: tl.constexpr, wide: tl.constexpr,
    tile_b: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr,
):  # fmt: skip
    """The sample z = mean + deviation * noise of the first two inputs, beside a divergence, perhaps at the sample.

    Writes z, the divergence and the gradients of sum(grad_z * z) + sum(incoming * divergence), each where it was given.
    """
    tile = tl.program_id(0)
    b, o, i = positions(tile, outer, inner, tile_b, tile_o, tile_i, wide)
    v0 = load(in0, in0_0, in0_1, b, o, i, batch, outer, inner, axes[0], dtype)
    v1 = load_or_number(in1, in1_0, in1_1, in1_value, b, o, i, batch, outer, inner, axes[1], dtype)
    v2 = load_or_number(in2, in2_0, in2_1, in2_value, b, o, i, batch, outer, inner, axes[2], dtype)
    v3 = load_or_number(in3, in3_0, in3_1, in3_value, b, o, i, batch, outer, inner, axes[3], dtype)
    if axes[INCOMING] is not None:
        w = load_or_number(
            incoming, incoming_0, incoming_1, incoming_value, b, o, i, batch, outer, inner, axes[INCOMING], dtype
        )  # fmt: skip
    else:
        w = number(1.0, dtype)
    if not at_sample:  # before the noise, so that what it takes is free again
        divergence, d0, d1, d2, d3 = formula_element(formula, v0, v1, v2, v3, w, form0, form1)
    deviation, d_deviation = deviation_of(v1, form0)
    if seed is not None:
        eps = noise_tile(tl.load(seed), offset, l0, l1, l2, b, o, i, tile, inner, in_quads, tile_i, wide).to(dtype)
    elif noise is not None:
        eps = load(noise, noise_0, noise_1, b, o, i, batch, outer, inner, axes[NOISE], dtype)
    else:
        eps = number(0.0, dtype)  # of no consequence: nothing that depends on it is wanted
    sampled = v0 + deviation * eps
    store(z, z_0, z_1, sampled, b, o, i, batch, outer, inner, ALL)
    if at_sample:
        divergence, d0, d1, d2, d3, d_z = element_at_sample(formula, v0, v1, v2, v3, sampled, eps, w, form0, form1)
    # Only what comes in is added: nothing times a divergence that is infinite would be NaN.
    comes_in: tl.constexpr = axes[INCOMING] is not None
    if not comes_in:
        d0, d1, d2, d3 = number(0.0, dtype), number(0.0, dtype), number(0.0, dtype), number(0.0, dtype)
    if grad_z is not None or (at_sample and comes_in):
        if grad_z is not None:
            pull = load(grad_z, grad_z_0, grad_z_1, b, o, i, batch, outer, inner, axes[GRAD_Z], dtype)
            if at_sample and comes_in:
                pull += d_z
        else:
            pull = d_z
        d_spread = through(pull * eps, d_deviation, form0) if form0 is not None else pull * (eps * d_deviation)
        if comes_in:
            d0, d1 = d0 + pull, d1 + d_spread
        else:
            d0, d1 = pull, d_spread
    store_output(
        g0, g0_0, g0_1, d0, tile, b, o, i, batch, outer, inner,
        partials, counters, partials_step, counters_step, axes[GRADS], slots[1], tile_b, tile_o, tile_i,
    )  # fmt: skip
    store_output(
        g1, g1_0, g1_1, d1, tile, b, o, i, batch, outer, inner,
        partials, counters, partials_step, counters_step, axes[GRADS + 1], slots[2], tile_b, tile_o, tile_i,
    )  # fmt: skip
    store_output(
        g2, g2_0, g2_1, d2, tile, b, o, i, batch, outer, inner,
        partials, counters, partials_step, counters_step, axes[GRADS + 2], slots[3], tile_b, tile_o, tile_i,
    )  # fmt: skip
    store_output(
        g3, g3_0, g3_1, d3, tile, b, o, i, batch, outer, inner,
        partials, counters, partials_step, counters_step, axes[GRADS + 3], slots[4], tile_b, tile_o, tile_i,
    )  # fmt: skip
    store_output(
        value, value_0, value_1, divergence, tile, b, o, i, batch, outer, inner,
        partials, counters, partials_step, counters_step, axes[VALUE], slots[0], tile_b, tile_o, tile_i,
    )  # fmt: skip


@triton.jit
def term_tile(
    tile, batch, outer, inner,
    in0, in0_0, in0_1,
    in1, in1_0, in1_1, in1_value,
    in2, in2_0, in2_1, in2_value,
    in3, in3_0, in3_1, in3_value,
    weight, weight_0, weight_1, weight_value,
    incoming, incoming_0, incoming_1, incoming_value,
    factor, constant,
    g0, g0_0, g0_1,
    g1, g1_0, g1_1,
    g2, g2_0, g2_1,
    g3, g3_0, g3_1,
    partials, counters, partials_step, counters_step, slots: tl.constexpr,
    formula: tl.constexpr, form0: tl.constexpr, form1: tl.constexpr, gains: tl.constexpr,
    axes: tl.constexpr, dtype: tl.constexpr, wide: tl.constexpr,
    tile_b: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr,
):  # fmt: skip
    """A formula on a tile: writes the gradients of sum(factor * incoming * weight * value) where they were given.

    Returns the value, and the positions of the elements. With a weight, that is weight * (value + constant): where the
    weight is 0, so are value and gradients, whatever the inputs hold.
    """
    b, o, i = positions(tile, outer, inner, tile_b, tile_o, tile_i, wide)
    v0 = load(in0, in0_0, in0_1, b, o, i, batch, outer, inner, axes[0], dtype)
    v1 = load_or_number(in1, in1_0, in1_1, in1_value, b, o, i, batch, outer, inner, axes[1], dtype)
    v2 = load_or_number(in2, in2_0, in2_1, in2_value, b, o, i, batch, outer, inner, axes[2], dtype)
    v3 = load_or_number(in3, in3_0, in3_1, in3_value, b, o, i, batch, outer, inner, axes[3], dtype)
    scale = factor.to(dtype)
    if axes[WEIGHT] is not None:
        w = load_or_number(
            weight, weight_0, weight_1, weight_value, b, o, i, batch, outer, inner, axes[WEIGHT], dtype
        )  # fmt: skip
        scale = scale * w
    if axes[INCOMING] is not None:
        scale = scale * load_or_number(
            incoming, incoming_0, incoming_1, incoming_value, b, o, i, batch, outer, inner, axes[INCOMING], dtype
        )  # fmt: skip
    value, d0, d1, d2, d3 = formula_element(formula, v0, v1, v2, v3, scale, form0, form1)
    if gains is not None:
        d0, d1, d2, d3 = d0 * gains[0], d1 * gains[1], d2 * gains[2], d3 * gains[3]
    if axes[WEIGHT] is not None:
        counts = w != 0.0
        value = tl.where(counts, w * (value + number(constant, dtype)), 0.0)
        d0, d1 = tl.where(counts, d0, 0.0), tl.where(counts, d1, 0.0)
        d2, d3 = tl.where(counts, d2, 0.0), tl.where(counts, d3, 0.0)
    store_output(
        g0, g0_0, g0_1, d0, tile, b, o, i, batch, outer, inner,
        partials, counters, partials_step, counters_step, axes[GRADS], slots[1], tile_b, tile_o, tile_i,
    )  # fmt: skip
    store_output(
        g1, g1_0, g1_1, d1, tile, b, o, i, batch, outer, inner,
        partials, counters, partials_step, counters_step, axes[GRADS + 1], slots[2], tile_b, tile_o, tile_i,
    )  # fmt: skip
    store_output(
        g2, g2_0, g2_1, d2, tile, b, o, i, batch, outer, inner,
        partials, counters, partials_step, counters_step, axes[GRADS + 2], slots[3], tile_b, tile_o, tile_i,
    )  # fmt: skip
    store_output(
        g3, g3_0, g3_1, d3, tile, b, o, i, batch, outer, inner,
        partials, counters, partials_step, counters_step, axes[GRADS + 3], slots[4], tile_b, tile_o, tile_i,
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
    weight, weight_0, weight_1, weight_value: tl.float64,
    incoming, incoming_0, incoming_1, incoming_value: tl.float64,
    factor: tl.float64, constant: tl.float64, normalizer,
    coefficient, coefficient_value: tl.float64, grad_scale, grad_scale_value: tl.float64,
    value, value_0, value_1,
    g0, g0_0, g0_1,
    g1, g1_0, g1_1,
    g2, g2_0, g2_1,
    g3, g3_0, g3_1,
    partials, counters, partials_step, counters_step, slots: tl.constexpr,
    formula: tl.constexpr, form0: tl.constexpr, form1: tl.constexpr, gains: tl.constexpr,
    axes: tl.constexpr, dtype: tl.constexpr, wide: tl.constexpr,
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
        weight, weight_0, weight_1, weight_value,
        incoming, incoming_0, incoming_1, incoming_value,
        gradient_factor(factor, normalizer, coefficient, coefficient_value, grad_scale, grad_scale_value), constant,
        g0, g0_0, g0_1,
        g1, g1_0, g1_1,
        g2, g2_0, g2_1,
        g3, g3_0, g3_1,
        partials, counters, partials_step, counters_step, slots,
        formula, form0, form1, gains, axes, dtype, wide, tile_b, tile_o, tile_i,
    )  # fmt: skip
    if axes[WEIGHT] is None:
        values += number(constant, dtype)
    store_output(
        value, value_0, value_1, values, tile, b, o, i, batch, outer, inner,
        partials, counters, partials_step, counters_step, axes[VALUE], slots[0], tile_b, tile_o, tile_i,
    )  # fmt: skip


@triton.jit
def term_values(
    formula: tl.constexpr, totals, tiles, batch, tile_b: tl.constexpr, given, given_0, factor, normalizer, constant,
    out, out_0, first, values, by_sample: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    """factor * normalizer * (sum + constant), ``lanes`` of them from the first on; written where that is wanted.

    The sums are those of the tiles in ``totals`` or, without a formula, of ``batch`` given values.
    """
    at = first + tl.arange(0, lanes)
    if formula is not None:
        step = tl.cdiv(batch, tile_b) * tile_b if by_sample else 1
        addends = tiles * (tile_b if by_sample else 1) // tl.maximum(step, 1)
        found = add_up(totals, first, step, addends, lanes, values - first)
    elif by_sample:
        found = tl.load(given + at * given_0, mask=at < values, other=0).to(tl.float64)
    else:
        found = add_up(given, 0, given_0, batch, lanes, 1)
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
    a_weight, a_weight_0, a_weight_1, a_weight_value: tl.float64,
    a_factor: tl.float64, a_constant: tl.float64, a_normalizer, a_coefficient, a_coefficient_value: tl.float64,
    a_g0, a_g0_0, a_g0_1,
    a_g1, a_g1_0, a_g1_1,
    a_g2, a_g2_0, a_g2_1,
    a_g3, a_g3_0, a_g3_1,
    a_partials, a_counters, a_partials_step, a_counters_step, a_slots: tl.constexpr, a_out, a_out_0,
    a_formula: tl.constexpr, a_form0: tl.constexpr, a_form1: tl.constexpr, a_gains: tl.constexpr,
    a_axes: tl.constexpr, a_dtype: tl.constexpr,
    a_tile_b: tl.constexpr, a_tile_o: tl.constexpr, a_tile_i: tl.constexpr,
    b_tiles, b_batch, b_outer, b_inner,
    b_in0, b_in0_0, b_in0_1,
    b_in1, b_in1_0, b_in1_1, b_in1_value: tl.float64,
    b_in2, b_in2_0, b_in2_1, b_in2_value: tl.float64,
    b_in3, b_in3_0, b_in3_1, b_in3_value: tl.float64,
    b_weight, b_weight_0, b_weight_1, b_weight_value: tl.float64,
    b_factor: tl.float64, b_constant: tl.float64, b_normalizer, b_coefficient, b_coefficient_value: tl.float64,
    b_g0, b_g0_0, b_g0_1,
    b_g1, b_g1_0, b_g1_1,
    b_g2, b_g2_0, b_g2_1,
    b_g3, b_g3_0, b_g3_1,
    b_partials, b_counters, b_partials_step, b_counters_step, b_slots: tl.constexpr, b_out, b_out_0,
    b_formula: tl.constexpr, b_form0: tl.constexpr, b_form1: tl.constexpr, b_gains: tl.constexpr,
    b_axes: tl.constexpr, b_dtype: tl.constexpr,
    b_tile_b: tl.constexpr, b_tile_o: tl.constexpr, b_tile_i: tl.constexpr,
    loss, loss_0, values, totals, counters, grad_scale, grad_scale_value: tl.float64,
    by_sample: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """loss = sum of coefficient * term over one or two terms, a and b; the gradients of the loss times grad_scale.

    There are ``values`` values: one, or one for each sample. A term without a formula is given: ``in0`` has ``batch``
    values. The first programs take the tiles of a, the others those of b; ``totals`` holds the sums of the tiles of
    both. The first of ``counters`` counts all programs; those of a term begin where its own parameter says. Without a
    weight, a term's constant is what is added to each sum, not to each element.
    """
    program = tl.program_id(0)
    axes: tl.constexpr = BATCH if by_sample else 0
    first_b = 0  # the first program that takes a tile of b
    a_totals = 0
    if a_formula is not None:
        first_b = a_tiles
        a_totals = a_tiles * (a_tile_b if by_sample else 1)
        if program < a_tiles:
            value, b, o, i = term_tile(
                program, a_batch, a_outer, a_inner,
                a_in0, a_in0_0, a_in0_1,
                a_in1, a_in1_0, a_in1_1, a_in1_value,
                a_in2, a_in2_0, a_in2_1, a_in2_value,
                a_in3, a_in3_0, a_in3_1, a_in3_value,
                a_weight, a_weight_0, a_weight_1, a_weight_value, None, 0, 0, 1.0,
                gradient_factor(
                    a_factor, a_normalizer, a_coefficient, a_coefficient_value, grad_scale, grad_scale_value
                ),
                a_constant,
                a_g0, a_g0_0, a_g0_1,
                a_g1, a_g1_0, a_g1_1,
                a_g2, a_g2_0, a_g2_1,
                a_g3, a_g3_0, a_g3_1,
                a_partials, counters + a_counters, a_partials_step, a_counters_step, a_slots,
                a_formula, a_form0, a_form1, a_gains, a_axes, a_dtype, wide,
                a_tile_b, a_tile_o, a_tile_i,
            )  # fmt: skip
            publish_sum(
                totals, value, program, b, o, i, a_batch, a_outer, a_inner, axes,
                a_tile_b, a_tile_o, a_tile_i,
            )  # fmt: skip
    if b_formula is not None:
        tile = program - first_b
        if (tile >= 0) & (tile < b_tiles):
            value, b, o, i = term_tile(
                tile, b_batch, b_outer, b_inner,
                b_in0, b_in0_0, b_in0_1,
                b_in1, b_in1_0, b_in1_1, b_in1_value,
                b_in2, b_in2_0, b_in2_1, b_in2_value,
                b_in3, b_in3_0, b_in3_1, b_in3_value,
                b_weight, b_weight_0, b_weight_1, b_weight_value, None, 0, 0, 1.0,
                gradient_factor(
                    b_factor, b_normalizer, b_coefficient, b_coefficient_value, grad_scale, grad_scale_value
                ),
                b_constant,
                b_g0, b_g0_0, b_g0_1,
                b_g1, b_g1_0, b_g1_1,
                b_g2, b_g2_0, b_g2_1,
                b_g3, b_g3_0, b_g3_1,
                b_partials, counters + b_counters, b_partials_step, b_counters_step, b_slots,
                b_formula, b_form0, b_form1, b_gains, b_axes, b_dtype, wide,
                b_tile_b, b_tile_o, b_tile_i,
            )  # fmt: skip
            publish_sum(
                totals + a_totals, value, tile, b, o, i, b_batch, b_outer, b_inner, axes,
                b_tile_b, b_tile_o, b_tile_i,
            )  # fmt: skip
    if is_last(counters, tl.num_programs(0)):
        lanes: tl.constexpr = 64 if by_sample else 1
        for first in range(0, values, lanes):
            total = tl.zeros((lanes,), tl.float64)
            # The coefficients are read here, not before: two values more over the whole of a tile's work would be two
            # registers too many.
            if a_formula is not None or a_in0 is not None:
                found = term_values(
                    a_formula, totals, a_tiles, a_batch, a_tile_b, a_in0, a_in0_0, a_factor, a_normalizer,
                    a_constant if a_axes[WEIGHT] is None else None, a_out, a_out_0, first, values, by_sample, lanes,
                )  # fmt: skip
                total += number_at(a_coefficient, a_coefficient_value) * found
            if b_formula is not None or b_in0 is not None:
                found = term_values(
                    b_formula, totals + a_totals, b_tiles, b_batch, b_tile_b, b_in0, b_in0_0, b_factor, b_normalizer,
                    b_constant if b_axes[WEIGHT] is None else None, b_out, b_out_0, first, values, by_sample, lanes,
                )  # fmt: skip
                total += number_at(b_coefficient, b_coefficient_value) * found
            at = first + tl.arange(0, lanes)
            tl.store(loss + at * loss_0, narrow(total, loss.dtype.element_ty), mask=at < values)


@triton.jit
def scale_block(data, count, first, factor, tile: tl.constexpr, wide: tl.constexpr):
    """Multiply a program's block of a dense tensor in place, if the tensor was given and has such a block.

    The program numbered ``first`` takes the first block.
    """
    if data is not None:
        block = tl.program_id(0) - first
        if wide:
            block = block.to(tl.int64)
        at = block * tile + tl.arange(0, tile)
        exists = (at >= 0) & (at < count)
        dtype: tl.constexpr = tl.float64 if data.dtype.element_ty == tl.float64 else tl.float32
        value = tl.load(data + at, mask=exists, other=0).to(dtype) * factor.to(dtype)
        tl.store(data + at, narrow(value, data.dtype.element_ty), mask=exists)


@triton.jit
def scale_kernel(
    factor,
    data_0, count_0, first_0,
    data_1, count_1, first_1,
    data_2, count_2, first_2,
    data_3, count_3, first_3,
    data_4, count_4, first_4,
    data_5, count_5, first_5,
    data_6, count_6, first_6,
    data_7, count_7, first_7,
    tile: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Multiply up to eight dense tensors by one factor, in place; touch nothing when it is 1.

    The programs from ``first_k`` on take tensor k.
    """
    by = tl.load(factor)
    if by != 1.0:
        scale_block(data_0, count_0, first_0, by, tile, wide)
        scale_block(data_1, count_1, first_1, by, tile, wide)
        scale_block(data_2, count_2, first_2, by, tile, wide)
        scale_block(data_3, count_3, first_3, by, tile, wide)
        scale_block(data_4, count_4, first_4, by, tile, wide)
        scale_block(data_5, count_5, first_5, by, tile, wide)
        scale_block(data_6, count_6, first_6, by, tile, wide)
        scale_block(data_7, count_7, first_7, by, tile, wide)
