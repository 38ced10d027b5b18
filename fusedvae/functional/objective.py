"""From checked operands to the call of an objective: a sum of terms, of which each is a formula over its inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from .. import autograd
from ..backend import resolve
from ..backend.reference import FORMULAS, GIVEN, Form, Formula, form_fields
from ..backend.specs import Objective, dtype_of_sums, inverse_of, shape_of_mean
from ..calls import Operand, Operands
from ..layout import dense_strides
from ..torch_private import has_hooks_on_saved_tensors, is_base_held, is_sharded, is_transformed, is_watched
from .checks import check_integer, check_packed, check_tensor, check_weight


def objective_call(
    operands: Operands,
    terms: Sequence[tuple[Formula, Sequence[Form], int]],
    reductions: tuple[str, ...],
    dim: tuple[int, ...] | None,
    packed_dim: int,
    backend: str | None,
    *,
    full: bool = False,
    balance: float | None = None,
    returns_terms: bool = False,
    is_grad_scaled: bool = False,
    inplace: bool = False,
) -> autograd.DifferentiableObjective:
    """The call of an objective of terms: formulas, their forms, and how many operands a weight adds to each.

    The operands have been checked: the inputs and the weighting of each term, then beta, then what gradients are scaled
    by.
    """
    check_integer("packed_dim", packed_dim)
    first = operands[0]
    assert isinstance(first, Tensor)
    enabled = torch.is_grad_enabled()
    if full:
        terms = [(FORMULAS[f.in_full] if f.in_full else f, forms, weighting) for f, forms, weighting in terms]
    needed: list[bool] = []
    is_weight_learned = False
    for formula, _, weighting in terms:
        start = len(needed)
        inputs = operands[start : start + len(formula.inputs)]
        # What was given is nothing that kernels make.
        needed += [enabled and isinstance(t, Tensor) and t.requires_grad and formula is not GIVEN for t in inputs]
        for t in operands[len(needed) : len(needed) + weighting]:
            is_weight_learned = is_weight_learned or (isinstance(t, Tensor) and t.requires_grad)
        needed += [False] * weighting
    beta = operands[len(needed)]
    data = operands[: len(needed)]
    weighted = tuple([weighting > 0 for _, _, weighting in terms])
    maps, squared, limits = form_fields([form for _, forms, _ in terms for form in forms])
    # Without weights, all count the same.
    counted = ["mean" if r == "weighted_mean" and not w else r for r, w in zip(reductions, weighted, strict=True)]
    spec = Objective(
        formulas=tuple([formula.name for formula, _, _ in terms]),
        maps=maps,
        squared=squared,
        limits=limits,
        balance=balance,
        weighted=weighted,
        normalized=tuple([weighting > 1 for _, _, weighting in terms]),
        packed_dim=int(packed_dim),
        full=bool(full),
        reductions=tuple(counted),
        dim=dim,
        dtype=value_dtype(first.device.type, *data, is_sum=dim != ()),
        # (The gradient of a beta is the divergence.)
        returns_terms=bool(returns_terms) or (isinstance(beta, Tensor) and beta.requires_grad),
        needed=(*needed, *[False] * (len(operands) - len(needed))),
        is_grad_scaled=is_grad_scaled,
        # Kernels know no gradients of weights.
        backend="reference" if is_weight_learned else backend_for(operands, backend),
    )
    call = autograd.DifferentiableObjective(operands, spec, in_place=inplace and needed[0])
    if call.in_place:
        if call.kernel_call is None:
            raise ValueError(
                "inplace: expected False where gradients have memory of their own: with the reference formulas (which "
                "compute the gradients of weights, too), under torch.compile, torch.func and tracing; got True"
            )
        strides, dense = first.stride(), dense_strides(first.shape, first.stride())
        if any(size > 1 and s != d for size, s, d in zip(first.shape, strides, dense, strict=True)) or first.is_neg():
            raise ValueError(
                f"{call.terms[0].formula.inputs[0]}: expected memory that its gradient may be written into (inplace="
                f"True), got some with gaps, or broadcast: strides {strides} of shape {tuple(first.shape)}"
            )
    return call


def weighting_of(
    name: str, weight: Tensor, reduction: str, of: str, mean: Operand, scale: Operand, packed_dim: int
) -> tuple[Operand, ...]:
    """The operands that a weight adds to a term's: itself and, for a weighted mean, 1 / its sum over all elements."""
    check_tensor(of, mean, integers=True)
    assert isinstance(mean, Tensor)
    if scale is None:
        check_packed(of, mean, packed_dim)
    shape = shape_of_mean(mean, scale, packed_dim)
    check_weight(name, weight, shape, of, mean)
    if reduction != "weighted_mean":
        return (weight,)
    times = math.prod(shape) * inverse_of(max(weight.numel(), 1))
    total = weight.sum(dtype=dtype_of_sums(weight.device))
    if is_sharded((total,)):  # PyTorch 2.6 would take the reciprocal of each process's part
        from torch.distributed.tensor import Replicate

        whole = total.redistribute(placements=[Replicate()] * total.device_mesh.ndim)  # type: ignore[attr-defined]
        total = whole if weight.requires_grad else whole.to_local()
    return weight, 1.0 / (total * times)


