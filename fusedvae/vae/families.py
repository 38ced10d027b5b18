"""The distributions that a VAE has and gives: of the latent, and of data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import functional
from ..backend.reference import LIKELIHOODS, PLAIN, Form, Scale, working_dtype
from ..torch_private import standard_gamma
from ..typing import Generator


class DiagonalGaussian(NamedTuple):
    """A batch of normal distributions N(mu, diag e^logvar); unpacks as the pair (mu, logvar)."""

    mu: Tensor
    """Means, ``(batch, *)``."""
    logvar: Tensor
    """Log-variances, of ``mu``'s shape or broadcasting to it."""

    def sample(self, *, generator: Generator = None) -> Tensor:
        """Draw ``mu + e^(logvar/2) * eps``, differentiable in ``mu`` and ``logvar``."""
        return functional.reparameterize(self.mu, self.logvar.expand_as(self.mu), generator=generator)


class DiagonalLaplace(NamedTuple):
    """A batch of independent Laplace distributions with density e^(-abs(x - mu) / b) / 2b, b = e^log_scale.

    Source: Kotz, Kozubowski & Podgórski 2001, "The Laplace distribution and generalizations", chapter 2.
    """

    mu: Tensor
    """Means, which are the medians too, ``(batch, *)``."""
    log_scale: Tensor
    """Logarithms of the scales, of ``mu``'s shape or broadcasting to it."""

    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``mu + b (e1 - e2)`` with exponential variables e1 and e2; differentiable in both parameters."""
        dtype = torch.promote_types(self.mu.dtype, torch.float32)
        drawn = torch.empty((2, *self.mu.shape), dtype=dtype, device=self.mu.device).exponential_(generator=generator)
        return self.mu + torch.exp(self.log_scale) * (drawn[0] - drawn[1]).to(self.mu.dtype)


class Bernoulli(NamedTuple):
    """A batch of independent Bernoulli distributions."""

    mu: Tensor
    """Means: the probabilities of 1, ``(batch, *)``."""
    logits: Tensor
    """log(mu / (1 - mu)), of the same shape."""

    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw zeros and ones, in ``mu``'s dtype; not differentiable."""
        return torch.bernoulli(self.mu, generator=generator)


class Poisson(NamedTuple):
    """A batch of independent Poisson distributions."""

    mu: Tensor
    """Means, which are the rates, ``(batch, *)``."""

    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw counts, in ``mu``'s dtype; not differentiable."""
        return torch.poisson(self.mu.detach(), generator=generator)


class NegativeBinomial(NamedTuple):
    """A batch of independent negative binomial distributions: of counts of variance mu + mu^2 / theta."""

    mu: Tensor
    """Means, ``(batch, *)``."""
    theta: Tensor
    """Inverse dispersions, of ``mu``'s shape or broadcasting to it."""

    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw counts, in ``mu``'s dtype, as Poisson's of a rate with a gamma distribution; not differentiable."""
        dtype = working_dtype(self.mu, self.theta)
        mu, theta = self.mu.detach().to(dtype), self.theta.detach().to(dtype).expand_as(self.mu)
        rate = standard_gamma(theta, generator) * (mu / theta)
        return torch.poisson(rate, generator=generator).to(self.mu.dtype)


class ZeroInflatedNegativeBinomial(NamedTuple):
    """The same, where some counts dropped out, and are zero.

    Source: Lopez et al. 2018 (doi:10.1038/s41592-018-0229-2).
    """

    mu: Tensor
    """Means of what did not drop out, ``(batch, *)``."""
    theta: Tensor
    """Inverse dispersions, of ``mu``'s shape or broadcasting to it."""
    zi_logits: Tensor
    """Logits of a dropout, likewise."""

    @property
    def mean(self) -> Tensor:
        """Means of all counts, of those that dropped out, too: mu * sigmoid(-zi_logits)."""
        return self.mu * torch.sigmoid(-self.zi_logits)

    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw counts, in ``mu``'s dtype; not differentiable."""
        counts = NegativeBinomial(self.mu, self.theta).sample(generator=generator)
        kept = torch.sigmoid(-self.zi_logits.detach()).expand_as(counts)
        return counts * torch.bernoulli(kept, generator=generator)


