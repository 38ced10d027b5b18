"""What the kernels are told of an operation: sizes and strides, axes, forms, and which sums are shared.

The arguments are named as the kernels name them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isqrt, prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fusedvae.backend import LatentWork, Part, TermWork
from fusedvae.backend.reference import GIVEN
from fusedvae.backend.walk import Copy, Extent, Walk, walk_term
from fusedvae.layout import Strides

from . import codes, tiling
from .launch import VERSION, is_interpreted
from .tiling import USUAL, Cost, Tiles, most_in_tile, options_for, tile_for, tiles_of

# --- where operands lie -----------------------------------------------------------------------------------------------


def stride_arguments(names: Sequence[str], strides: Sequence[Strides]) -> dict[str, int]:
    """The strides of operands."""
    arguments: dict[str, int] = {}
    for name, steps in zip(names, strides, strict=True):
        if steps:
            arguments[f"{name}_0"], arguments[f"{name}_1"] = steps[:2]
    return arguments


def axes_of(names: Sequence[str], walked: Walk) -> dict[str, int]:
    """The dimensions that operands vary along, or that have size 1; of a number, none."""
    return {
        name: sum(1 << d for d in range(3) if steps[d] != 0 or walked.extent[d] == 1) if steps else 0
        for name, part, steps in zip(names, walked.parts, walked.strides, strict=True)
        if part is not None
    }


def nibbles(fields: Sequence[int | None]) -> int:
    """Four bits each, as kernels take axes and slots."""
    return sum((codes.ABSENT if field is None else field) << 4 * k for k, field in enumerate(fields))


def stride_of(part: Part | None) -> int:
    """That of a vector of values per sample, or of one value."""
    return part.strides[0] if part is not None and part.strides else 0


def extent_arguments(extent: Extent, tiles: Tiles, in_double: bool) -> dict[str, Any]:
    """What is walked, in what tiles, and in what arithmetic."""
    if in_double and (3, 0) < VERSION < (3, 4):
        raise RuntimeError(
            f"float64 operands: the Triton kernels need Triton 3.4 or later for them, this is {triton.__version__}; "
            "use another backend"
        )
    arguments: dict[str, Any] = dict(zip(("batch", "outer", "inner"), extent, strict=True))
    arguments.update(zip(("tile_b", "tile_o", "tile_i"), tiles.shape, strict=True))
    arguments["dtype"] = tl.float64 if in_double else tl.float32
    return arguments


def walk_flags(extent: Extent, tiles: Tiles, walked: Sequence[Strides]) -> int:
    """How tiles lie, as the kernels are told."""
    found = codes.WIDE if _is_wide(extent, walked) else 0
    if extent[:2] == (1, 1):
        found |= codes.FLAT
    if all(size % tile == 0 for size, tile in zip(extent, tiles.shape, strict=True)):
        found |= codes.WHOLE
    return found


_NARROW = (1 << 31) - (1 << 16)
"""Offsets from which on the kernels count in 64 bits; the difference is room for the last tile."""


def _is_wide(extent: Extent, walked: Sequence[Strides]) -> bool:
    """Whether an offset or an index might not fit 32 bits."""
    rows = (extent[1] * extent[2], extent[2], 1)
    return any(
        sum(max(size - 1, 0) * step for size, step in zip(extent, strides, strict=True)) >= _NARROW
        for strides in (*walked, rows)
        if strides
    )


def flat_arguments(count: int) -> dict[str, Any]:
    """Arguments for kernels that go through dense tensors of ``count`` elements."""
    tile = tile_for(count)
    return {"tile": tile, "walk": walk_flags((1, 1, count), Tiles((1, 1, tile), (1, 1, 1)), ()), **options_for(tile)}


# --- the sums that tiles share ----------------------------------------------------------------------------------------

_MANY = 4096
"""Partial sums that one program may be left to add up: more are first added up in parts, by as many programs."""


def split_of(members: int, lanes: int) -> int | None:
    """How many of ``members`` sums of ``lanes`` values make a part, and so about how many parts there are."""
    if members * lanes <= _MANY or members < 4:
        return None
    return 1 << (isqrt(members - 1).bit_length())


def with_parts(members: int, split: int | None) -> tuple[int, int]:
    """How many sums there is room for in a group of so many members, its parts included; and how many counters."""
    parts = -(-members // split) if split else 0
    return members + parts, 1 + parts


class SharedSums(NamedTuple):
    """The sums that tiles share, of some outputs."""

    slots: tuple[int | None, ...]
    """Of each of `codes.SUMMED`."""
    partials: int
    """How many partial sums a slot has room for."""
    counters: int
    """How many it takes."""
    split: int | None
    """How many are added up at first; None for all."""

    @property
    def total(self) -> int:
        """How many slots there are."""
        return sum(slot is not None for slot in self.slots)

    @property
    def fixed(self) -> dict[str, Any]:
        return {
            "slots": nibbles(self.slots),
            "partials_step": self.partials,
            "counters_step": self.counters,
            "split": self.split,
        }


def shared_sums(axes: dict[str, int], tiles: Tiles) -> SharedSums:
    """Those of the outputs among operands with these axes."""
    slots: list[int | None] = []
    shared: list[tuple[int, int]] = []  # the members of a group, and the lanes of each
    for name in codes.SUMMED:
        members = prod([count for d, count in enumerate(tiles.counts) if not axes.get(name, codes.ALL) >> d & 1])
        slots.append(len(shared) if members > 1 else None)
        if members > 1:
            shared.append((members, prod([size for d, size in enumerate(tiles.shape) if axes[name] >> d & 1])))
    split = max([split_of(members, lanes) or 0 for members, lanes in shared], default=0) or None
    partials = counters = 0
    for members, lanes in shared:
        groups, (sums, counts) = tiles.total // members, with_parts(members, split)
        partials, counters = max(partials, groups * sums * lanes), max(counters, groups * counts)
    return SharedSums(tuple(slots), partials, counters, split)


def room_for(prefix: str, sums: SharedSums, in_double: bool) -> dict[str, tuple[int, torch.dtype]]:
    """What shared sums take, in the dtype of the arithmetic."""
    count = sums.total * sums.partials
    return {f"{prefix}partials": (count, torch.float64 if in_double else torch.float32)} if count else {}


# --- a term -----------------------------------------------------------------------------------------------------------

_MAPS = {
    "exponential": codes.EXPONENTIAL,
    "linear": codes.LINEAR,
    "softplus": codes.SOFTPLUS,
    "bounded": codes.BOUNDED,
}

_NO_FORMS: dict[str, Any] = {
    "bounds": 0,
    **{f"form{k}": 0 for k in range(2)},
    **{f"{name}{k}": 0.0 for k in range(2) for name in ("low", "high", "eps")},
}


def form_arguments(term: TermWork, *, is_rough: bool = False) -> dict[str, Any]:
    """The forms of a term's scales."""
    arguments = dict(_NO_FORMS)
    for k, (scale, form) in enumerate(zip(term.formula.scales, term.forms, strict=True)):
        is_plain = form.map == "exponential" and form.eps == 0
        arguments[f"form{k}"] = (codes.LOG if is_plain else _MAPS[form.map]) | (codes.SQUARED if form.squared else 0)
        arguments[f"eps{k}"] = float(form.eps)
        for name, flag, bound in (("low", codes.BELOW, form.low), ("high", codes.ABOVE, form.high)):
            if bound not in (-inf, inf):
                arguments["bounds"] |= flag << 2 * scale
                arguments[f"{name}{k}"] = float(bound)
    if is_rough:
        arguments["form0"] |= codes.ROUGH
    return arguments


