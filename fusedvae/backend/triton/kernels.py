"""The Triton kernels: one launch a stage over operands in canonical form.

An operand that was not given is None, its axes ABSENT, and everything about it disappears when the kernel is compiled;
a number comes as ``..._value`` instead of an address. What is a constexpr selects code, and no number that a caller
might change between calls is among these: that would compile a kernel a call.

The inputs of a formula are in0 to in3, the gradients by them g0 to g3; ``form0`` and ``form1`` are the forms of its
scales; ``bounds`` tells which inputs are bounded, two bits each, and ``low0``, ``high0`` and ``eps0`` are the numbers
of the first scale. ``axes`` are those of a term's operands or of the latent's, ``walk`` says how tiles lie: see
`codes`. A value or gradient is summed over the dimensions that are not among its axes: see `sums`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import codes
from .access import ABSENT, ALL, BATCH, WIDE, load, load_or_number, narrow, number, number_at, positions, store
from .formulas import element_at_sample, formula_element
from .noise import noise_tile
from .scales import MAP, ROUGH, SQUARED, deviation_of, through, through_bounds, within_bounds
from .sums import VALUE, add_up, is_last, membership, publish, store_output, sum_tile

# Positions among axes, as VALUE.
INCOMING = tl.constexpr(16 ** codes.TERM_AXES.index("incoming"))
GRADS = tl.constexpr(16 ** codes.TERM_AXES.index("g0"))  # the first of four
WEIGHT = tl.constexpr(16 ** codes.TERM_AXES.index("weight"))
NOISE = tl.constexpr(16 ** codes.LATENT_AXES.index("noise"))
GRAD_Z = tl.constexpr(16 ** codes.LATENT_AXES.index("grad_z"))


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
