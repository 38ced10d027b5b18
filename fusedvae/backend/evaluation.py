"""Operations by the formulas, in plain PyTorch: `objective` puts them together, `latent` puts one beside a sample.

Differentiable any number of times, on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .philox import normal
from .reference import GIVEN, Number, sample, working_dtype
from .specs import Objective, Placed, Sampling, factor_of, unpacked


def with_tensors_for_numbers(operands: Sequence[Number | None]) -> list[Tensor | None]:
    """The same operands; no program depends on the numbers among them then.

    As products: a compiler takes a number in one for any number. In torch.full it would be this one, and the program be
    compiled anew for another.
    """
    one = next(t for t in operands if isinstance(t, Tensor)).new_ones((), dtype=torch.float64)
    return [t if t is None or isinstance(t, Tensor) else one * t for t in operands]


def objective(spec: Objective, operands: Sequence[Number | None]) -> list[Tensor]:
    """The values of an objective by the formulas, differentiable, in the dtype of the arithmetic.

    Loss, likelihood and divergence, whatever ``spec`` says of the terms; those that are absent are 0.
    """
    likelihood = divergence = None
    if torch.compiler.is_compiling():
        operands = with_tensors_for_numbers(operands)
    for term in spec.terms():
        if term.formula is GIVEN:
            (elements,) = operands[term.inputs]
            assert isinstance(elements, Tensor)
            elements = elements.to(working_dtype(elements))
            shape = elements.shape
        else:
            elements = term_elements(term, operands, spec.packed_dim, full=spec.full)
            shape = elements.shape
        if term.reduction == "none":
            value = summed(elements, spec.dim)
        else:
            value = times(elements.sum(), factor_of(term.reduction, shape))
            if term.normalizer is not None:
                value = times(value, operands[term.normalizer])  # type: ignore[arg-type]
        if term.formula.is_divergence:
            divergence = value
        else:
            likelihood = value
    if divergence is None:
        assert likelihood is not None
        values = [likelihood, likelihood, torch.zeros_like(likelihood)]
    else:
        beta = operands[spec.beta]
        assert beta is not None
        weighted = times(divergence, beta)
        loss = weighted if likelihood is None else likelihood + weighted
        values = [loss, torch.zeros_like(loss) if likelihood is None else likelihood, divergence]
    if spec.grad_scale is not None:
        factor = operands[spec.grad_scale]
        assert factor is not None
        values = [with_gradient_times(value, factor) for value in values]
    return values


def term_elements(term: Placed, operands: Sequence[Number | None], packed_dim: int, *, full: bool) -> Tensor:
    """The weighted values of a term's elements, of all operands."""
    inputs = unpacked(term.formula, operands[term.inputs], packed_dim)
    weight = None if term.weight is None else operands[term.weight]
    dtype = working_dtype(*inputs, weight)
    inputs = [t.to(dtype) if isinstance(t, Tensor) else t for t in inputs]
    counts = None
    if weight is not None:
        assert isinstance(weight, Tensor)
        assert isinstance(inputs[0], Tensor)
        # Where the weight is 0, formulas see numbers with which nothing can go wrong, and no gradient goes through.
        counts = (weight != 0).expand(inputs[0].shape)
        inputs = [torch.where(counts, t, torch.ones_like(t)) if isinstance(t, Tensor) else t for t in inputs]
    elements = term.formula(inputs, term.forms) if term.gains is None else _balanced(term, inputs, term.gains)
    if full and term.formula.constant:
        elements = elements + term.formula.constant
    if counts is None:
        return elements
    assert isinstance(weight, Tensor)
    return torch.where(counts, elements * weight.to(elements.dtype), 0.0)


def _balanced(term: Placed, inputs: Sequence[Number], gains: Sequence[float]) -> Tensor:
    """A divergence whose gradients by the posterior and by the prior are times gains of their own.

    As two divergences, of which each sees the other distribution as it stands: Hafner et al. 2021 (arXiv:2010.02193).
    """
    value: Tensor | None = None
    for start in range(0, len(inputs), 2):
        own = [t.detach() if isinstance(t, Tensor) and k // 2 != start // 2 else t for k, t in enumerate(inputs)]
        part = with_gradient_times(term.formula(own, term.forms), gains[start])
        if value is None:
            value = part
        else:  # the same value, and so nothing but its gradient (what is infinite has no difference from itself)
            value = torch.where(part.detach().isfinite(), value + (part - part.detach()), value + part)
    assert value is not None
    return value


def summed(elements: Tensor, dim: Sequence[int] | None) -> Tensor:
    """Elements, summed over some dimensions: by default all but the first."""
    if dim is None:
        return elements.flatten(1).sum(1) if elements.dim() > 1 else elements
    return elements.sum(tuple(dim)) if dim else elements


def times(value: Tensor, number: Number) -> Tensor:
    """A product in the value's dtype; PyTorch's forward mode takes a 0-dim tensor times a number to float64."""
    return value * (number if isinstance(number, Tensor) else value.new_full((), number))


def with_gradient_times(value: Number, factor: Number) -> Any:
    """The value itself, whose gradient is multiplied by a factor: of an infinite value, by the size of it."""
    if not isinstance(value, Tensor) or (not isinstance(factor, Tensor) and factor == 1.0):
        return value
    fixed = value.detach()
    # What is infinite has no difference from itself, but may as well be multiplied (though not by 0).
    if isinstance(factor, Tensor):
        size = factor.abs()
        infinite = torch.where(size == 0.0, fixed, times(value, size))
    else:
        infinite = fixed if factor == 0.0 else times(value, abs(factor))
    return torch.where(fixed.isfinite(), fixed + times(value - fixed, factor), infinite)


def latent(spec: Sampling, operands: Sequence[Number | None]) -> list[Tensor]:
    """The sample, in the promoted dtype of mean and scale; and the divergence if there is to be one."""
    *given, seed, offset, noise = operands
    inputs = unpacked(spec.formula, given, spec.packed_dim)
    mean, scale = inputs[:2]
    assert isinstance(mean, Tensor)
    assert isinstance(scale, Tensor)
    if noise is None:
        assert isinstance(seed, Tensor)
        noise = normal(tuple(spec.shape(mean.shape)), seed, working_dtype(mean, scale), 0 if offset is None else offset)
        noise = laid_out_as(noise, mean)
    assert isinstance(noise, Tensor)
    z_dtype = torch.promote_types(mean.dtype, scale.dtype)
    dtype = working_dtype(*inputs, noise)
    ready = spec.formula.prepared([t.to(dtype) if isinstance(t, Tensor) else t for t in inputs], spec.forms)
    noise = noise.to(dtype)
    z = sample(ready[0], ready[1], noise)
    if spec.kl_dtype is None:
        return [z.to(z_dtype)]
    if spec.at_sample:
        assert spec.formula.at_sample is not None
        elements = spec.formula.at_sample(z, noise, *ready[1:])
    else:
        elements = spec.formula.elements(*ready)
    return [z.to(z_dtype), summed(elements, spec.kl_dim).to(spec.kl_dtype)]


def laid_out_as(noise: Tensor, mean: Any) -> Tensor:
    """The noise, shared out among processes as a DTensor is: that which the first one drew. Samples may be in front."""
    if type(mean) is Tensor or not hasattr(mean, "device_mesh"):
        return noise
    from torch.distributed.tensor import Shard, distribute_tensor

    in_front = noise.dim() - mean.dim()
    placements = [Shard(p.dim + in_front) if isinstance(p, Shard) else p for p in mean.placements]
    return distribute_tensor(noise, mean.device_mesh, placements)