def gain_arguments(term: TermWork) -> dict[str, Any]:
    """What the gradients are multiplied by."""
    if term.gains is None or set(term.gains) == {1.0}:
        return {}
    return {"has_gains": True, **{f"gain{k}": float(gain) for k, gain in enumerate(term.gains)}}


class TermArguments(NamedTuple):
    """A term as the kernels take it."""

    fixed: dict[str, Any]
    parts: dict[str, Part | None]
    factors: dict[str, Part]
    copies: list[Copy]
    extent: Extent
    tiles: Tiles
    sums: SharedSums


def absent_term() -> TermArguments:
    """No term; its numbers are there all the same, since a kernel's numbers have a type."""
    nothing: tuple[None, ...] = (None,) * len(codes.TERM_AXES)
    fixed: dict[str, Any] = {"factor": 0.0, "constant": 0.0, "coefficient_value": 1.0, "axes": nibbles(nothing)}
    fixed.update({f"{name}_value": 0.0 for name in (*codes.INPUTS[1:], "weight")})
    fixed.update(_NO_FORMS)
    fixed.update(has_gains=False, walk=0, **{f"gain{k}": 1.0 for k in range(codes.MOST_INPUTS)})
    return TermArguments(fixed, {}, {}, [], (0, 0, 0), Tiles((1, 1, 1), (0, 0, 0)), SharedSums((), 0, 0, None))