def summed_kl(kl: Tensor, reduction: str) -> Tensor:
    """The sum over the batch of a divergence that is given, or its mean."""
    dtype = dtype_of_sums(kl.device)
    return (kl.sum(dtype=dtype) if reduction == "sum" else kl.mean(dtype=dtype)).to(kl.dtype)


def value_dtype(device_type: str, *operands: Tensor | float | None, is_sum: bool = True) -> torch.dtype:
    """The dtype of values of these operands: 0-dim tensors have no say beside others, as in PyTorch's arithmetic.

    Sums have float32 at least: float16 ends at 65504, and bfloat16 has eight digits, in base 2.
    """
    tensors = [t for t in operands if isinstance(t, Tensor) and t.dtype.is_floating_point]
    promoted = reduce(torch.promote_types, [t.dtype for t in tensors if t.dim() > 0] or [t.dtype for t in tensors])
    if promoted not in (torch.float32, torch.float64) and (is_sum or torch.is_autocast_enabled(device_type)):
        return torch.float32
    return promoted


def backend_for(operands: Operands, requested: str | None) -> str:
    """The backend that serves these operands: the reference where only operations of PyTorch can."""
    first = operands[0]
    assert isinstance(first, Tensor)
    name = resolve(first.device.type, requested, index=first.device.index)
    return "reference" if is_transformed(operands) and not is_sharded(operands) else name


def may_be_in_place() -> bool:
    """Whether autograd notices that what an operation before has saved was written over.

    Hooks on saved tensors, as checkpoints have them, give back what they kept, whatever has become of it.
    """
    return is_watched() or not has_hooks_on_saved_tensors()


def check_memory(call: autograd.DifferentiableObjective, operands: Operands) -> None:
    """Check that the gradient of the first operand may be written into its memory, if it is: nobody else sees that.

    Memory is nothing that calls are found by: each is checked anew.
    """
    if not call.in_place:
        return
    first, *others = operands
    assert isinstance(first, Tensor)
    name, *names = call.terms[0].formula.inputs
    expected = f"{name}: expected memory that its gradient may be written into (inplace=True), got"
    is_view = first._is_view()  # (What it is a view of has no name here: that would hold it.)
    if first.is_leaf or (is_view and first._base.is_leaf):  # type: ignore[union-attr]
        raise ValueError(f"{expected} that of a leaf, which keeps its values")
    if getattr(first, "is_overwritten", False):
        raise ValueError(f"{expected} one that has it already, of an earlier loss, where the values were")
    storage = first.untyped_storage().data_ptr()
    for k, other in enumerate(others):
        if isinstance(other, Tensor) and storage and other.untyped_storage().data_ptr() == storage:
            raise ValueError(f"{expected} some that {names[k] if k < len(names) else 'another operand'} lies in too")
    if is_view and first._base.numel() != first.numel():  # type: ignore[union-attr]
        raise ValueError(f"{expected} a part of a larger tensor, which it is a view of")
    if is_view and is_base_held(first):
        raise ValueError(f"{expected} that of a tensor which it is a view of, and which something else holds")
