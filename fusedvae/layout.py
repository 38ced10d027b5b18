"""The canonical form of an elementwise problem: three sizes and, for every operand, three strides.

A kernel sees each operand as ``data[b * s0 + o * s1 + i * s2]`` over an extent (batch, outer, inner), with
``s2`` 1 (contiguous) or 0 (broadcast). Contiguous and channels_last tensors, the halves of a packed tensor and
broadcast operands all have this form, so they need no copies. Everything here is arithmetic on sizes and
strides: nothing here reads a tensor, and plans are cached, so that a training loop makes each of its own once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

Strides = tuple[int, ...]


def broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Whether a tensor of one shape broadcasts to the other."""
    lead = len(target) - len(shape)
    return lead >= 0 and all(s == 1 or s == t for s, t in zip(shape, target[lead:], strict=True))


class Layout(NamedTuple):
    """How kernels walk a set of operands of one logical shape."""

    extent: tuple[int, int, int]
    """Sizes (batch, outer, inner)."""
    strides: tuple[Strides, ...]
    """One (batch, outer, inner) triple an operand, in elements."""
    logical: Strides
    """The same for the row-major logical index of an element: the noise stream counts by it."""
    copies: frozenset[int]
    """Operands that do not fit the form and must be copied to ``dense`` strides first."""
    dense: Strides
    """Strides over the logical shape of a dense tensor in this layout's memory order."""


def expanded(shape: Sequence[int], strides: Strides, target: Sequence[int]) -> Strides:
    """Strides of a tensor expanded to ``target``: 0 where it is broadcast."""
    lead = len(target) - len(shape)
    sizes = zip(shape, target[lead:], strides, strict=True)
    return (0,) * lead + tuple([0 if size == 1 != whole else step for size, whole, step in sizes])


def contiguous_strides(shape: Sequence[int]) -> Strides:
    """Row-major strides of ``shape``."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def dense_strides(shape: Sequence[int], strides: Strides) -> Strides:
    """Strides of a gapless tensor whose dimensions lie in memory in the order that ``strides`` has them."""
    dense, step = [0] * len(shape), 1
    for d in reversed(_memory_order(shape, (strides,))):
        dense[d] = step
        step *= max(shape[d], 1)
    return tuple(dense)


def _memory_order(shape: Sequence[int], operands: Sequence[Strides]) -> list[int]:
    """Dimensions from the slowest in memory to the fastest; the first operand decides, the next ones break ties."""
    return sorted(range(len(shape)), key=lambda d: (*(-strides[d] for strides in operands), d))


def _coalesce(
    shape: Sequence[int], operands: Sequence[Strides], *, keep_batch: bool
) -> tuple[list[int], list[list[int]]] | None:
    """Merge dimensions into at most three; None where that cannot be done or an inner stride is not 0 or 1.

    The last of ``operands`` is the logical index, which may have any inner stride.
    """
    first = 1 if keep_batch else 0
    dims = [d for d in _memory_order(shape, operands) if d >= first and shape[d] != 1]
    sizes: list[int] = []
    walks: list[list[int]] = [[] for _ in operands]
    for d in dims:
        if sizes and all(walk[-1] == strides[d] * shape[d] for walk, strides in zip(walks, operands, strict=True)):
            sizes[-1] *= shape[d]
            for walk, strides in zip(walks, operands, strict=True):
                walk[-1] = strides[d]
        else:
            sizes.append(shape[d])
            for walk, strides in zip(walks, operands, strict=True):
                walk.append(strides[d])
    room = 3 - first
    if len(sizes) > room:
        return None
    if any(walk[-1] not in (0, 1) for walk in walks[:-1] if walk):
        return None
    pad = room - len(sizes)
    sizes = [1] * pad + sizes
    walks = [[0] * pad + walk for walk in walks]
    if keep_batch:
        sizes.insert(0, shape[0])
        for walk, strides in zip(walks, operands, strict=True):
            walk.insert(0, strides[0] if shape[0] != 1 else 0)
    return sizes, walks


@lru_cache(maxsize=4096)
def canonical(shape: tuple[int, ...], operands: tuple[Strides, ...], *, keep_batch: bool, indexed: bool) -> Layout:
    """Plan a walk over operands of strides ``operands``, all expanded to ``shape`` (stride 0 where broadcast).

    ``keep_batch`` keeps dimension 0 apart (values per sample are wanted); otherwise it may merge with the others.
    ``indexed`` keeps the logical index a linear function of the position (noise is wanted). The first operand
    sets the memory order. Operands that cannot be walked in place are named in ``copies``.
    """
    order = contiguous_strides(shape)
    if 0 in shape:  # nothing to walk; what remains is how many samples have no elements
        inner = math.prod(shape[1:])
        return Layout((shape[0], 1, inner), ((inner, 0, 1),) * len(operands), (inner, 0, 1), frozenset(), order)
    dense = dense_strides(shape, operands[0])

    def attempt(candidates: Sequence[Strides]) -> tuple[list[int], list[list[int]]] | None:
        # Without noise the index is of no interest: let it merge whenever the first operand does.
        return _coalesce(shape, (*candidates, order if indexed else candidates[0]), keep_batch=keep_batch)

    copies: set[int] = set()
    plan = attempt(operands)
    if plan is None:
        copies = {k for k, strides in enumerate(operands) if attempt((dense, strides)) is None}
        plan = attempt([dense if k in copies else s for k, s in enumerate(operands)])
    if plan is None:  # each fits alone, but not together
        copies = {k for k, strides in enumerate(operands) if strides != dense}
        plan = attempt([dense] * len(operands))
    if plan is None:  # a dense tensor in an order that batch or index cannot follow: go row-major
        dense = order
        copies = {k for k, strides in enumerate(operands) if strides != dense}
        plan = attempt([dense] * len(operands))
    assert plan is not None, "row-major operands always have a canonical form"
    sizes, walks = plan
    batch, outer, inner = sizes
    return Layout(
        (batch, outer, inner),
        tuple(tuple(walk) for walk in walks[:-1]),
        tuple(walks[-1]),
        frozenset(copies),
        dense,
    )