def term_arguments(term: TermWork, sources: int, cost: Cost, *, keep_batch: bool) -> TermArguments:
    """A term that is walked, or whose values are given; in a kernel of some cost."""
    found = absent_term()
    found.fixed.update(factor=term.factor)
    found.parts.update(coefficient=term.coefficient)
    if term.normalizer is not None and term.normalizer.is_number:
        found.factors.update(factor=term.normalizer)
    else:
        found.parts.update(normalizer=term.normalizer)
    if term.formula is GIVEN:
        (values,) = term.inputs
        assert values.shape is not None
        found.fixed.update(batch=values.shape.numel(), in0_0=stride_of(values))
        found.parts.update(in0=values)
        return found
    walked = walk_term(term, sources, keep_batch=keep_batch, can_sum=lambda extent, strides: True)
    extent, inputs = walked.extent, len(term.inputs)
    names = (*codes.INPUTS[:inputs], "weight", "incoming", "value", *codes.GRADS[:inputs])
    axes = axes_of(names, walked)
    tiles = tiles_of(extent, axes, most_in_tile(term, cost))
    sums = shared_sums(axes, tiles)
    found.fixed.update(
        {
            **extent_arguments(extent, tiles, term.in_double),
            **stride_arguments(names, walked.strides),
            **form_arguments(term),
            **gain_arguments(term),
            **sums.fixed,
            "formula": term.formula.name,
            "axes": nibbles([axes.get(name) for name in codes.TERM_AXES]),
            "walk": walk_flags(extent, tiles, walked.strides),
        }
    )
    parts = {**found.parts, **dict(zip(names, walked.parts, strict=True))}
    return found._replace(parts=parts, copies=walked.copies, extent=extent, tiles=tiles, sums=sums)


# --- the noise --------------------------------------------------------------------------------------------------------


def quads_for(dtype: torch.dtype | None, row: int = 8, cost: Cost = USUAL) -> int:
    """How many counters make four neighbours each for a thread that takes rows of a dtype and cost.

    They are as many as it moves at once, 128 bits: others it would have to get from other threads.
    """
    assert dtype is not None
    return 2 if dtype.itemsize == 2 and min(row, cost.a_thread) >= 8 else 1


def may_be_rough(work: LatentWork) -> bool:
    """Whether the sample may be made with NVIDIA's own functions, which are exact to some 20 bits.

    It may where it is rounded to the 8 of bfloat16. With float16's 11 one would see it in what is near zero.
    """
    if tiling.LANES == 64 or is_interpreted() or work.divergence.in_double:
        return False
    return all(part.is_number or part.dtype == torch.bfloat16 for part in work.divergence.inputs[:2])
