"""What an operation is but for its operands, on any backend: an objective, or a pass over the latent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import FORMULAS, GIVEN, Form, Formula, Number, form_fields, forms_of


class Placed(NamedTuple):
    """A term of an objective, and where its operands are."""

    formula: Formula
    forms: tuple[Form, ...]
    gains: tuple[float, ...] | None
    """What the gradients of its inputs are multiplied by."""
    reduction: str
    inputs: slice
    weight: int | None
    normalizer: int | None


class Objective(NamedTuple):
    """What an objective is, but for its operands.

    loss = the likelihood + beta * the divergence; either may be absent. Operands: of each term the inputs, and the
    weight and the normalizer (which multiplies the sum) if it has these; then beta; then grad_scale if there is one.
    """

    formulas: tuple[str, ...]
    """The names of its terms' formulas."""
    maps: tuple[str, ...]
    squared: tuple[bool, ...]
    limits: tuple[float, ...]
    """The forms of all scales, of each a map, and low, high and eps."""
    balance: float | None
    """What gradients to a prior are multiplied by; those to the posterior by 1 less this."""
    weighted: tuple[bool, ...]
    normalized: tuple[bool, ...]
    """The terms that have a weight, and a normalizer."""
    packed_dim: int
    """The dimension along which means and scales are packed, of operands that are."""
    full: bool
    """Whether terms have their constants."""
    reductions: tuple[str, ...]
    """Of each term: "batchmean", "sum", "mean" or "weighted_mean"; or, of all, "none"."""
    dim: tuple[int, ...] | None
    """With "none", what values are summed over: by default all but the batch."""
    dtype: torch.dtype
    """Of the values."""
    returns_terms: bool
    """Whether the values are the loss, the likelihood and the divergence, or the loss alone."""
    needed: tuple[bool, ...]
    """The operands whose gradients are made with the values; of those with which that is possible."""
    is_grad_scaled: bool
    backend: str

    def terms(self) -> tuple[Placed, ...]:
        """Its terms, in order."""
        forms = iter(forms_of(self.maps, self.squared, self.limits))
        found, position = [], 0
        for k, name in enumerate(self.formulas):
            formula = GIVEN if name == GIVEN.name else FORMULAS[name]
            inputs = slice(position, position + len(formula.inputs))
            position = inputs.stop
            weight = normalizer = None
            if self.weighted[k]:
                weight, position = position, position + 1
            if self.normalized[k]:
                normalizer, position = position, position + 1
            a = self.balance
            gains = None if a is None else (1.0 - a, 1.0 - a, a, a)[: len(formula.inputs)]
            own = tuple(next(forms) for _ in formula.scales)
            found.append(Placed(formula, own, gains, self.reductions[k], inputs, weight, normalizer))
        return tuple(found)

    @property
    def values(self) -> str:
        """What it gives: "total", "sample" (a value for each), or "element" (summed over ``dim`` alone)."""
        if self.reductions[0] != "none":
            return "total"
        return "sample" if self.dim is None else "element"

    def gradient(self, term: Placed, needed: tuple[bool, ...]) -> TermGradient:
        """Of some inputs of a term."""
        maps, squared, limits = form_fields(term.forms)
        return TermGradient(
            formula=term.formula.name,
            maps=maps,
            squared=squared,
            limits=limits,
            gains=term.gains or (),
            dim=self.dim,
            packed_dim=self.packed_dim,
            needed=needed,
            backend=self.backend,
        )

    @property
    def beta(self) -> int:
        """Beta's position among the operands."""
        return len(self.needed) - 1 - self.is_grad_scaled

    @property
    def grad_scale(self) -> int | None:
        return len(self.needed) - 1 if self.is_grad_scaled else None


class TermGradient(NamedTuple):
    """What the gradients of a term's weighted sum are, but for its operands: its inputs, weight and incoming."""

    formula: str
    maps: tuple[str, ...]
    squared: tuple[bool, ...]
    limits: tuple[float, ...]
    """The forms of its scales: see `Objective`."""
    gains: tuple[float, ...]
    """What each gradient is multiplied by; none for 1."""
    dim: tuple[int, ...] | None
    """What the values were summed over, so that incoming, unless it is 0-dim, has not: by default all but the batch."""
    packed_dim: int
    needed: tuple[bool, ...]
    """The inputs that they are of."""
    backend: str


