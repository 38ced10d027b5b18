"""What arguments can be, for annotations of your own: ``def loss(reduction: fusedvae.typing.Reduction) -> ...``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from torch import Generator as TorchGenerator
from torch import Tensor

__all__ = [
    "Backend",
    "Bound",
    "Bounds",
    "Dim",
    "Dispersion",
    "ELBOOperands",
    "ELBOOptions",
    "Estimator",
    "Generator",
    "LaplaceScale",
    "LikelihoodName",
    "LikelihoodScale",
    "LinearELBOOptions",
    "NormalScale",
    "Rate",
    "Reduction",
    "TermReduction",
]

Backend = Literal["auto", "native", "triton", "reference"]
"""Which code computes."""

LikelihoodName = Literal[
    "gaussian",
    "laplace",
    "bernoulli",
    "bernoulli_probs",
    "mse",
    "l1",
    "poisson",
    "negative_binomial",
    "zero_inflated_negative_binomial",
    "discretized_logistic",
]

NormalScale = Literal["logvar", "logstd", "std", "var", "softplus"]
LaplaceScale = Literal["logscale", "scale", "softplus"]
"""Also that of a discretized logistic distribution."""
Dispersion = Literal["theta", "logtheta", "softplus"]
"""Theta of a negative binomial distribution."""
Rate = Literal["rate", "lograte", "softplus"]
"""Of a Poisson distribution."""
LikelihoodScale = NormalScale | LaplaceScale | Dispersion | Rate
"""Forms of a scale: what the tensor beside a mean holds."""

Bounds = tuple[float | None, float | None] | None
"""Of a clamp: (low, high)."""

TermReduction = Literal["batchmean", "sum", "mean", "weighted_mean", "none"]
Reduction = TermReduction | tuple[TermReduction, TermReduction]
"""One for both terms of a bound, or the likelihood's and the divergence's."""

Dim = int | Sequence[int] | None
Estimator = Literal["analytic", "sample"]
Bound = Literal["elbo", "iwae"]
Generator = TorchGenerator | Sequence[TorchGenerator] | None


class LinearELBOOptions(TypedDict, total=False):
    """Keywords of `fusedvae.functional.linear_elbo`: what goes for every batch."""

    likelihood: LikelihoodName
    scale: NormalScale
    clamp: Bounds
    eps: float
    recon_scale: LikelihoodScale | None
    recon_clamp: Bounds
    recon_eps: float
    prior_scale: NormalScale
    prior_clamp: Bounds
    prior_eps: float | None
    full: bool
    grad_scale: float | Tensor | None
    packed_dim: int
    backend: Backend | None


class ELBOOptions(LinearELBOOptions, total=False):
    """Keywords of `fusedvae.ELBOLoss` and `fusedvae.functional.elbo_loss`: what goes for every batch."""

    inplace: bool


class ELBOOperands(TypedDict, total=False):
    """Keywords of a call of `fusedvae.ELBOLoss`, and of `fusedvae.functional.elbo_loss`: the tensors of a batch."""

    prior_mu: Tensor | float | None
    prior_logvar: Tensor | float | None
    kl: Tensor | None
    extra: Tensor | float | None
    pos_weight: Tensor | float | None
    zi_logits: Tensor | float | None
    weight: Tensor | None
    latent_weight: Tensor | None


class ELBOArguments(ELBOOptions, ELBOOperands, total=False):
    """All keywords of `fusedvae.functional.elbo_loss` but ``return_terms``, which says what it returns."""

    beta: float | Tensor
    reduction: Reduction


class LinearELBOArguments(LinearELBOOptions, ELBOOperands, total=False):
    """All keywords of `fusedvae.functional.linear_elbo` but ``return_terms``, which says what it returns."""

    beta: float | Tensor
    reduction: Reduction
    block: int | None
