"""A linear layer and the likelihood of what it gives, a block of columns at a time.

The last layer of a decoder gives one number or two for each element of x, and has a gradient for each. Of these, only a
block's are in memory at a time: it is multiplied out, the kernels overwrite it with its gradient, and the products of
that with the layer's input and with its weight are the gradients of the layer. The products are PyTorch's own.

Gradients are made in the forward pass where `fusedvae.autograd` makes them there. Elsewhere (values per sample; and
float16, whose gradients would underflow) the backward pass multiplies out the blocks again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import autograd
from .backend import evaluation
from .backend.reference import Number, replaced, working_dtype
from .backend.specs import Objective
from .calls import ObjectiveCall, Operand, Operands, ScaleCall, TermGradientCall, find, positions
from .captures import current_capture
from .torch_private import is_transformed

_BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**20}
"""Elements of x in a block, about: what stays in a core's caches, and what keeps a GPU busy."""
_ALIGNED = 64
"""Blocks begin at multiples of this."""


def usual_block(rows: int, device_type: str) -> int:
    """How many columns a block has, for so many rows."""
    columns = _BLOCK_ELEMENTS.get(device_type, 2**20) // max(rows, 1)
    return max(columns // _ALIGNED, 1) * _ALIGNED


_WEIGHT, _BIAS, _X = 1, 2, 3
"""Positions of operands."""


class LinearLikelihoodCall:
    """What a call is, but for its operands, which are matrices of a row a sample.

    Operands: the layer's input, weight and bias (or None); x; then what else the likelihood takes, and the elements'
    weight if it has one: each None, a number, a 0-dim tensor, or a matrix that broadcasts to x.
    """

    def __init__(self, spec: Objective, block: int, needed: Sequence[bool], *, is_deferred: bool) -> None:
        self.spec = spec
        """The likelihood of a block, in the reduction "sum", or "none" for a value a row; ``is_grad_scaled``."""
        self.block = block
        """How many columns are computed at a time."""
        self.needed = tuple(needed)
        """The operands whose gradients are wanted."""
        self.is_deferred = is_deferred
        """Whether these are left to the backward pass."""
        self.rescaling: ScaleCall | None = None
        """Of the gradients made in the forward pass."""


class Factors(NamedTuple):
    """What a sum is multiplied by, and what its gradients are: the same, but for what these are scaled by."""

    of_value: Number
    of_gradients: Number


def linear_likelihood(call: LinearLikelihoodCall, factors: Factors, operands: Operands) -> Tensor:
    """-log p(x), summed over all elements or over those of a row, times the factors."""
    fixed = Factors(*[f.detach() if isinstance(f, Tensor) else f for f in factors])
    value: Tensor = _LinearLikelihood.apply(call, fixed, *operands)
    return value


class _Block(NamedTuple):
    """Some columns of x: the layer's outputs for them, and the rows of its weight that these come from."""

    columns: slice
    out: Tensor
    """Those of all parts beside each other."""
    parts: list[tuple[Tensor, slice]]
    """The mean, and the scale if that is learned."""
    operands: list[Operand]
    """The likelihood's inputs, and the elements' weight."""


def _blocks(call: LinearLikelihoodCall, operands: Operands) -> Iterator[_Block]:
    """Every block in turn, multiplied out, in the same memory."""
    hidden, weight, bias, x, *others = operands
    assert isinstance(hidden, Tensor)
    assert isinstance(weight, Tensor)
    assert isinstance(x, Tensor)
    rows, columns = x.shape
    count = len(weight) // columns if columns else 1
    memory = hidden.new_empty(rows * count * min(call.block, columns))
    dtype = working_dtype(hidden, x, *others)
    for start in range(0, columns, call.block):
        stop = min(start + call.block, columns)
        width = stop - start
        out = memory[: rows * count * width].view(rows, count * width)
        parts = []
        for k in range(count):
            part, span = out[:, k * width : (k + 1) * width], slice(k * columns + start, k * columns + stop)
            if bias is None:
                torch.mm(hidden, weight[span].t(), out=part)
            else:
                assert isinstance(bias, Tensor)
                torch.addmm(bias[span], hidden, weight[span].t(), out=part)
            parts.append((part, span))
        taken: Operands = [out, *[_columns_of(t, start, stop, columns) for t in (x, *others)]]
        taken = autograd.converted(autograd.conversions_of(taken, dtype, out.device), taken)
        yield _Block(slice(start, stop), out, parts, list(taken))


def _columns_of(operand: Operand, start: int, stop: int, columns: int) -> Operand:
    """Those of an operand that has a value a column; any other as it is."""
    has_columns = isinstance(operand, Tensor) and operand.dim() == 2 and operand.shape[1] == columns
    return operand[:, start:stop] if has_columns else operand  # type: ignore[index]


class _Gradients:
    """Gradients of the operands that need them, added up over the blocks."""

    def __init__(self, needed: Sequence[bool], operands: Operands) -> None:
        self.operands = operands
        self.sums = [
            # What many blocks add to is added up in float32.
            None
            if not needed[k]
            else torch.empty_like(t)  # type: ignore[arg-type]
            if k in (_WEIGHT, _BIAS)
            else torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32))  # type: ignore[arg-type, union-attr]
            for k, t in enumerate(operands)
        ]

    def add(self, block: _Block, made: Sequence[Tensor | None]) -> None:
        """Those of a block: of its outputs, in their memory, and of the likelihood's other inputs."""
        hidden, weight = self.operands[:2]
        assert isinstance(hidden, Tensor)
        assert isinstance(weight, Tensor)
        of_hidden, of_weight, of_bias, *of_others = self.sums
        for part, span in block.parts:
            if of_weight is not None:
                torch.mm(part.t(), hidden, out=of_weight[span])
            if of_bias is not None:
                torch.sum(part, 0, out=of_bias[span])
            if of_hidden is not None and of_hidden.dtype == part.dtype:
                of_hidden.addmm_(part, weight[span])
            elif of_hidden is not None:
                of_hidden.add_(part @ weight[span])
        for total, gradient in zip(of_others, made, strict=False):
            if total is not None and gradient is not None:
                has_columns = total.dim() == 2 and gradient.shape[1] != total.shape[1]
                (total[:, block.columns] if has_columns else total).add_(gradient)

    def finished(self) -> list[Tensor | None]:
        """In the dtypes of the operands."""
        return [
            None if total is None else total.to(t.dtype)  # type: ignore[union-attr]
            for total, t in zip(self.sums, self.operands, strict=True)
        ]


