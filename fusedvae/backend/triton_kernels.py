"""The Triton kernels: one launch a stage over operands in canonical form, the formulas those of `triton_math`.

A program takes a tile of (tile_b, tile_o, tile_i) elements of the extent (batch, outer, inner). An operand comes as its
address, its strides over batch and outer, and ``axes``: the dimensions it varies along, one bit each (BATCH, OUTER,
INNER); it is read as a block of size 1 along the others. An operand that was not given is None, and everything about
it disappears when the kernel is compiled.

Sums are the same on every run. A tile's is a tree, in the dtype of the arithmetic; the tiles' sums go to a workspace,
each to a place of its own, and the program that finishes last adds them in order, in float64. The counter that tells
which one that is is zero again afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_math import (
    box_muller,
    exponential,
    gaussian_nll,
    kl_standard_normal,
    philox4x32,
    sample,
    spread_of,
    unit_interval,
)

BATCH = tl.constexpr(1)
OUTER = tl.constexpr(2)
INNER = tl.constexpr(4)
ALL = tl.constexpr(7)

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
def place(s0, s1, b, o, i, batch, outer, inner, axes: tl.constexpr):
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
    offsets, exists = place(s0, s1, b, o, i, batch, outer, inner, axes)
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
def narrow(value, dtype: tl.constexpr):
    """To an operand's dtype; no chip rounds float64 to 16 bits in one go."""
    if dtype.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(dtype)


