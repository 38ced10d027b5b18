"""How kernels walk the parts of a call: the canonical form of each, and what must be copied around a launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fusedvae.layout import Strides, canonical, contiguous_strides, dense_strides, expanded

from . import LatentWork, Launcher, Part, TermWork

Extent = tuple[int, int, int]


class Copy(NamedTuple):
    """A part that the kernels cannot walk, and the tensor that stands in for it."""

    part: Part
    is_output: bool
    shape: torch.Size
    strides: Strides
    dtype: torch.dtype

    def make(self, sources: Sequence[Any]) -> torch.Tensor:
        """The stand-in, filled with the values of an input."""
        original = self.part.of(sources)
        made = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=original.device)
        return made if self.is_output else made.copy_(original.view(self.part.shape))

    def stand_in(self, source: int) -> Part:
        """The stand-in as a part, if it is that source."""
        return Part(source, self.shape, self.strides, self.dtype)

    def finish(self, sources: Sequence[Any], made: torch.Tensor) -> None:
        """Complete an output that was computed in the stand-in, summed over what it is broadcast along."""
        if self.is_output:
            original: torch.Tensor = self.part.of(sources)
            assert self.part.shape is not None
            summed = _total(made) if self.part.shape.numel() == 1 else _summed_to(made, self.part.shape)
            original.copy_(summed.view(original.shape))


def _total(dense: torch.Tensor) -> torch.Tensor:
    """The sum of all elements, in an order of its own: PyTorch shares a single sum out among threads, of any number."""
    rest = dense.as_strided((dense.numel(),), (1,))
    while len(rest) > _ROW:
        whole = len(rest) - len(rest) % _ROW
        rest = torch.cat([rest[:whole].view(-1, _ROW).sum(1), rest[whole:]])
    return rest.sum()


def _summed_to(dense: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """``dense.sum_to_size(shape)``, of several sums; on a CPU, whose threads would be seen in it, in float64."""
    lead = dense.dim() - len(shape)
    broadcast = [*range(lead), *[lead + d for d, size in enumerate(shape) if size != dense.shape[lead + d]]]
    dtype = torch.float64 if dense.device.type == "cpu" else None
    return dense.sum(broadcast, dtype=dtype).view(shape) if broadcast else dense


_ROW = 4096
"""Elements of which one thread makes a sum: fewer than PyTorch shares out."""


class Walk(NamedTuple):
    """The canonical form of parts that broadcast to one shape."""

    extent: Extent
    """Sizes (batch, outer, inner)."""
    logical: Strides
    """Strides of the row-major index of an element."""
    parts: list[Part | None]
    """As given, but for those that are copied: their stand-ins are sources too, behind all others."""
    strides: list[Strides]
    """Of each part; () of those that are numbers or absent."""
    copies: list[Copy]


CanSum = Callable[[Extent, tuple[Strides | None, ...]], bool]
"""Whether kernels can sum a value and gradients of these strides over an extent."""


def walk(
    shape: torch.Size,
    parts: Sequence[Part | None],
    first_output: int,
    sources: int,
    *,
    in_double: bool,
    keep_batch: bool,
    indexed: bool = False,
    lead: Strides = (),
) -> Walk:
    """How to walk parts that broadcast to ``shape``; those from ``first_output`` on are written to.

    ``sources`` is how many there are already. ``keep_batch`` and ``indexed`` as `fusedvae.layout.canonical` has them.
    The strides of the first part set the memory order, or those in ``lead`` do.
    """
    tensors = [(k, part) for k, part in enumerate(parts) if part is not None and part.shape is not None]
    strides_of = [expanded(part.shape or (), part.strides, shape) for _, part in tensors]
    layout = canonical(tuple(shape), (*([lead] if lead else []), *strides_of), keep_batch=keep_batch, indexed=indexed)
    found = Walk(layout.extent, layout.logical, list(parts), [()] * len(parts), [])
    first = 1 if lead else 0
    for position, ((k, part), strides) in enumerate(zip(tensors, layout.strides[first:], strict=True), first):
        found.strides[k] = strides
        if position in layout.copies:
            copy = _stand_in(part, k >= first_output, shape, layout.dense, in_double)
            found.parts[k] = copy.stand_in(sources + len(found.copies))
            found.copies.append(copy)
    return found


def _stand_in(part: Part, is_output: bool, shape: torch.Size, strides: Strides, in_double: bool) -> Copy:
    dtype = part.dtype
    if is_output and part.shape != shape:  # to be summed, in the dtype of the arithmetic
        dtype = torch.float64 if in_double else torch.float32
    assert dtype is not None
    return Copy(part, is_output, shape, strides, dtype)


def walk_term(term: TermWork, sources: int, *, keep_batch: bool, can_sum: CanSum) -> Walk:
    """How to walk a term: its inputs, weight, incoming, value and gradients, in this order.

    What the kernels cannot sum they write out, and PyTorch adds it up.
    """
    shape = term.inputs[0].shape
    assert shape is not None
    return _walk_summing(
        shape,
        [*term.inputs, term.weight, term.incoming],
        [term.value, *term.grads],
        1 + len(term.grads),
        sources,
        in_double=term.in_double,
        keep_batch=keep_batch,
        can_sum=can_sum,
    )


def walk_latent(work: LatentWork, sources: int, *, can_sum: CanSum) -> Walk:
    """How to walk a pass over the latent: inputs, noise, grad_z, incoming, z, value and gradients, in this order."""
    term, shape = work.divergence, work.shape
    lead: Strides = ()
    mean = term.inputs[0].shape
    if mean != shape:  # samples in front, along which the mean is the same
        lead = contiguous_strides(shape)
    return _walk_summing(
        shape,
        [*term.inputs, work.noise, work.grad_z, term.incoming],
        [work.z, term.value, *term.grads],
        1 + len(term.grads),
        sources,
        in_double=term.in_double,
        keep_batch=False,
        can_sum=can_sum,
        indexed=work.seed is not None,
        lead=lead,
    )


def _walk_summing(
    shape: torch.Size,
    inputs: list[Part | None],
    outputs: list[Part | None],
    summed: int,
    sources: int,
    *,
    in_double: bool,
    keep_batch: bool,
    can_sum: CanSum,
    indexed: bool = False,
    lead: Strides = (),
) -> Walk:
    """A walk whose last ``summed`` outputs are summed over what they are broadcast along."""
    first = inputs[0]
    assert first is not None
    dense = lead or dense_strides(shape, expanded(first.shape or (), first.strides, shape))
    written_out: list[Copy] = []
    while True:
        walked = walk(
            shape,
            [*inputs, *outputs],
            len(inputs),
            sources + len(written_out),
            in_double=in_double,
            keep_batch=keep_batch,
            indexed=indexed,
            lead=lead,
        )
        parts = walked.parts[-summed:]
        strides = tuple([steps or None for steps in walked.strides[-summed:]])
        broadcast = [k for k, part in enumerate(parts) if part is not None and part.shape != shape]
        # Sums of nothing are zero, but the kernels see no extent to make them for.
        if not broadcast or (shape.numel() and can_sum(walked.extent, strides)):
            return walked._replace(copies=[*written_out, *walked.copies])
        # One that leaves sums which can be made, if there is such a one.
        left = [(k, (*strides[:k], None, *strides[k + 1 :])) for k in reversed(broadcast)]
        chosen = next((k for k, others in left if shape.numel() and can_sum(walked.extent, others)), broadcast[-1])
        position = len(outputs) - summed + chosen
        part = outputs[position]
        assert part is not None
        copy = _stand_in(part, True, shape, dense, in_double)
        outputs[position] = copy.stand_in(sources + len(written_out))
        written_out.append(copy)


def with_copies(launch: Launcher, copies: Sequence[Copy]) -> Launcher:
    """A launcher of one that takes stand-ins behind the other sources."""
    if not copies:
        return launch

    def launch_with_copies(sources: tuple[Any, ...]) -> None:
        for copy in copies:
            sources = (*sources, copy.make(sources))
        launch(sources)
        for copy, made in reversed(list(zip(copies, sources[-len(copies) :], strict=True))):
            copy.finish(sources, made)

    return launch_with_copies