def _needed_of_block(call: LinearLikelihoodCall) -> tuple[bool, ...]:
    """Which gradients of a block's likelihood are: of its outputs, x and others, but of no weight."""
    inputs = len(call.spec.terms()[0].formula.inputs)
    return (any(call.needed[:3]), *call.needed[3 : 2 + inputs])


def _split(needed: Sequence[bool], gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of x and others that were made, each in its place."""
    made = iter(gradients)
    found = [next(made) if is_needed else None for is_needed in needed]
    return found[1:]


def _forward(
    call: LinearLikelihoodCall, gradient_factor: Number, operands: Operands
) -> tuple[Tensor, list[Tensor | None] | None]:
    """The sum, or sums, in float64, and the gradients if they are made with it."""
    spec, x = call.spec, operands[_X]
    assert isinstance(x, Tensor)
    makes = any(call.needed) and not call.is_deferred
    needed = _needed_of_block(call) if makes else (False,) * len(_needed_of_block(call))
    spec = replaced(spec, needed=(*needed, *[False] * (len(spec.needed) - len(needed))))
    total = torch.zeros(x.shape[:1] if spec.values == "sample" else (), dtype=torch.float64, device=x.device)
    gradients = _Gradients(call.needed, operands) if makes else None
    for block in _blocks(call, operands):
        given = (*block.operands, None, gradient_factor)
        (value,), found = find(ObjectiveCall, given, spec, True, True).run(given)
        total += value
        if gradients is not None:
            gradients.add(block, _split(needed, found))
    return total, None if gradients is None else gradients.finished()


def _backward(call: LinearLikelihoodCall, incoming: Tensor, operands: Operands) -> list[Tensor | None]:
    """The gradients, for one of the sum, or of the sums."""
    spec = call.spec
    (term,) = spec.terms()
    needed = _needed_of_block(call)
    gradient = spec.gradient(term, needed)
    gradients = _Gradients(call.needed, operands)
    for block in _blocks(call, operands):
        inputs = block.operands if term.weight is not None else [*block.operands, None]
        given = (*inputs, incoming)
        found = find(TermGradientCall, given, gradient, True, True).outputs(given)
        gradients.add(block, _split(needed, found))
    return gradients.finished()


class _LinearLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: LinearLikelihoodCall, factors: Factors, *operands: Any) -> Any:
        value, gradients = _forward(call, factors.of_gradients, operands)
        ctx.call, ctx.gradient_factor, ctx.is_made = call, factors.of_gradients, gradients is not None
        ctx.gradients = None if gradients is None else [g for g in gradients if g is not None]
        ctx.capture = current_capture(value.device)
        ctx.tensors = positions([isinstance(t, Tensor) for t in operands])
        ctx.numbers = [None if isinstance(t, Tensor) else t for t in operands]
        ctx.save_for_backward(*[operands[k] for k in ctx.tensors])
        return (value * factors.of_value).to(call.spec.dtype)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Any:
        call: LinearLikelihoodCall = ctx.call
        is_differentiated = torch.is_grad_enabled() or is_transformed((incoming,))
        if ctx.is_made and not is_differentiated:
            made = iter(autograd.scaled(ctx, incoming))
            return None, None, *[next(made) if needed else None for needed in call.needed]
        operands = list(ctx.numbers)
        for k, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            operands[k] = tensor
        if not is_differentiated:
            return None, None, *_backward(call, autograd.as_weight(incoming) * ctx.gradient_factor, operands)

        def formula(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Operand) -> list[Tensor]:
            out = linear(hidden, weight, bias)
            return evaluation.objective(call.spec, (out, *others, None, ctx.gradient_factor))[:1]

        return None, None, *autograd.second_order(formula, operands, [incoming])