@triton.jit
def store(data, s0, s1, value, b, o, i, batch, outer, inner, axes: tl.constexpr):
    """Write an operand's elements of a tile, where the operand was given."""
    if data is not None:
        offsets, exists = place(s0, s1, b, o, i, batch, outer, inner, axes)
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
    """Tiles at one place along ``axes`` are a group, whose sums are added up.

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
def publish(partials, place, value, lanes: tl.constexpr):
    """Write partial sums for another program to read."""
    if lanes == 1:
        tl.store(partials + place, value)  # by the thread that comes to the counter, in order
    else:
        # AMD's barrier does not wait for the stores of other wavefronts; an exchange that acquires is waited for.
        bits: tl.constexpr = tl.int64 if value.dtype == tl.float64 else tl.int32
        where = (partials + place).to(tl.pointer_type(bits), bitcast=True)
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
def noise_tile(
    seed, l0, l1, l2, b, o, i, tile, inner, in_quads: tl.constexpr, tile_i: tl.constexpr, wide: tl.constexpr
):  # fmt: skip
    """The noise of a tile, in float32; l0, l1, l2 are the strides of the logical index.

    ``in_quads``: inner is logically contiguous, and its rows begin at multiples of 4. Then a counter makes four
    neighbours; otherwise every element makes its own and picks its lane.
    """
    if in_quads:
        first = (tile % tl.cdiv(inner, tile_i)) * (tile_i // 4)
        if wide:
            first = first.to(tl.int64)
        quad = (b * l0 + o * l1) // 4 + (first + tl.arange(0, tile_i // 4)[None, None, :])
        w0, w1, w2, w3 = words_of(quad, seed, wide)
        n0, n1 = box_muller(unit_interval(w0), unit_interval(w1))
        n2, n3 = box_muller(unit_interval(w2), unit_interval(w3))
        return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
    index = b * l0 + o * l1 + i * l2
    w0, w1, w2, w3 = words_of(index >> 2, seed, wide)
    second_pair = (index & 2) != 0
    n0, n1 = box_muller(unit_interval(tl.where(second_pair, w2, w0)), unit_interval(tl.where(second_pair, w3, w1)))
    return tl.where((index & 1) != 0, n1, n0)


# --- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def normal_kernel(
    out, seed, count, tile: tl.constexpr, wide: tl.constexpr
):  # fmt: skip
    """The noise stream of ``seed`` in a contiguous tensor."""
    program = tl.program_id(0)
    b, o, i = positions(program, 1, count, 1, 1, tile, wide)
    noise = noise_tile(tl.load(seed), 0, 0, 1, b, o, i, program, count, True, tile, wide)
    store(out, 0, 0, noise, b, o, i, 1, 1, count, ALL)


@triton.jit
def latent_kernel(
    batch, outer, inner, l0, l1, l2, seed,
    mu, mu_0, mu_1, mu_axes: tl.constexpr,
    logvar, logvar_0, logvar_1, logvar_axes: tl.constexpr,
    noise, noise_0, noise_1, noise_axes: tl.constexpr,
    grad_z, grad_z_0, grad_z_1, grad_z_axes: tl.constexpr,
    grad_kl, grad_kl_0,
    z, z_0, z_1,
    grad_mu, grad_mu_0, grad_mu_1,
    grad_logvar, grad_logvar_0, grad_logvar_1,
    kl, kl_0, partials, counters,
    in_quads: tl.constexpr, dtype: tl.constexpr, wide: tl.constexpr,
    tile_b: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr,
):  # fmt: skip
    """z, the per-sample kl, and the gradients of sum(grad_z * z) + sum(grad_kl * kl); each where it was given."""
    tile = tl.program_id(0)
    b, o, i = positions(tile, outer, inner, tile_b, tile_o, tile_i, wide)
    m = load(mu, mu_0, mu_1, b, o, i, batch, outer, inner, mu_axes, dtype)
    l = load(logvar, logvar_0, logvar_1, b, o, i, batch, outer, inner, logvar_axes, dtype)  # noqa: E741
    sigma, expm1_logvar = spread_of(l)
    value, kl_d_mu, kl_d_logvar = kl_standard_normal(m, l, expm1_logvar)
    d_mu, d_logvar = tl.zeros_like(m), tl.zeros_like(l)
    if z is not None or grad_z is not None:
        if seed is not None:
            eps = noise_tile(tl.load(seed), l0, l1, l2, b, o, i, tile, inner, in_quads, tile_i, wide).to(dtype)
        else:
            eps = load(noise, noise_0, noise_1, b, o, i, batch, outer, inner, noise_axes, dtype)
        sampled, z_d_logvar = sample(m, sigma, eps)
        store(z, z_0, z_1, sampled, b, o, i, batch, outer, inner, ALL)
        if grad_z is not None:
            g = load(grad_z, grad_z_0, grad_z_1, b, o, i, batch, outer, inner, grad_z_axes, dtype)
            d_mu, d_logvar = g, g * z_d_logvar
    if grad_kl is not None:
        g = load(grad_kl, grad_kl_0, 0, b, o, i, batch, outer, inner, BATCH, dtype)
        if grad_z is not None:
            d_mu, d_logvar = d_mu + g * kl_d_mu, d_logvar + g * kl_d_logvar
        else:
            d_mu, d_logvar = g * kl_d_mu, g * kl_d_logvar
    store(grad_mu, grad_mu_0, grad_mu_1, d_mu, b, o, i, batch, outer, inner, ALL)
    store(grad_logvar, grad_logvar_0, grad_logvar_1, d_logvar, b, o, i, batch, outer, inner, ALL)
    if kl is not None:
        store_sum(
            kl, kl_0, 0, value, tile, b, o, i, batch, outer, inner, partials, counters, BATCH, tile_b, tile_o, tile_i
        )


@triton.jit
def nll_tile(
    tile, batch, outer, inner,
    recon_x, recon_x_0, recon_x_1, recon_x_axes: tl.constexpr,
    x, x_0, x_1, x_axes: tl.constexpr,
    spread, spread_0, spread_1, spread_axes: tl.constexpr, spread_value,
    weight, weight_0, weight_1, weight_axes: tl.constexpr, scale,
    grad_recon_x, grad_recon_x_0, grad_recon_x_1,
    grad_x, grad_x_0, grad_x_1,
    grad_spread, grad_spread_0, grad_spread_1, grad_spread_axes: tl.constexpr, partials, counters,
    eps, is_variance: tl.constexpr, dtype: tl.constexpr, wide: tl.constexpr,
    tile_b: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr,
):  # fmt: skip
    """The likelihood of a tile: writes its weighted gradients where they were given; returns values and positions."""
    b, o, i = positions(tile, outer, inner, tile_b, tile_o, tile_i, wide)
    m = load(recon_x, recon_x_0, recon_x_1, b, o, i, batch, outer, inner, recon_x_axes, dtype)
    target = load(x, x_0, x_1, b, o, i, batch, outer, inner, x_axes, dtype)
    if spread is not None:
        s = load(spread, spread_0, spread_1, b, o, i, batch, outer, inner, spread_axes, dtype)
    else:
        s = number(spread_value, dtype)
    if is_variance:
        bound = number(eps, dtype)
        variance = tl.where(s < bound, bound, s)
        logvar, precision = tl.log(variance), 1.0 / variance
    else:
        logvar, precision = s, exponential(-s)
    value, d_recon, d_logvar = gaussian_nll(m, target, logvar, precision)
    if weight is not None:
        w = load(weight, weight_0, weight_1, b, o, i, batch, outer, inner, weight_axes, dtype)
    else:
        w = number(scale, dtype)
    store(grad_recon_x, grad_recon_x_0, grad_recon_x_1, w * d_recon, b, o, i, batch, outer, inner, ALL)
    store(grad_x, grad_x_0, grad_x_1, -(w * d_recon), b, o, i, batch, outer, inner, ALL)
    if grad_spread is not None:
        d_spread = d_logvar
        if is_variance:
            d_spread = d_logvar * precision
        if grad_spread_axes == ALL:
            store(grad_spread, grad_spread_0, grad_spread_1, w * d_spread, b, o, i, batch, outer, inner, ALL)
        else:
            store_sum(
                grad_spread, grad_spread_0, grad_spread_1, w * d_spread, tile, b, o, i, batch, outer, inner,
                partials, counters, grad_spread_axes, tile_b, tile_o, tile_i,
            )  # fmt: skip
    return value, b, o, i


@triton.jit
def nll_kernel(
    batch, outer, inner,
    recon_x, recon_x_0, recon_x_1, recon_x_axes: tl.constexpr,
    x, x_0, x_1, x_axes: tl.constexpr,
    spread, spread_0, spread_1, spread_axes: tl.constexpr, spread_value: tl.float64,
    weight, weight_0, weight_1, weight_axes: tl.constexpr,
    loss, loss_0, loss_1, constant: tl.float64,
    grad_recon_x, grad_recon_x_0, grad_recon_x_1,
    grad_x, grad_x_0, grad_x_1,
    grad_spread, grad_spread_0, grad_spread_1, grad_spread_axes: tl.constexpr, partials, counters,
    eps: tl.float64, is_variance: tl.constexpr, dtype: tl.constexpr, wide: tl.constexpr,
    tile_b: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr,
):  # fmt: skip
    """The likelihood element by element: its values, and the gradients of sum(weight * nll)."""
    values, b, o, i = nll_tile(
        tl.program_id(0), batch, outer, inner,
        recon_x, recon_x_0, recon_x_1, recon_x_axes,
        x, x_0, x_1, x_axes,
        spread, spread_0, spread_1, spread_axes, spread_value,
        weight, weight_0, weight_1, weight_axes, 1.0,
        grad_recon_x, grad_recon_x_0, grad_recon_x_1,
        grad_x, grad_x_0, grad_x_1,
        grad_spread, grad_spread_0, grad_spread_1, grad_spread_axes, partials, counters,
        eps, is_variance, dtype, wide, tile_b, tile_o, tile_i,
    )  # fmt: skip
    values += number(constant, dtype)
    store(loss, loss_0, loss_1, values, b, o, i, batch, outer, inner, ALL)


@triton.jit
def keep_sum(
    totals, value, tile, b, o, i, batch, outer, inner, axes: tl.constexpr,
    tile_b: tl.constexpr, tile_o: tl.constexpr, tile_i: tl.constexpr,
):  # fmt: skip
    """A tile's part of an objective, in its place: the first member of each group, then the second, and so on."""
    sums = sum_tile(value, b, o, i, batch, outer, inner, axes, tile_b, tile_o, tile_i)
    group, groups, member, _ = membership(tile, batch, outer, inner, axes, tile_b, tile_o, tile_i)
    lanes: tl.constexpr = sums.numel
    place = (member * groups + group) * lanes + tl.arange(0, lanes)
    publish(totals, place, tl.reshape(sums, (lanes,)).to(tl.float64), lanes)


