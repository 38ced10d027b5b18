"""The tiles that programs take, and how the kernels are compiled for them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch

from fusedvae.backend import TermWork
from fusedvae.backend.reference import Form
from fusedvae.backend.walk import Extent

from . import codes

LANES = 64 if torch.version.hip else 32
"""Threads of a warp: those of a wavefront on AMD's CDNA chips, so that a thread takes as much there."""


class Cost(NamedTuple):
    """What an element costs in registers, and what is made of that."""

    tile: int
    """Elements of a tile. Sums are made a tile at a time: this is part of a result's rounding, and the same on all
    chips."""
    a_thread: int
    """Elements that a thread takes at least: 8 are 128 bits of a 16-bit dtype and twice that of float32. More would
    take registers that the threads to hide memory's latency behind need."""
    registers: int
    """Of a thread, at most. Without a bound, NVIDIA's assembler spills to fit in one more program at a time."""

    @property
    def is_light(self) -> bool:
        return self.registers < USUAL.registers


# Light ones are to fit in four times or three; those that cost most get all registers that a processor has.
_COSTS = (
    Cost(tile=4096, a_thread=8, registers=64),
    Cost(tile=4096, a_thread=8, registers=80),
    Cost(tile=2048, a_thread=8, registers=128),
    Cost(tile=2048, a_thread=4, registers=128),
    Cost(tile=1024, a_thread=4, registers=255),
    Cost(tile=512, a_thread=2, registers=255),
)
_USUAL = 2
USUAL = _COSTS[_USUAL]
"""Of what is neither light nor heavy."""

_LIGHT = {"given": 0, "gaussian_nll": 0, "kl_standard_normal": 0, "l1": 0, "laplace_nll": 1, "mse": 0}
"""What formulas cost that have few values to keep: their place among the costs."""
HEAVY = {"discretized_logistic_nll": 1, "negative_binomial_nll": 2, "zero_inflated_negative_binomial_nll": 2}
"""How many places more those cost that have many."""


def cost_of(terms: Sequence[TermWork], *, is_light: bool = True) -> Cost:
    """What an element of the dearest term costs; unless the kernel ``is_light`` otherwise, the usual at least."""
    return _COSTS[max(0 if is_light else _USUAL, *map(_cost, terms))]


def _cost(term: TermWork) -> int:
    """Its formula costs, and float64 does, and two scales that are not logarithms do."""
    forms = sum(form != Form() for form in term.forms)
    if term.formula.name in _LIGHT and not (forms or term.in_double or term.weight is not None):
        return _LIGHT[term.formula.name]
    return min(_USUAL + term.in_double + (forms == 2) + HEAVY.get(term.formula.name, 0), len(_COSTS) - 1)


# --- what a program takes ---------------------------------------------------------------------------------------------

_SMALL = 1 << 18
"""Elements below which tiles are small: a GPU has over a hundred processors, each of which should get one."""

_SMALL_TILE = 512

_LIGHT_BYTES = 8192
"""Of each operand in a tile of what is light, at most: 32 a thread. At half a GPU's occupancy 96 KiB a processor are on
their way for the three operands of the likelihood, where some 40 KiB keep its memory busy; and how long a program waits
in its end, to know whether it is the last, counts for little. Smaller ones would make more partial sums, too."""

_COLUMN = 128
"""Elements of a row in a tile that is summed over its columns: 512 bytes in float32, whole sectors; the fewer there
are, the more rows are summed in a program, and the less goes through the workspace."""


class Tiles(NamedTuple):
    """The tiles of an extent."""

    shape: Extent
    counts: Extent

    @property
    def total(self) -> int:
        return prod(self.counts)

    @property
    def elements(self) -> int:
        """Elements of a tile."""
        return prod(self.shape)


def most_in_tile(term: TermWork, cost: Cost) -> int:
    """How many elements of a term a tile has at most, in a kernel of that cost."""
    if not cost.is_light:
        return cost.tile
    widest = max((part.dtype.itemsize for part in term.inputs if part.dtype is not None), default=2)
    return min(_LIGHT_BYTES // widest, cost.tile)


def tiles_of(extent: Extent, axes: dict[str, int], most: int) -> Tiles:
    """Tiles of ``most`` elements, as long along inner as they can be; of columns, where some output is summed over
    other axes alone.

    ``axes`` has those of the operands, by name.
    """
    batch, outer, inner = extent
    size = tile_for(prod(extent), most)
    over = 0  # the axes that columns are summed over
    for name in codes.SUMMED:
        summed = codes.ALL & ~axes.get(name, codes.ALL)
        over |= 0 if summed & codes.INNER else summed
    tile_i = _power(inner, _COLUMN if over else size)
    tile_o = _power(outer, size // tile_i) if not over or over & codes.OUTER else 1
    tile_b = _power(batch, size // (tile_i * tile_o)) if not over or over & codes.BATCH else 1
    shape = tile_b, tile_o, tile_i
    counts = tuple([-(-whole // part) for whole, part in zip(extent, shape, strict=True)])
    return Tiles(shape, counts)  # type: ignore[arg-type]


def tile_for(elements: int, most: int = USUAL.tile) -> int:
    """Elements of a tile, where there are so many in all."""
    return _SMALL_TILE if elements < _SMALL else most


def _power(size: int, limit: int) -> int:
    """The smallest power of two from ``size`` on, at most ``limit``."""
    return min(1 << max(size - 1, 0).bit_length(), limit)


# --- how kernels are compiled for them --------------------------------------------------------------------------------

_LIGHT_WARPS = 8
"""Of a program of what is light, at most: the larger its tile, the more a thread takes."""


def options_for(elements: int, cost: Cost = USUAL) -> dict[str, Any]:
    """How the kernels are compiled for tiles of so many elements of some cost."""
    warps = max(1, elements // (cost.a_thread * LANES))
    registers = cost.registers
    if cost.is_light:
        warps = min(warps, _LIGHT_WARPS)
        if warps < _LIGHT_WARPS:  # of small programs there are too few to fill a processor
            registers = USUAL.registers
    # The formulas count on products and sums that are rounded once.
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return options if LANES == 64 else {**options, "maxnreg": registers}