class Sampling(NamedTuple):
    """What a pass over the latent is, but for its operands: the sample z, and the divergence beside it.

    Operands: the inputs of the divergence; then the seed, the offset and the noise (a seed or noise).
    """

    divergence: str
    """The name of its formula, of whose inputs the first two are the mean and the scale of z."""
    maps: tuple[str, ...]
    squared: tuple[bool, ...]
    limits: tuple[float, ...]
    """The forms of all scales, of each a map, and low, high and eps."""
    samples: int | None
    """How many samples there are, along a dimension in front; None for one, without such a dimension."""
    at_sample: bool
    """Whether the divergence is log q(z) - log p(z), one a sample, or the expectation of that."""
    kl_dtype: torch.dtype | None
    """Of the divergence; None for the sample alone."""
    kl_dim: tuple[int, ...]
    """What the divergence is summed over, counted in the dimensions of z."""
    packed_dim: int
    """The dimension along which means and scales are packed, of operands that are."""
    backend: str

    @property
    def formula(self) -> Formula:
        return FORMULAS[self.divergence]

    @property
    def forms(self) -> tuple[Form, ...]:
        return forms_of(self.maps, self.squared, self.limits)

    def shape(self, mean: torch.Size) -> torch.Size:
        """Of z."""
        return mean if self.samples is None else torch.Size((self.samples, *mean))

    def gradient(self, needed: tuple[bool, ...]) -> SamplingGradient:
        """Of some of its inputs."""
        return SamplingGradient(
            divergence=self.divergence,
            maps=self.maps,
            squared=self.squared,
            limits=self.limits,
            samples=self.samples,
            at_sample=self.at_sample,
            kl_dim=self.kl_dim,
            packed_dim=self.packed_dim,
            needed=needed,
            backend=self.backend,
        )


class SamplingGradient(NamedTuple):
    """What the gradients of a pass over the latent are.

    Operands: those of the pass, then grad_z and the gradient of the divergence. Fields as `Sampling` has them.
    """

    divergence: str
    maps: tuple[str, ...]
    squared: tuple[bool, ...]
    limits: tuple[float, ...]
    samples: int | None
    at_sample: bool
    kl_dim: tuple[int, ...]
    packed_dim: int
    needed: tuple[bool, ...]
    """The inputs of the divergence that they are of."""
    backend: str

    @property
    def formula(self) -> Formula:
        return FORMULAS[self.divergence]

    @property
    def forms(self) -> tuple[Form, ...]:
        return forms_of(self.maps, self.squared, self.limits)

    def shape(self, mean: torch.Size) -> torch.Size:
        """Of z."""
        return mean if self.samples is None else torch.Size((self.samples, *mean))

    def sampling(self, kl_dtype: torch.dtype | None, backend: str) -> Sampling:
        """A pass like that which they are of."""
        return Sampling(
            divergence=self.divergence,
            maps=self.maps,
            squared=self.squared,
            limits=self.limits,
            samples=self.samples,
            at_sample=self.at_sample,
            kl_dtype=kl_dtype,
            kl_dim=self.kl_dim,
            packed_dim=self.packed_dim,
            backend=backend,
        )


def factor_of(reduction: str, shape: torch.Size) -> float:
    """What a sum over all elements is multiplied by; NaN for a mean over nothing."""
    if reduction in ("sum", "none", "weighted_mean"):
        return 1.0
    count = shape[0] if reduction == "batchmean" else math.prod(shape)
    return inverse_of(count) if count else math.nan


def inverse_of(count: int) -> float:
    """1 / count. To torch.jit.trace sizes are tensors, whose inverses would be float32."""
    return 1.0 / (count.double() if isinstance(count, Tensor) else count)


def dtype_of_sums(device: torch.device) -> torch.dtype:
    """Of sums that are left to PyTorch. It shares them out among threads, which in float32 would be seen."""
    return torch.float32 if device.type == "mps" else torch.float64  # there is no other on Apple's GPUs


def halves(packed: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The mean half and the scale half of a tensor that is packed along a dimension, as views."""
    first, second = packed.chunk(2, dim)
    return first, second


def half_of(shape: torch.Size, dim: int) -> torch.Size:
    """The shape of either half of a packed tensor."""
    sizes = list(shape)
    sizes[dim] //= 2
    if torch.compiler.is_compiling():  # that of PyTorch 2.6 makes no torch.Size
        return tuple(sizes)  # type: ignore[return-value]
    return torch.Size(sizes)


def shape_of_mean(mean: Tensor, scale: object, packed_dim: int) -> torch.Size:
    """The shape of a mean, which has its scale packed beside it if that is None."""
    return mean.shape if scale is not None else half_of(mean.shape, packed_dim)


def unpacked(formula: Formula, inputs: Sequence[Number | None], packed_dim: int) -> list[Number]:
    """A formula's inputs, the packed ones taken apart."""
    found = list(inputs)
    for mean, scale in formula.pairs:
        whole = found[mean]
        if found[scale] is None and isinstance(whole, Tensor):
            found[mean], found[scale] = halves(whole, packed_dim)
    return found  # type: ignore[return-value]