@triton.jit
def elbo_kernel(
    nll_tiles, nll_batch, nll_outer, nll_inner,
    recon_x, recon_x_0, recon_x_1, recon_x_axes: tl.constexpr,
    x, x_0, x_1, x_axes: tl.constexpr,
    spread, spread_0, spread_1, spread_axes: tl.constexpr, spread_value: tl.float64,
    grad_recon_x, grad_recon_x_0, grad_recon_x_1,
    grad_x, grad_x_0, grad_x_1,
    grad_spread, grad_spread_0, grad_spread_1, grad_spread_axes: tl.constexpr, partials, counters,
    eps: tl.float64, is_variance: tl.constexpr, nll_dtype: tl.constexpr,
    kl_tiles, kl_batch, kl_outer, kl_inner,
    mu, mu_0, mu_1, mu_axes: tl.constexpr,
    logvar, logvar_0, logvar_1, logvar_axes: tl.constexpr,
    grad_mu, grad_mu_0, grad_mu_1,
    grad_logvar, grad_logvar_0, grad_logvar_1,
    kl_dtype: tl.constexpr,
    kl_in, kl_in_0, kl_in_count,
    beta, beta_value: tl.float64, scale: tl.float64, constant: tl.float64,
    loss, nll, kl, values, totals,
    by_sample: tl.constexpr, wide: tl.constexpr,
    nll_tile_b: tl.constexpr, nll_tile_o: tl.constexpr, nll_tile_i: tl.constexpr,
    kl_tile_b: tl.constexpr, kl_tile_o: tl.constexpr, kl_tile_i: tl.constexpr,
):  # fmt: skip
    """loss = nll + beta * kl: ``values`` values, scale times a total or each of a sample, and the gradients of loss.

    The first ``nll_tiles`` programs take the likelihood, the others the divergence; ``constant`` is added to each sum
    of the likelihood. ``totals`` holds the sums of the tiles of both. The first of ``counters`` counts all programs.
    """
    program = tl.program_id(0)
    axes: tl.constexpr = BATCH if by_sample else 0
    nll_places = 0
    if recon_x is not None:
        nll_places = nll_tiles * (nll_tile_b if by_sample else 1)
        if program < nll_tiles:
            value, b, o, i = nll_tile(
                program, nll_batch, nll_outer, nll_inner,
                recon_x, recon_x_0, recon_x_1, recon_x_axes,
                x, x_0, x_1, x_axes,
                spread, spread_0, spread_1, spread_axes, spread_value,
                None, 0, 0, 0, scale,
                grad_recon_x, grad_recon_x_0, grad_recon_x_1,
                grad_x, grad_x_0, grad_x_1,
                grad_spread, grad_spread_0, grad_spread_1, grad_spread_axes, partials, counters + 1,
                eps, is_variance, nll_dtype, wide, nll_tile_b, nll_tile_o, nll_tile_i,
            )  # fmt: skip
            keep_sum(
                totals, value, program, b, o, i, nll_batch, nll_outer, nll_inner, axes,
                nll_tile_b, nll_tile_o, nll_tile_i,
            )  # fmt: skip
    if mu is not None:
        tile = program - nll_tiles
        if (tile >= 0) & (tile < kl_tiles):
            b, o, i = positions(tile, kl_outer, kl_inner, kl_tile_b, kl_tile_o, kl_tile_i, wide)
            m = load(mu, mu_0, mu_1, b, o, i, kl_batch, kl_outer, kl_inner, mu_axes, kl_dtype)
            l = load(logvar, logvar_0, logvar_1, b, o, i, kl_batch, kl_outer, kl_inner, logvar_axes, kl_dtype)  # noqa: E741
            _, expm1_logvar = spread_of(l)
            value, d_mu, d_logvar = kl_standard_normal(m, l, expm1_logvar)
            w = (number(scale, tl.float64) * number_at(beta, beta_value)).to(kl_dtype)
            store(grad_mu, grad_mu_0, grad_mu_1, w * d_mu, b, o, i, kl_batch, kl_outer, kl_inner, ALL)
            store(grad_logvar, grad_logvar_0, grad_logvar_1, w * d_logvar, b, o, i, kl_batch, kl_outer, kl_inner, ALL)
            keep_sum(
                totals + nll_places, value, tile, b, o, i, kl_batch, kl_outer, kl_inner, axes,
                kl_tile_b, kl_tile_o, kl_tile_i,
            )  # fmt: skip
    if is_last(counters, tl.num_programs(0)):
        lanes: tl.constexpr = 64 if by_sample else 1
        # Read here, not before: two values kept over the whole of a tile's work would be two registers too many.
        factor, kl_weight = number(scale, tl.float64), number_at(beta, beta_value)
        for first in range(0, values, lanes):
            at = first + tl.arange(0, lanes)
            nll_sum, kl_sum = tl.zeros((lanes,), tl.float64), tl.zeros((lanes,), tl.float64)
            if recon_x is not None:
                step = tl.cdiv(nll_batch, nll_tile_b) * nll_tile_b if by_sample else 1
                nll_sum = add_up(totals, first, step, nll_places // tl.maximum(step, 1), lanes, values - first)
                nll_sum = factor * (nll_sum + number(constant, tl.float64))
            if mu is not None:
                step = tl.cdiv(kl_batch, kl_tile_b) * kl_tile_b if by_sample else 1
                places = kl_tiles * (kl_tile_b if by_sample else 1)
                kl_sum = add_up(totals + nll_places, first, step, places // tl.maximum(step, 1), lanes, values - first)
                kl_sum = factor * kl_sum
            elif kl_in is not None:
                if by_sample:
                    kl_sum = tl.load(kl_in + at * kl_in_0, mask=at < values, other=0).to(tl.float64)
                else:
                    kl_sum = factor * add_up(kl_in, 0, kl_in_0, kl_in_count, lanes, 1)
            total = nll_sum
            if mu is not None or kl_in is not None:
                total = nll_sum + kl_weight * kl_sum
            tl.store(loss + at, narrow(total, loss.dtype.element_ty), mask=at < values)
            if nll is not None:
                tl.store(nll + at, narrow(nll_sum, nll.dtype.element_ty), mask=at < values)
            if kl is not None:
                tl.store(kl + at, narrow(kl_sum, kl.dtype.element_ty), mask=at < values)


@triton.jit
def scale_run(data, count, block, factor, tile: tl.constexpr, wide: tl.constexpr):
    """Multiply one block of a dense tensor in place, if the tensor was given and has such a block."""
    if data is not None:
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
    tile: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Multiply up to five dense tensors by one factor, in place; touch nothing when it is 1.

    The programs from ``first_k`` on take tensor k.
    """
    by = tl.load(factor)
    if by != 1.0:
        program = tl.program_id(0)
        scale_run(data_0, count_0, program - first_0, by, tile, wide)
        scale_run(data_1, count_1, program - first_1, by, tile, wide)
        scale_run(data_2, count_2, program - first_2, by, tile, wide)
        scale_run(data_3, count_3, program - first_3, by, tile, wide)
        scale_run(data_4, count_4, program - first_4, by, tile, wide)
