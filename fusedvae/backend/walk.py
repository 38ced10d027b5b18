"""How kernels walk the operands of a call: the canonical form of each, and what must be copied around a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedvae.layout import Described, Strides, canonical, dense_strides, expanded


class Part(NamedTuple):
    """What a kernel takes for an operand: a field of the call's operands, or half of a packed one."""

    field: int
    described: Described
    offset: int = 0
    """Of the half, in bytes."""


ABSENT = Part(-1, None)


class Copy(NamedTuple):
    """An operand that the kernels cannot walk, and the tensor that stands in for it."""

    field: int
    is_output: bool
    shape: tuple[int, ...]
    strides: Strides


class Walk(NamedTuple):
    """The canonical form of parts of one logical shape."""

    extent: tuple[int, int, int]
    """Sizes (batch, outer, inner)."""
    logical: Strides
    """Strides of the row-major index of an element."""
    strides: list[Strides]
    """Of each part; () of those that are no tensors."""
    copies: tuple[Copy, ...]


def walk(
    shape: torch.Size, parts: Sequence[Part], first_output: int, *, keep_batch: bool, indexed: bool = False
) -> Walk:
    """How to walk operands that broadcast to ``shape``; those from ``first_output`` on are written to."""
    tensors = [(k, part.field, part.described) for k, part in enumerate(parts) if part.described]
    layout = canonical(
        tuple(shape),
        tuple([expanded(own, steps, shape) for _, _, (own, steps, _) in tensors]),
        keep_batch=keep_batch,
        indexed=indexed,
    )
    strides: list[Strides] = [()] * len(parts)
    for (k, _, _), steps in zip(tensors, layout.strides, strict=True):
        strides[k] = steps
    copied = [tensors[c] for c in sorted(layout.copies)]
    copies = tuple([Copy(field, k >= first_output, shape, layout.dense) for k, field, _ in copied])
    return Walk(layout.extent, layout.logical, strides, copies)


def walk_nll(
    shape: torch.Size,
    parts: Sequence[Part],
    *,
    keep_batch: bool,
    can_sum: Callable[[tuple[int, int, int], Strides], bool],
) -> Walk:
    """How to walk a likelihood: recon_x, x, spread, weight; value and the gradients of recon_x, x and spread.

    ``can_sum`` says, of an extent and the strides of the gradient of spread over it, whether the kernels can sum that
    gradient over what it is broadcast along.
    """
    walked = walk(shape, parts, 4, keep_batch=keep_batch)
    recon_x, grad_spread = parts[0].described, parts[-1].described
    assert recon_x
    if not grad_spread or grad_spread[0] == shape:
        return walked
    field = parts[-1].field
    # Sums of nothing are zero, but the kernels see no extent to make them for.
    is_walked = shape.numel() != 0 and not any(copy.field == field for copy in walked.copies)
    if is_walked and can_sum(walked.extent, walked.strides[-1]):
        return walked
    # Broadcast in a pattern that the kernels cannot sum over: they write it out, and PyTorch adds it up.
    strides = dense_strides(shape, expanded(recon_x[0], recon_x[1], shape))
    written_out = Part(field, (shape, strides, grad_spread[2]))
    walked = walk(shape, [*parts[:-1], written_out], 4, keep_batch=keep_batch)
    if any(copy.field == field for copy in walked.copies):
        return walked
    return walked._replace(copies=(*walked.copies, Copy(field, True, shape, strides)))


def with_stand_ins(operands: Sequence[Any], copies: Sequence[Copy]) -> tuple[Any, ...]:
    """The operands with copies in the place of what the kernels cannot walk, filled with the values of inputs."""
    replaced = list(operands)
    for field, is_output, shape, strides in copies:
        original = operands[field]
        replaced[field] = torch.empty_strided(shape, strides, dtype=original.dtype, device=original.device)
        if not is_output:
            replaced[field].copy_(original)
    return tuple(replaced)


def copy_back(operands: Sequence[Any], replaced: Sequence[Any], copies: Sequence[Copy]) -> None:
    """Complete the outputs that were computed in copies, summed over what they are broadcast along."""
    for field, is_output, _, _ in copies:
        if is_output:
            original: Tensor = operands[field]
            original.copy_(replaced[field].sum_to_size(original.shape))