class DiscretizedLogistic(NamedTuple):
    """A batch of independent logistic distributions in 256 bins of [-1, 1].

    Source: Salimans et al. 2017 (arXiv:1701.05517), section 2.1.
    """

    mu: Tensor
    """Means of the logistic distributions, ``(batch, *)``."""
    log_scale: Tensor
    """Logarithms of their scales, of ``mu``'s shape or broadcasting to it."""

    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw the middles of bins, k / 127.5 - 1, in ``mu``'s dtype; not differentiable."""
        mu = self.mu.detach().to(working_dtype(self.mu))
        uniform = torch.empty_like(mu).uniform_(torch.finfo(mu.dtype).tiny, 1.0, generator=generator)
        drawn = mu + torch.exp(self.log_scale.detach()).to(mu.dtype) * torch.logit(uniform)
        return (torch.round((drawn.clamp(-1.0, 1.0) + 1.0) * 127.5) / 127.5 - 1.0).to(self.mu.dtype)


Likelihood = (
    DiagonalGaussian
    | DiagonalLaplace
    | Bernoulli
    | Poisson
    | NegativeBinomial
    | ZeroInflatedNegativeBinomial
    | DiscretizedLogistic
)


class GivenScale(NamedTuple):
    """The scale that is beside a mean."""

    scale: Tensor | float
    """A tensor, or a number, which the scale is given by."""
    mean: Tensor
    form: Form
    """What that says of the scale."""

    @property
    def log(self) -> Tensor:
        """Its logarithm, in the dtype of what it is given by."""
        if isinstance(self.scale, Tensor) and self.form == PLAIN:
            return self.scale
        return self._found(lambda scale: scale.log)

    @property
    def value(self) -> Tensor:
        """The scale itself, likewise."""
        return self._found(lambda scale: scale.value)

    def _found(self, ask: Callable[[Scale], Any]) -> Tensor:
        if not isinstance(self.scale, Tensor):
            return self.mean.new_full((), ask(Scale(self.scale, self.form)))
        found: Tensor = ask(Scale(self.scale.to(working_dtype(self.scale)), self.form))
        return found.to(self.scale.dtype)


DISTRIBUTIONS: dict[str, Callable[..., Likelihood]] = {
    "gaussian": lambda mean, scale: DiagonalGaussian(mean, scale.log),
    "laplace": lambda median, scale: DiagonalLaplace(median, scale.log),
    "bernoulli": lambda logits, _: Bernoulli(logits.sigmoid(), logits),
    "bernoulli_probs": lambda probabilities, _: Bernoulli(probabilities, probabilities.logit()),
    "mse": lambda mean, _: DiagonalGaussian(mean, mean.new_full((), -math.log(2))),
    "l1": lambda median, _: DiagonalLaplace(median, median.new_zeros(())),
    "poisson": lambda rate, _: Poisson(rate),
    "negative_binomial": lambda mu, theta: NegativeBinomial(mu, theta.value),
    "zero_inflated_negative_binomial": lambda mu, theta, zi_logits: ZeroInflatedNegativeBinomial(
        mu, theta.value, zi_logits
    ),
    "discretized_logistic": lambda mean, scale: DiscretizedLogistic(mean, scale.log),
}
"""Of what the decoder gave (if that is a scale itself, its value); of the `GivenScale` beside it, which some have not;
and of the logits of dropouts: those that the likelihoods' constants make densities of."""


def distribution_of(likelihood: str, form: Form, mean: Tensor, scale: Tensor | float, *zi_logits: Tensor) -> Likelihood:
    """What p(x|z) is, of what the decoder gave: the form is that of its scale."""
    if 0 in LIKELIHOODS[likelihood].scales:
        mean = GivenScale(mean, mean, form).value
    return DISTRIBUTIONS[likelihood](mean, GivenScale(scale, mean, form), *zi_logits)
