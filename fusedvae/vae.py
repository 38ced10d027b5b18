"""The variational autoencoder as a module: any encoder, any decoder, and the fused kernels between them.

    vae = fusedvae.VAE(encoder, decoder, latent_dim=16)
    vae.loss(x).backward()          # the negative evidence lower bound (ELBO)
    images = vae.generate(64)

Source of the model and its bound: Kingma & Welling 2014, "Auto-Encoding Variational Bayes", appendix B; of the bound
of several samples and the estimate of log p(x): Burda, Grosse & Salakhutdinov 2016 (arXiv:1509.00519).
"""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, distributed, nn

from . import functional, networks, ops, pretrained
from .backend.reference import LIKELIHOODS, PLAIN, Form, Formula, Scale, half_of, with_gradient_times, working_dtype
from .functional import ELBOTerms, Latent
from .functional.checks import check_number, check_packed, check_tensor, checked_reductions
from .functional.forms import as_written
from .functional.likelihoods import inputs_of, run_likelihood
from .layout import broadcasts
from .losses import checked_latent_options, checked_recon_options, shown_value
from .torch_private import is_in_forward_of_ddp, register_outputs, standard_gamma
from .typing import (
    Bound,
    Bounds,
    Estimator,
    Generator,
    LikelihoodName,
    LikelihoodScale,
    NormalScale,
    Reduction,
    TermReduction,
)

__all__ = [
    "VAE",
    "Bernoulli",
    "DiagonalGaussian",
    "DiagonalLaplace",
    "DiscretizedLogistic",
    "NegativeBinomial",
    "Poisson",
    "VAEOutput",
    "ZeroInflatedNegativeBinomial",
]

# --- distributions ----------------------------------------------------------------------------------------------------


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
        mu, theta = self.mu.detach(), self.theta.detach().expand_as(self.mu)
        return torch.poisson(standard_gamma(theta, generator) * (mu / theta), generator=generator)


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

_DISTRIBUTIONS: dict[str, Callable[..., Likelihood]] = {
    "gaussian": DiagonalGaussian,
    "laplace": DiagonalLaplace,
    "bernoulli": lambda logits, _: Bernoulli(logits.sigmoid(), logits),
    "bernoulli_probs": lambda probabilities, _: Bernoulli(probabilities, probabilities.logit()),
    "mse": lambda mean, _: DiagonalGaussian(mean, mean.new_full((), -math.log(2))),
    "l1": lambda median, _: DiagonalLaplace(median, median.new_zeros(())),
    "poisson": lambda log_rate, _: Poisson(torch.exp(log_rate)),
    "negative_binomial": lambda mu, log_theta: NegativeBinomial(mu, torch.exp(log_theta)),
    "zero_inflated_negative_binomial": lambda mu, log_theta, zi_logits: ZeroInflatedNegativeBinomial(
        mu, torch.exp(log_theta), zi_logits
    ),
    "discretized_logistic": DiscretizedLogistic,
}
"""What p(x|z) is, of what the decoder gave (if that is a scale itself, of its logarithm), the logarithm of its scale,
which some have not, and the logits of dropouts: those that the likelihoods' constants make densities of."""


# --- the output of a pass ---------------------------------------------------------------------------------------------


class VAEOutput(NamedTuple):
    """All that one pass through a `VAE` computes.

    With several samples, K of them, ``recon_x`` and ``z`` have these in front: ``(K, batch, *)``.
    """

    recon_x: Tensor
    """What p(x|z) has first, of the shape of x: the mean; of "bernoulli", the logits."""
    recon_logvar: Tensor
    """The log-variance of p(x|z), or what the VAE's ``recon_scale`` says, of x's shape or broadcasting to it. 0 of a
    likelihood that has no scale."""
    mu: Tensor
    """Mean of the posterior q(z|x), ``(batch, *latent)``."""
    logvar: Tensor
    """Its log-variance, ``(batch, *latent)``."""
    z: Tensor
    """A sample of the posterior, ``(batch, *latent)``."""
    kl: Tensor
    """KL(q(z|x) ‖ p(z)) of each sample of the batch, ``(batch,)``; for the importance-weighted bound, log q(z|x) -
    log p(z) at each z, ``(K, batch)``."""
    form: tuple[int, int, float | None, float | None, float] | None = None
    """Which likelihood this is, and the form of ``recon_logvar``: positions among those that there are, the bounds of a
    clamp, and eps. In numbers, as exported programs keep no words; None for a Gaussian with a plain log-variance."""
    zi_logits: Tensor | None = None
    """Of "zero_inflated_negative_binomial", the logits of a dropout, of x's shape or broadcasting to it."""

    @overload
    def loss(
        self,
        x: Tensor,
        *,
        beta: float | Tensor = ...,
        reduction: Reduction = ...,
        full: bool = ...,
        weight: Tensor | None = ...,
        grad_scale: float | Tensor | None = ...,
        return_terms: Literal[False] = ...,
        inplace: bool = ...,
    ) -> Tensor: ...

    @overload
    def loss(
        self,
        x: Tensor,
        *,
        beta: float | Tensor = ...,
        reduction: Reduction = ...,
        full: bool = ...,
        weight: Tensor | None = ...,
        grad_scale: float | Tensor | None = ...,
        return_terms: Literal[True],
        inplace: bool = ...,
    ) -> ELBOTerms: ...

    @overload
    def loss(
        self,
        x: Tensor,
        *,
        beta: float | Tensor = ...,
        reduction: Reduction = ...,
        full: bool = ...,
        weight: Tensor | None = ...,
        grad_scale: float | Tensor | None = ...,
        return_terms: bool,
        inplace: bool = ...,
    ) -> Tensor | ELBOTerms: ...

    def loss(
        self,
        x: Tensor,
        *,
        beta: float | Tensor = 1.0,
        reduction: Reduction = "batchmean",
        full: bool = False,
        weight: Tensor | None = None,
        grad_scale: float | Tensor | None = None,
        return_terms: bool = False,
        inplace: bool = False,
    ) -> Tensor | ELBOTerms:
        """The negative bound of ``x`` that this pass is of; arguments as `VAE.loss` takes them.

        Under a wrapper that synchronises gradients, this is how a loss is to be computed: ``wrapped(x).loss(x)``.
        """
        kind = _Kind.of(self.form)
        return _negative_bound(
            _Decoded(self.recon_x, self.recon_logvar if kind.formula.pairs else 0.0, kind, self.zi_logits),
            x,
            Latent(self.z, self.kl),
            self.z.dim() > self.mu.dim(),
            beta=beta,
            reduction=reduction,
            full=full,
            weight=weight,
            grad_scale=grad_scale,
            return_terms=return_terms,
            inplace=inplace,
        )


class _Kind(NamedTuple):
    """Which likelihood p(x|z) is, and the form of its scale, as users write them."""

    likelihood: LikelihoodName
    scale: LikelihoodScale | None
    clamp: Bounds
    eps: float

    @property
    def formula(self) -> Formula:
        return LIKELIHOODS[self.likelihood]

    @property
    def form(self) -> Form:
        """That of its scale; any, where there is none."""
        return checked_recon_options(*self) or PLAIN

    def numbers(self) -> tuple[int, int, float | None, float | None, float] | None:
        """The same as `VAEOutput` has it."""
        if self == _PLAIN_GAUSSIAN:  # in a moment
            return None
        scales = list(self.formula.forms)
        low, high = self.clamp or (None, None)
        position = 0 if self.scale is None else scales.index(self.scale)
        found = (list(LIKELIHOODS).index(self.likelihood), position, low, high, self.eps)
        return None if found == (0, 0, None, None, 0.0) else found

    @classmethod
    def of(cls, numbers: tuple[int, int, float | None, float | None, float] | None) -> _Kind:
        if numbers is None:
            return _PLAIN_GAUSSIAN
        position, scale, low, high, eps = numbers
        likelihood: Any
        likelihood, formula = list(LIKELIHOODS.items())[position]
        clamp = None if (low, high) == (None, None) else (low, high)
        form: Any = list(formula.forms)[scale] if formula.scales else None
        return cls(likelihood, form, clamp, eps)


_PLAIN_GAUSSIAN = _Kind("gaussian", None, None, 0.0)


class _Decoded(NamedTuple):
    """p(x|z) as the functional interface takes it; with several samples, these in front of the batch."""

    mean: Tensor
    scale: Tensor | float | None
    """0.0 of a likelihood that has none; None where it is packed in the mean, along the channels."""
    kind: _Kind
    zi_logits: Tensor | None = None

    def nll(
        self, x: Tensor, full: bool, weight: Tensor | None, reduction: TermReduction, inplace: bool = False
    ) -> Tensor:
        """-log p(x|z) of several samples: a total over all of them, or with "none" ``(samples, batch)``.

        The kernels read each element of ``x``, expanded to the samples, where it lies.
        """
        check_tensor("x", x, integers=True)
        targets = x.expand(len(self.mean), *x.shape)
        return run_likelihood(
            self.kind.likelihood,
            inputs_of(self.kind.likelihood, self.mean, targets, self.scale, None, None, self.zi_logits),
            as_written(self.kind.scale, self.kind.clamp, self.kind.eps),
            full,
            weight,
            reduction,
            tuple(range(2, targets.dim())) if reduction == "none" else None,
            2,
            None,
            inplace,
        )


def _negative_bound(
    p: _Decoded,
    x: Tensor,
    latent: Latent,
    is_of_several: bool,
    *,
    beta: float | Tensor,
    reduction: Reduction,
    full: bool,
    weight: Tensor | None,
    grad_scale: float | Tensor | None,
    return_terms: bool,
    inplace: bool,
) -> Tensor | ELBOTerms:
    """The negative ELBO; or the importance-weighted bound, if the divergence is one at each of the samples.

    Args:
        p: of one sample, or of several, these in front.
        x: data, ``(batch, *)``.
        latent: the samples; the divergence ``(batch,)``, or at each of several ``(samples, batch)``.
        is_of_several: whether samples are in front.
        beta, reduction, full, weight, grad_scale, return_terms, inplace: as `VAE.loss` takes them.
    """
    z, kl = latent
    if kl.dim() == 2:
        return _negative_importance_weighted_bound(
            p, x, kl, beta, reduction, full, weight, grad_scale, return_terms=return_terms, inplace=inplace
        )
    if reduction not in ("batchmean", "sum", "none"):
        _, of_kl = checked_reductions(reduction)
        if of_kl in ("mean", "weighted_mean"):
            # A mean over elements of what has been summed over all but the batch.
            kl = kl / z.shape[2 if is_of_several else 1 :].numel()
    if not is_of_several:
        return functional.elbo_loss(
            p.mean,
            x,
            None,
            None,
            p.scale,
            likelihood=p.kind.likelihood,
            recon_scale=p.kind.scale,
            recon_clamp=p.kind.clamp,
            recon_eps=p.kind.eps,
            zi_logits=p.zi_logits,
            kl=kl,
            beta=beta,
            full=full,
            weight=weight,
            reduction=reduction,
            grad_scale=grad_scale,
            return_terms=return_terms,
            inplace=inplace,
        )
    check_number("beta", beta)
    of_nll, of_kl = checked_reductions(reduction)
    if of_nll == "none":
        nll = p.nll(x, full, weight, "none", inplace).mean(0)
    elif of_nll in ("batchmean", "sum"):
        nll = p.nll(x, full, weight, "sum", inplace) / (p.mean.shape[0] * (x.shape[0] if of_nll == "batchmean" else 1))
    else:
        nll = p.nll(x, full, weight, of_nll, inplace)
    if of_kl != "none":
        kl = kl.sum() if of_kl == "sum" else kl.mean()
    terms = ELBOTerms(nll + (kl * beta).to(kl.dtype), nll, kl)
    terms = ELBOTerms(*[_with_gradient_times(value, grad_scale) for value in terms])
    return terms if return_terms else terms.loss


def _negative_importance_weighted_bound(
    p: _Decoded,
    x: Tensor,
    log_ratio: Tensor,
    beta: float | Tensor,
    reduction: Reduction,
    full: bool,
    weight: Tensor | None,
    grad_scale: float | Tensor | None,
    *,
    return_terms: bool,
    inplace: bool,
) -> Tensor:
    """-log mean exp(log p(x|z) - log_ratio) over the samples, with log_ratio = log q(z|x) - log p(z) at each."""
    if isinstance(beta, Tensor) or beta != 1:
        raise ValueError(f"beta: expected 1 with bound='iwae', got {_shown_number(beta)}")
    if reduction not in ("batchmean", "sum", "none"):
        raise ValueError(f"reduction: expected 'batchmean', 'sum' or 'none' with bound='iwae', got {reduction!r}")
    if return_terms:
        raise ValueError("return_terms: expected False with bound='iwae', which is no sum of terms")
    bound = functional.importance_weighted_bound(-(p.nll(x, full, weight, "none", inplace) + log_ratio))
    value = -bound if reduction == "none" else -(bound.mean() if reduction == "batchmean" else bound.sum())
    return _with_gradient_times(value, grad_scale)


def _with_gradient_times(value: Tensor, factor: float | Tensor | None) -> Tensor:
    """The value itself, whose gradient is multiplied by a factor, if there is one."""
    if factor is None:
        return value
    check_number("grad_scale", factor)
    scaled: Tensor = with_gradient_times(value, factor)
    return scaled


def _shown_number(number: float | Tensor) -> str:
    return "a tensor" if isinstance(number, Tensor) else repr(number)


# --- the module -------------------------------------------------------------------------------------------------------

_ELEMENTS_AT_A_TIME = 2**22
"""How many elements of x, those of all samples together, an estimate of log p(x) has in memory unless told."""


class VAE(nn.Module):
    """A variational autoencoder with a Gaussian posterior q(z|x), any of the likelihoods p(x|z) and a Gaussian prior.

    Args:
        encoder: a module from x to the posterior q(z|x): one packed tensor ``(batch, 2 * C, *)``, the means
            and then the log-variances along dimension 1, or a pair (mu, logvar) of ``(batch, C, *)`` each.
        decoder: a module from z to the likelihood p(x|z). What it gives is said by ``likelihood`` and ``recon_logvar``.
        latent_dim: number of latent variables ``C``, or the sizes ``(C, height, width)`` of a spatial latent.
            A size may be None for an encoder that takes images of any size; `generate` then cannot know
            it.
        likelihood: p(x|z), as `fusedvae.functional.elbo_loss` has it: "gaussian" (default) or "laplace", which
            have a scale; "bernoulli", of which the decoder gives logits, or "bernoulli_probs", probabilities; "mse",
            the squared error, which is a Gaussian of variance 1/2; "l1", the absolute error, which is a Laplace
            distribution of scale 1; "poisson", of which the decoder gives the rate, in the form ``recon_scale``;
            "negative_binomial", a mean and theta; "zero_inflated_negative_binomial", these and, as the last of a tuple,
            the logits of a dropout; "discretized_logistic", a mean and a log-scale. Where there is no scale, the
            decoder gives one tensor of x's shape.
        recon_logvar: where the log-variance of p(x|z) comes from, or what else ``recon_scale`` says (of a negative
            binomial likelihood theta; an ``nn.Parameter`` of one a gene is scvi-tools' ``px_r``).

            * ``None`` (default): the decoder gives it, in a packed tensor ``(batch, 2 * channels, *)`` or as
              the second of a pair (mean, logvar), which may be anything that broadcasts to the mean.
            * anything else: the decoder gives the mean only, a tensor of x's shape, and the log-variance is
              a float (fixed), a tensor (fixed, kept in the state_dict), an ``nn.Parameter`` (learned; give it
              shape ``(channels, 1, 1)`` for one value a channel), or ``"learned"`` (one learned number, of shape
              ``(1,)``, at first 0; 1 if it is a scale itself, for which 0 is none).
        recon_scale, recon_clamp, recon_eps: the form of that scale, as in `fusedvae.functional`: "logvar"
            (default), "logstd", "std", "var" or "softplus"; of a Laplace or discretized logistic likelihood "logscale"
            (default), "scale" or "softplus"; of a negative binomial one "theta" (default), "logtheta" or "softplus";
            of the rate of a Poisson distribution "rate" (default), "lograte" or "softplus"; bounds (low, high) that it
            is clamped to; and what is added to what the form names.
        scale, clamp, eps: the form of what the encoder gives beside the mean, likewise.
        prior: p(z): None for N(0, I); a pair (mean, log-variance) of numbers, tensors (fixed, kept in the state_dict
            as ``prior_mu`` and ``prior_logvar``) or ``nn.Parameter`` (learned), each of a sample's latent shape or
            broadcasting to it; or a module that gives such a pair, or a packed tensor ``(batch, 2 * C, *)``, for the
            condition that it is called with.
        prior_scale, prior_clamp, prior_eps: the form of what the prior has beside its mean. Without a ``prior_eps``,
            it is ``eps`` where that is a tensor of the same form, else 0.

    It is ``recon_logvar``, never the shape of a tensor, that tells a packed output from a mean: the two look
    alike where no x is at hand to compare with. `loss` and `forward` do have x, and say so when
    the decoder's output does not fit it.

    Methods take a ``condition`` for conditional models (Sohn, Lee & Yan 2015): a tensor, or whatever else the modules
    take. Unless it is None they are called with it: ``encoder(x, condition)``, ``decoder(z, condition)``,
    ``prior(condition)``. Where there are several samples of z, those of its tensors whose first dimension is the
    batch are repeated for the decoder, also in tuples, lists and dicts.

    The state_dict holds the encoder's, the decoder's and the prior's entries and, if they are tensors,
    ``recon_logvar``, ``prior_mu`` and ``prior_logvar``: the same under every backend. Modules keep their mode: call
    ``eval()`` and use ``torch.no_grad()`` as with any other.

    Raises:
        TypeError: an argument, or what the encoder or decoder returned, is not of the kinds listed above.
        ValueError: sizes do not fit: those of ``latent_dim``, of the posterior, of the prior, or of the
            reconstruction; or an option has no such value.
    """

    recon_logvar: Tensor | float | None
    prior: nn.Module | None
    prior_mu: Tensor | float | None
    prior_logvar: Tensor | float | None

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int | Sequence[int | None],
        *,
        likelihood: LikelihoodName = "gaussian",
        recon_logvar: float | Tensor | Literal["learned"] | None = None,
        recon_scale: LikelihoodScale | None = None,
        recon_clamp: Bounds = None,
        recon_eps: float = 0.0,
        scale: NormalScale = "logvar",
        clamp: Bounds = None,
        eps: float = 0.0,
        prior: nn.Module | tuple[Tensor | float, Tensor | float] | None = None,
        prior_scale: NormalScale = "logvar",
        prior_clamp: Bounds = None,
        prior_eps: float | None = None,
    ) -> None:
        super().__init__()
        for name, module in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name}: expected a torch.nn.Module, got {type(module).__name__}")
        form = checked_recon_options(likelihood, recon_scale, recon_clamp, recon_eps)
        checked_latent_options(scale, clamp, eps, prior_scale, prior_clamp, prior_eps)
        if not LIKELIHOODS[likelihood].pairs and recon_logvar is not None:
            raise ValueError(f"recon_logvar: expected None, as the {likelihood} likelihood has no scale")
        self.encoder = encoder
        self.decoder = decoder
        self.latent_shape = _latent_shape(latent_dim)
        self.likelihood = likelihood
        self.recon_scale, self.recon_clamp, self.recon_eps = recon_scale, recon_clamp, recon_eps
        self.scale, self.clamp, self.eps = scale, clamp, eps
        self.prior_scale, self.prior_clamp, self.prior_eps = prior_scale, prior_clamp, prior_eps
        if isinstance(recon_logvar, str):
            if recon_logvar != "learned":
                raise ValueError(f"recon_logvar: expected None, a number, a tensor or 'learned', got {recon_logvar!r}")
            assert form is not None
            first = 1.0 if form.map == "linear" else 0.0
            recon_logvar = nn.Parameter(torch.full((1,), first))  # FSDP takes no 0-dim parameters
            self.register_load_state_dict_pre_hook(_with_a_dimension)
        if not (recon_logvar is None or _is_number(recon_logvar) or isinstance(recon_logvar, Tensor)):
            raise TypeError(
                f"recon_logvar: expected None, a number, a tensor or 'learned', got {type(recon_logvar).__name__}"
            )
        self._register_value("recon_logvar", recon_logvar)
        if prior is None or isinstance(prior, nn.Module):
            self.prior, self.prior_mu, self.prior_logvar = prior, None, None
        elif isinstance(prior, (tuple, list)) and len(prior) == 2:
            self.prior = None
            for name, value in zip(("prior_mu", "prior_logvar"), prior, strict=True):
                if not (_is_number(value) or isinstance(value, Tensor)):
                    raise TypeError(f"{name}: expected a number or a tensor, got {type(value).__name__}")
                if isinstance(value, Tensor) and not _broadcasts(value.shape, (1, *self.latent_shape)):
                    raise ValueError(
                        f"{name}: expected a shape that broadcasts to latent_dim {_shown(self.latent_shape)}, "
                        f"got {tuple(value.shape)}"
                    )
                self._register_value(name, value)
        else:
            raise TypeError(f"prior: expected None, a pair or a torch.nn.Module, got {type(prior).__name__}")

    def _register_value(self, name: str, value: Tensor | float | None) -> None:
        """Keep a number, a tensor that is fixed or one that is learned."""
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(name, value)
        else:
            setattr(self, name, value if value is None or isinstance(value, Tensor) else float(value))

    def encode(self, x: Tensor, condition: Any = None) -> DiagonalGaussian:
        """The posterior q(z|x) of ``x``: a pair (mu, logvar), each ``(batch, *latent)``.

        The second is a log-variance, in whatever form the encoder gives it.
        """
        return self._gaussian(self._posterior(x, condition))

    def decode(self, z: Tensor, condition: Any = None) -> Likelihood:
        """The likelihood p(x|z) of ``z``, ``(batch, *latent)``; its ``mu``, the mean, has the shape of x.

        A `DiagonalGaussian` (mu, logvar) for "gaussian" and "mse", a `DiagonalLaplace` (mu, log_scale) for "laplace"
        and "l1", a `Bernoulli` (mu, logits) for the two of these, and a `Poisson` (mu), `NegativeBinomial` (mu, theta),
        `ZeroInflatedNegativeBinomial` (mu, theta, zi_logits) or `DiscretizedLogistic` (mu, log_scale). The second has
        the mean's shape, or broadcasts to it, and is a log-variance, or logarithm of a scale, in whatever form the
        decoder gives it.
        """
        return self._distribution(self._decoded(z, condition))

    def forward(
        self,
        x: Tensor,
        condition: Any = None,
        *,
        samples: int = 1,
        bound: Bound = "elbo",
        offset: int = 0,
        generator: Generator = None,
        noise: Tensor | None = None,
    ) -> VAEOutput:
        """Encode ``x``, sample the posterior, decode the samples.

        To train under a wrapper that must see every call (DistributedDataParallel, FSDP, accelerate's), call the
        wrapper and its output: ``wrapped(x).loss(x)``. Elsewhere `loss` is the same in one call.

        Args:
            x, condition, offset, generator, noise: as for `loss`.
            samples, bound: what the output's loss is to be, as for `loss`.
        """
        posterior, latent, p = self._pass(x, condition, samples, bound, offset, generator, noise)
        recon_x, recon_logvar = p.mean, p.scale
        if recon_logvar is None:
            recon_x, recon_logvar = recon_x.chunk(2, dim=recon_x.dim() - x.dim() + 1)
        elif isinstance(recon_logvar, nn.Parameter):
            # A function of the parameter: wrappers find out from outputs what was used, and may take it away then.
            recon_logvar = recon_logvar.clone()
        elif not isinstance(recon_logvar, Tensor):
            # Half precision would round it: the loss of the output is that of the module.
            recon_logvar = recon_x.new_full((), recon_logvar, dtype=torch.promote_types(recon_x.dtype, torch.float32))
        return VAEOutput(
            recon_x, recon_logvar, *self._gaussian(posterior), latent.z, latent.kl, p.kind.numbers(), p.zi_logits
        )

    if TYPE_CHECKING:

        def __call__(
            self,
            x: Tensor,
            condition: Any = None,
            *,
            samples: int = 1,
            bound: Bound = "elbo",
            offset: int = 0,
            generator: Generator = None,
            noise: Tensor | None = None,
        ) -> VAEOutput: ...

    @overload
    def loss(
        self,
        x: Tensor,
        condition: Any = ...,
        *,
        samples: int = ...,
        bound: Bound = ...,
        beta: float | Tensor = ...,
        reduction: Reduction = ...,
        full: bool = ...,
        weight: Tensor | None = ...,
        grad_scale: float | Tensor | None = ...,
        return_terms: Literal[False] = ...,
        inplace: bool = ...,
        offset: int = ...,
        generator: Generator = ...,
        noise: Tensor | None = ...,
    ) -> Tensor: ...

    @overload
    def loss(
        self,
        x: Tensor,
        condition: Any = ...,
        *,
        samples: int = ...,
        bound: Bound = ...,
        beta: float | Tensor = ...,
        reduction: Reduction = ...,
        full: bool = ...,
        weight: Tensor | None = ...,
        grad_scale: float | Tensor | None = ...,
        return_terms: Literal[True],
        inplace: bool = ...,
        offset: int = ...,
        generator: Generator = ...,
        noise: Tensor | None = ...,
    ) -> ELBOTerms: ...

    @overload
    def loss(
        self,
        x: Tensor,
        condition: Any = ...,
        *,
        samples: int = ...,
        bound: Bound = ...,
        beta: float | Tensor = ...,
        reduction: Reduction = ...,
        full: bool = ...,
        weight: Tensor | None = ...,
        grad_scale: float | Tensor | None = ...,
        return_terms: bool,
        inplace: bool = ...,
        offset: int = ...,
        generator: Generator = ...,
        noise: Tensor | None = ...,
    ) -> Tensor | ELBOTerms: ...

    def loss(
        self,
        x: Tensor,
        condition: Any = None,
        *,
        samples: int = 1,
        bound: Bound = "elbo",
        beta: float | Tensor = 1.0,
        reduction: Reduction = "batchmean",
        full: bool = False,
        weight: Tensor | None = None,
        grad_scale: float | Tensor | None = None,
        return_terms: bool = False,
        inplace: bool = False,
        offset: int = 0,
        generator: Generator = None,
        noise: Tensor | None = None,
    ) -> Tensor | ELBOTerms:
        """The negative evidence lower bound of ``x``, in nats: NLL + beta * KL.

        Args:
            x: data, ``(batch, *)``.
            condition: what the modules take beside their inputs: see `VAE`.
            samples: how many samples of the posterior there are of each sample of the batch. The decoder sees them all
                as one batch, the first sample of each first.
            bound: "elbo", the NLL averaged over the samples; or "iwae", -log mean exp of log p(x|z) + log p(z) -
                log q(z|x) over them: tighter, the more there are (Burda et al. 2016, equation 8).
            beta: weight of the KL term, a float or a 0-dim tensor (Higgins et al. 2017); 1 with "iwae".
            reduction: "batchmean" (mean over the batch), "sum", or "none" (one value per sample): within a sample both
                terms are sums. Or "mean" (over elements of x, and of the latent), "weighted_mean", or a pair, of
                the NLL's and of the KL's: these not with "iwae".
            full: add the NLL's constant, log(2 pi) / 2 per element of x for a Gaussian: nats of a normalised density.
            weight: of the elements of x: a float or bool tensor that broadcasts to its shape. Where it is 0, values and
                gradients of the likelihood are exactly 0.
            grad_scale: what gradients are made times, while the value is what it is: a number or a 0-dim tensor.
            return_terms: return ``ELBOTerms(loss, nll, kl)``, reduced alike, instead of the loss; not with "iwae".
            inplace: write the gradient of what the decoder gives first into its memory, as `fusedvae.functional`
                says. ValueError of a decoder whose output is kept, or seen, by something else.
            offset: position of the first element in the noise stream: a process that holds the rows from r0 of a batch
                passes r0 times the number of latent variables, and gets the noise that one process would have given
                them. With several samples, which lie in front of the batch, pass ``noise``.
            generator: where the noise comes from; torch's default generator if None.
            noise: the noise itself, in the place of the generator's: of z's shape, ``(batch, *latent)``.

        Raises:
            TypeError, ValueError: an argument is not of these, does not go with the bound, or does not fit.

        Where several processes train together, it warns once: it goes past a wrapper around the module, which then
        synchronises no gradients. Call the wrapper, ``wrapped(x).loss(x)``, instead. Within a module that is wrapped as
        a whole, such as a LightningModule's ``training_step``, it is right and says nothing.
        """
        _warn_if_unsynchronised()
        posterior, latent, p = self._pass(x, condition, samples, bound, offset, generator, noise)
        return _negative_bound(
            p,
            x,
            latent,
            latent.z.dim() > posterior[0].dim(),
            beta=beta,
            reduction=reduction,
            full=full,
            weight=weight,
            grad_scale=grad_scale,
            return_terms=return_terms,
            inplace=inplace,
        )

    @torch.no_grad()
    def log_likelihood(
        self,
        x: Tensor,
        condition: Any = None,
        *,
        samples: int = 5000,
        chunk: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Estimate log p(x), or log p(x|condition), by importance sampling: nats, the likelihood's constant included.

        log mean exp of log p(x|z) + log p(z) - log q(z|x) over samples z of q(z|x): log p(x) in the limit of many, and
        on average below it, the less the more there are. Source: Burda et al. 2016 (arXiv:1509.00519), equation 8 and
        section 5, where there are 5000.

        Args:
            x: data, ``(batch, *)``.
            condition: what the modules take beside their inputs: see `VAE`.
            samples: how many samples of the posterior there are of each sample of the batch.
            chunk: how many of them are decoded at a time. It bounds the memory, and changes nothing but rounding.
                By default chunks have 4 million elements of x, or one sample.
            generator: where the noise comes from; torch's default generator if None.

        Returns:
            ``(batch,)``, float32 at least, without a gradient.

        Raises:
            TypeError, ValueError: ``samples`` or ``chunk`` is not a positive integer; or the modules' outputs do not
                fit, as for `loss`.
        """
        samples = _checked_count("samples", samples)
        chunk = None if chunk is None else _checked_count("chunk", chunk)
        posterior = self._posterior(x, condition)
        prior = self._prior(condition, _shape_of(posterior))
        if chunk is None:
            chunk = max(1, _ELEMENTS_AT_A_TIME // max(x.numel(), 1))
        mu, scale = posterior
        elements = mu.numel() // (2 if scale is None else 1)
        # All chunks are of one stream of noise, each from where the one before ended.
        seed = int(ops.draw_seed(x.device, generator, by_dispatcher=False))
        stream = torch.Generator(x.device)
        total = None
        for start in range(0, samples, chunk):
            count = min(chunk, samples - start)
            latent = self._latent(posterior, prior, count, "sample", stream.manual_seed(seed), start * elements)
            p = self._decoded(latent.z, condition, of=x, samples=count)
            log_sum = torch.logsumexp(-(p.nll(x, True, None, "none") + latent.kl), 0)
            total = log_sum if total is None else torch.logaddexp(total, log_sum)
        assert total is not None
        return total - math.log(samples)

    def reconstruct(
        self, x: Tensor, condition: Any = None, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """What the model makes of ``x``; a tensor of its shape.

        By default the mean of p(x|z) at the posterior's mean; with ``sample`` a draw from p(x|z) with z drawn
        from q(z|x).
        """
        posterior = self.encode(x, condition)
        z = posterior.sample(generator=generator) if sample else posterior.mu
        return self._image(self._distribution(self._decoded(z, condition, of=x)), sample, generator)

    def generate(
        self, n: int, condition: Any = None, *, sample: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Decode ``n`` draws from the prior; a tensor ``(n, *)``.

        Each is the mean of p(x|z), as usually shown, or with ``sample`` a draw from p(x|z). A condition is one of a
        batch of ``n``. The draws from the prior are of the package's noise, as samples of the posterior are: the same
        for a seed on every device. A generator must be on the model's device with ``sample``, where the likelihood is
        no Gaussian.
        """
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
        shape: tuple[int | None, ...] = (_checked_count("n", n), *self.latent_shape)
        like = next(self.decoder.parameters(), torch.empty(()))
        prior = self._prior_distribution(condition, shape, like)
        if _fits(prior.mu.shape, shape):  # it may know the sizes that were left open
            shape = tuple(prior.mu.shape)
        sizes = [size for size in shape if size is not None]
        if len(sizes) < len(shape):
            raise ValueError(
                f"latent_dim: generate needs every size, got {_shown(self.latent_shape)}; call "
                "decode(torch.randn(...)) with the sizes wanted"
            )
        for moment in prior:
            _check_prior(moment.shape, sizes)
        moments = [moment.expand(sizes) for moment in prior]
        z = functional.reparameterize(*moments, generator=generator).to(like.dtype)
        return self._image(self.decode(z, condition), sample, generator)

    def embed(self, x: Tensor, condition: Any = None) -> Tensor:
        """Features of ``x`` for other uses: the posterior means, ``(batch, number of latent variables)``."""
        return self.encode(x, condition).mu.flatten(1)

    # --- models as files ---

    def save_pretrained(
        self, directory: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **options: Any
    ) -> str | None:
        """Write the model to ``directory``: ``config.json``, and its tensors in ``model.safetensors`` (without
        safetensors: ``model.pt``). `from_pretrained` reads both. Other files there are left alone.

        Args:
            push_to_hub: also upload it, and return what `push_to_hub` does, which takes the other options.
            repo_id: its name there; by default that of the directory.
        """
        if options and not push_to_hub:
            raise TypeError(f"{next(iter(options))}: expected with push_to_hub=True only, which takes it")
        pretrained.save(self, Path(directory))
        return self.push_to_hub(repo_id or Path(directory).resolve().name, **options) if push_to_hub else None

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        prior: nn.Module | None = None,
        **options: Any,
    ) -> VAE:
        """The model that `save_pretrained` wrote, or ``fusedvae train``, on the CPU, in evaluation mode.

        No code of a file is run: networks of `fusedvae.networks` are made again as the file says; in the place of
        modules of another kind, pass new ones, which the values of the saved ones are copied to.

        Args:
            directory: where the model is; or its name on the Hugging Face Hub, if there is no such directory and
                huggingface_hub is installed.
            encoder, decoder, prior: modules of kinds that are not fusedvae's own.
            options: ``revision``, ``token``, ``cache_dir`` and others that ``huggingface_hub.snapshot_download`` takes.

        Raises:
            TypeError: ``directory`` is neither a path nor a name.
            FileNotFoundError: there is no model, or the Hub cannot be asked for it.
            ValueError: it is damaged, or one of its modules must be passed: the message says which.
            RuntimeError: the tensors do not fit the modules.
        """
        if not isinstance(directory, (str, os.PathLike)):
            raise TypeError(f"directory: expected a path or a name, got {type(directory).__name__}")
        path = Path(directory)
        if options or not path.is_dir():
            path = pretrained.downloaded(str(directory), **options)
        return pretrained.load(cls, path, {"encoder": encoder, "decoder": decoder, "prior": prior})

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model to the Hugging Face Hub, as what `save_pretrained` writes and a card that says how to
        use it, by huggingface_hub's own mixin; returns the address of the commit.

        Args:
            repo_id: "owner/model"; made if there is none.
            options: ``private``, ``token``, ``commit_message``, ``branch``, ``create_pr`` and what else
                ``huggingface_hub.ModelHubMixin.push_to_hub`` takes.

        Raises:
            ImportError: huggingface_hub is not installed.
        """
        return pretrained.upload(self, repo_id, **options)

    def extra_repr(self) -> str:
        latent_dim = self.latent_shape[0] if len(self.latent_shape) == 1 else self.latent_shape
        shown = [f"latent_dim={latent_dim}"]
        if self.likelihood != "gaussian":
            shown.append(f"likelihood={self.likelihood!r}")
        if LIKELIHOODS[self.likelihood].pairs:
            shown.append(f"recon_logvar={shown_value(self.recon_logvar)}")
        if self.prior_mu is not None:
            shown.append(f"prior=({shown_value(self.prior_mu)}, {shown_value(self.prior_logvar)})")
        for name in pretrained.OPTIONS:
            value = getattr(self, name)
            if name != "likelihood" and value != inspect.signature(VAE).parameters[name].default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)

    @staticmethod
    def _image(p: Likelihood, sample: bool, generator: torch.Generator | None) -> Tensor:
        return p.sample(generator=generator) if sample else p.mu

    # --- steps of a pass ---

    def _pass(
        self,
        x: Tensor,
        condition: Any,
        samples: int,
        bound: str,
        offset: int,
        generator: Generator,
        noise: Tensor | None,
    ) -> tuple[tuple[Tensor, Tensor | None], Latent, _Decoded]:
        """Encode, sample and decode. One sample of an ELBO has no dimension of its own; others lie in front."""
        if bound not in ("elbo", "iwae"):
            raise ValueError(f"bound: expected 'elbo' or 'iwae', got {bound!r}")
        draws: int | None = _checked_count("samples", samples)
        if draws == 1 and bound == "elbo":
            draws = None
        posterior = self._posterior(x, condition)
        estimator: Estimator = "analytic" if bound == "elbo" else "sample"
        prior = self._prior(condition, _shape_of(posterior))
        latent = self._latent(posterior, prior, draws, estimator, generator, offset, noise)
        return posterior, latent, self._decoded(latent.z, condition, of=x, samples=draws)

    def _posterior(self, x: Tensor, condition: Any) -> tuple[Tensor, Tensor | None]:
        """Run the encoder and check what it gives against ``latent_dim``."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        if x.ndim == 0:
            raise ValueError("x: expected a batch dimension, got a 0-dim tensor")
        mu, logvar = _mean_and_scale("encoder", _called("encoder", self.encoder, x, condition=condition))
        if logvar is None:
            channels, *rest = self.latent_shape
            expected = (x.shape[0], None if channels is None else 2 * channels, *rest)
            if not _fits(mu.shape, expected):
                hint = (
                    "; one that packs along another dimension gives a pair, chunk(2, dim=...)" if mu.dim() > 2 else ""
                )
                raise ValueError(
                    f"encoder: expected a packed posterior of shape {_shown(expected)}, means and "
                    f"log-variances along dimension 1 for latent_dim {_shown(self.latent_shape)}; "
                    f"got {tuple(mu.shape)}{hint}"
                )
        else:
            expected = (x.shape[0], *self.latent_shape)
            for name, tensor in (("mu", mu), ("logvar", logvar)):
                if not _fits(tensor.shape, expected):
                    raise ValueError(
                        f"encoder: expected {name} of shape {_shown(expected)}, the batch and latent_dim; "
                        f"got {tuple(tensor.shape)}"
                    )
        return mu, logvar

    def _prior(
        self, condition: Any, shape: Sequence[int | None]
    ) -> tuple[Tensor | float, Tensor | float | None] | None:
        """The prior's mean and scale, or both packed and None, of latents of a shape; None for N(0, I)."""
        if self.prior is not None:
            mean, scale = _mean_and_scale("prior", _called("prior", self.prior, condition=condition))
            if scale is None:
                check_packed("prior", mean, 1)
                half = half_of(mean.shape, 1)
                _check_prior(half, shape)
                if len(half) != len(shape) or shape[1] not in (None, half[1]):
                    raise ValueError(
                        f"prior: expected one packed tensor to have twice the latent's size {_shown(shape)} along "
                        f"dimension 1, means and log-variances, got {tuple(mean.shape)}"
                    )
            else:
                _check_prior(mean.shape, shape)
                _check_prior(scale.shape, shape)
            return mean, scale
        return None if self.prior_mu is None else (self.prior_mu, self.prior_logvar)

    def _latent(
        self,
        posterior: tuple[Tensor, Tensor | None],
        prior: tuple[Tensor | float, Tensor | float | None] | None,
        samples: int | None,
        estimator: Estimator,
        generator: Generator,
        offset: int = 0,
        noise: Tensor | None = None,
    ) -> Latent:
        prior_mu, prior_logvar = (None, None) if prior is None else prior
        return functional.latent(
            *posterior,
            prior_mu,
            prior_logvar,
            scale=self.scale,
            clamp=self.clamp,
            eps=self.eps,
            prior_scale=self.prior_scale,
            prior_clamp=self.prior_clamp,
            prior_eps=self.prior_eps,
            estimator=estimator,
            samples=samples,
            offset=offset,
            generator=generator,
            noise=noise,
        )

    def _decoded(self, z: Tensor, condition: Any, *, of: Tensor | None = None, samples: int | None = None) -> _Decoded:
        """Run the decoder on one sample, or on several that lie in front, and take these apart again."""
        kind = _Kind(self.likelihood, self.recon_scale, self.recon_clamp, self.recon_eps)
        if samples is None:
            mean, scale, zi_logits = self._likelihood(z, condition, of)
            return _Decoded(mean, scale, kind, zi_logits)
        mean, scale, zi_logits = self._likelihood(z.flatten(0, 1), _repeated(condition, samples, z.shape[1]), of)
        if isinstance(scale, Tensor) and scale.dim() == mean.dim() and len(scale) == len(mean):
            scale = scale.unflatten(0, z.shape[:2])
        if zi_logits is not None and zi_logits.dim() == mean.dim() and len(zi_logits) == len(mean):
            zi_logits = zi_logits.unflatten(0, z.shape[:2])
        return _Decoded(mean.unflatten(0, z.shape[:2]), scale, kind, zi_logits)

    def _likelihood(
        self, z: Tensor, condition: Any, of: Tensor | None
    ) -> tuple[Tensor, Tensor | float | None, Tensor | None]:
        """Run the decoder and check what it gives against ``recon_logvar`` and, if there are some, the data."""
        output = _called("decoder", self.decoder, z, condition=condition)
        zi_logits: Tensor | None = None
        if self.likelihood == "zero_inflated_negative_binomial":
            output, zi_logits = _with_zi_logits(output)
        mean, logvar = _mean_and_scale("decoder", output)
        has_scale = len(LIKELIHOODS[self.likelihood].pairs) > 0
        packed = has_scale and logvar is None and self.recon_logvar is None
        if logvar is not None and not has_scale:
            raise TypeError(
                f"decoder: expected one tensor, as the {self.likelihood} likelihood has no scale; got a pair"
            )
        if logvar is not None and self.recon_logvar is not None:
            raise TypeError("decoder: expected the mean only, as recon_logvar is given; got a pair (mean, logvar)")
        if mean.ndim < 2 or mean.shape[0] != z.shape[0]:
            raise ValueError(
                f"decoder: expected a tensor of shape (batch, channels, ...) for a batch of {z.shape[0]}, "
                f"got {tuple(mean.shape)}"
            )
        word = "log-variance" if self.likelihood == "gaussian" else "scale"
        if packed and zi_logits is not None and zi_logits.shape == mean.shape:
            raise TypeError(
                "decoder: expected (mu, theta, zi_logits) from it, as the likelihood is "
                "zero_inflated_negative_binomial; got two tensors of one shape: zi_logits is missing"
            )
        if packed and mean.shape[1] % 2:
            raise ValueError(
                f"decoder: expected a mean and a {word} packed along dimension 1, an even size, "
                f"got {tuple(mean.shape)}; if it gives the mean only, pass recon_logvar to the VAE"
            )
        if of is not None:
            expected = (z.shape[0], (2 if packed else 1) * of.shape[1], *of.shape[2:]) if of.ndim > 1 else z.shape[:1]
            if tuple(mean.shape) != tuple(expected):
                what, otherwise = "tensor", ""
                if packed:
                    what = f"packed mean and {word}"
                    otherwise = "; if it gives the mean only, pass recon_logvar to the VAE"
                    if zi_logits is not None:
                        otherwise = "; of (mu, theta), zi_logits is missing"
                elif has_scale:
                    what, otherwise = "mean", f"; if it gives the {word} too, leave recon_logvar None"
                raise ValueError(
                    f"decoder: expected a {what} of shape {tuple(expected)} for x of shape {tuple(of.shape)}, "
                    f"got {tuple(mean.shape)}{otherwise}"
                )
        shape = half_of(mean.shape, 1) if packed else mean.shape
        for what, beside in ((word, logvar), ("zi_logits", zi_logits)):
            if beside is not None and not broadcasts(beside.shape, shape):
                raise ValueError(
                    f"decoder: expected {'a ' if beside is logvar else ''}{what} that broadcasts to {tuple(shape)}, "
                    f"got {tuple(beside.shape)}"
                )
        if not has_scale:
            return mean, 0.0, None
        return mean, (None if packed else self.recon_logvar if logvar is None else logvar), zi_logits

    def _gaussian(self, posterior: tuple[Tensor, Tensor | None]) -> DiagonalGaussian:
        """The posterior, taken apart and with a log-variance."""
        mu, scale = posterior
        if scale is None:
            mu, scale = mu.chunk(2, dim=1)
        if self.scale == "logvar" and self.clamp is None and self.eps == 0.0:
            return DiagonalGaussian(mu, scale)
        return DiagonalGaussian(mu, _log_of(scale, mu, self._latent_forms(None)[0]))

    def _prior_distribution(self, condition: Any, shape: Sequence[int | None], like: Tensor) -> DiagonalGaussian:
        """The prior of latents of a shape, likewise; where it is of numbers, of tensors like another."""
        prior = self._prior(condition, shape)
        if prior is None:
            return DiagonalGaussian(like.new_zeros(()), like.new_zeros(()))
        mu, scale = prior
        if not isinstance(mu, Tensor):
            mu = like.new_full((), mu)
        if scale is None:
            mu, scale = mu.chunk(2, dim=1)
        return DiagonalGaussian(mu, _log_of(scale, mu, self._latent_forms(scale)[1]))

    def _latent_forms(self, prior_scale: Tensor | float | None) -> tuple[Form, Form]:
        """Those of the posterior's scale and of the prior's."""
        return checked_latent_options(
            self.scale, self.clamp, self.eps, self.prior_scale, self.prior_clamp, self.prior_eps, prior_scale
        )

    def _distribution(self, p: _Decoded) -> Likelihood:
        mean, scale = p.mean, p.scale
        if scale is None:
            mean, scale = mean.chunk(2, dim=1)
        form = p.kind.form
        if 0 in p.kind.formula.scales:
            mean = _log_of(mean, mean, form)
        zi_logits = () if p.zi_logits is None else (p.zi_logits,)
        return _DISTRIBUTIONS[p.kind.likelihood](mean, _log_of(scale, mean, form), *zi_logits)


_has_warned = False


def _warn_if_unsynchronised() -> None:
    """Say once that `VAE.loss` is no call of a wrapper."""
    global _has_warned
    if _has_warned or not (distributed.is_available() and distributed.is_initialized()):
        return
    if distributed.get_world_size() > 1 and not is_in_forward_of_ddp():
        _has_warned = True
        warnings.warn(
            "VAE.loss was called in a group of processes. It goes past DistributedDataParallel and the like, which do "
            "not synchronise its gradients then: call the wrapped module, wrapped(x).loss(x).",
            stacklevel=3,
        )


def _with_a_dimension(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
    """Take the learned log-variance of an earlier version, which was 0-dim."""
    learned = state_dict.get(f"{prefix}recon_logvar")
    if isinstance(learned, Tensor) and learned.dim() == 0:
        state_dict[f"{prefix}recon_logvar"] = learned.view(1)


def _latent_shape(latent_dim: int | Sequence[int | None]) -> tuple[int | None, ...]:
    """Sizes of one sample's latent."""
    sizes = (latent_dim,) if isinstance(latent_dim, Integral) else latent_dim
    if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Sequence) or isinstance(latent_dim, bool):
        raise TypeError(f"latent_dim: expected an integer or a sequence of them, got {type(latent_dim).__name__}")
    for size in sizes:
        if size is not None and (isinstance(size, bool) or not isinstance(size, Integral)):
            raise TypeError(f"latent_dim: expected an integer or a sequence of them, got {latent_dim!r}")
    if not sizes or any(size is not None and size < 1 for size in sizes):
        raise ValueError(f"latent_dim: expected positive sizes, got {latent_dim!r}")
    return tuple(None if size is None else int(size) for size in sizes)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _checked_count(name: str, value: object) -> int:
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return int(value)


def _called(name: str, module: nn.Module, *arguments: Tensor, condition: Any) -> object:
    """What a module gives, with an error of its own where it takes no condition, or must have one."""
    given = arguments if condition is None else (*arguments, condition)
    if torch.compiler.is_compiling():
        return module(*given)
    try:
        return module(*given)
    except TypeError as error:
        kind = type(module).__name__
        if _takes(module, given):  # the error is from inside
            raise
        if arguments and condition is None and isinstance(module, (networks.LabelledEncoder, networks.LabelledDecoder)):
            expected = f"labels of shape ({len(arguments[0])},), as the {name} is a {kind}"
        elif condition is None and _takes(module, (*given, None)):
            expected = f"one, as the {name} ({kind}) takes it"
        elif condition is not None and _takes(module, arguments):
            expected = f"None, as the {name} ({kind}) takes none"
        else:
            raise
        got = None if condition is None else type(condition).__name__
        raise TypeError(f"condition: expected {expected}; got {got}") from error


def _takes(module: nn.Module, arguments: Sequence[object]) -> bool:
    """Whether a module can be called with so many arguments, as far as that can be told."""
    try:
        inspect.signature(module.forward).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        pass
    return True


_Condition = TypeVar("_Condition")


def _repeated(condition: _Condition, times: int, batch: int) -> _Condition:
    """A condition of as many batches, one after the other: tensors of one of them, in tuples, lists and dicts."""
    found: Any = condition
    if isinstance(condition, Tensor) and condition.shape[:1] == (batch,):
        found = condition.expand(times, *condition.shape).flatten(0, 1)
    elif isinstance(condition, dict):
        found = {key: _repeated(value, times, batch) for key, value in condition.items()}
    elif isinstance(condition, (tuple, list)):
        values = [_repeated(value, times, batch) for value in condition]
        found = type(condition)(*values) if hasattr(condition, "_fields") else type(condition)(values)
    return found


def _mean_and_scale(name: str, output: object) -> tuple[Tensor, Tensor | None]:
    """Take apart what a module gave: (tensor, None), or a pair of tensors."""
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, (tuple, list)) and len(output) == 2 and all(isinstance(o, Tensor) for o in output):
        return output[0], output[1]
    got = type(output).__name__
    if isinstance(output, (tuple, list)):
        got = f"{got} of ({', '.join(type(o).__name__ for o in output)})"
    raise TypeError(f"{name}: expected a tensor or a pair of tensors (mean, logvar) from it, got {got}")


def _with_zi_logits(output: object) -> tuple[object, Tensor]:
    """What a decoder gave before the logits of a dropout, and these."""
    if not isinstance(output, (tuple, list)) or not 2 <= len(output) <= 3 or not isinstance(output[-1], Tensor):
        raise TypeError(
            "decoder: expected (mu, theta, zi_logits) from it, or (mu, zi_logits) where recon_logvar is given, as the "
            f"likelihood is zero_inflated_negative_binomial; got {type(output).__name__}"
        )
    return (output[0] if len(output) == 2 else tuple(output[:2])), output[-1]


def _log_of(scale: Tensor | float, mean: Tensor, form: Form) -> Tensor:
    """The logarithm of the scale that a tensor, or number, beside a mean is a form of; in its dtype."""
    if not isinstance(scale, Tensor):
        return mean.new_full((), Scale(scale, form).log)
    if form == PLAIN:
        return scale
    log: Tensor = Scale(scale.to(working_dtype(scale)), form).log
    return log.to(scale.dtype)


def _broadcasts(shape: Sequence[int], expected: Sequence[int | None]) -> bool:
    """Whether one shape does to another, of which some sizes may be anything."""
    lead = len(expected) - len(shape)
    return lead >= 0 and all(s == 1 or t is None or s == t for s, t in zip(shape, expected[lead:], strict=True))


def _check_prior(moment: torch.Size, shape: Sequence[int | None]) -> None:
    """Check the shape of a prior's mean, or scale, against that of latents."""
    if not _broadcasts(moment, shape):
        raise ValueError(f"prior: expected moments that broadcast to {_shown(shape)}, got shape {tuple(moment)}")


def _shape_of(posterior: tuple[Tensor, Tensor | None]) -> torch.Size:
    mu, scale = posterior
    return mu.shape if scale is not None else half_of(mu.shape, 1)


def _fits(shape: Sequence[int], expected: Sequence[int | None]) -> bool:
    return len(shape) == len(expected) and all(e in (None, s) for s, e in zip(shape, expected, strict=True))


def _shown(sizes: Sequence[int | None]) -> str:
    """A shape as an error shows it: sizes that may be anything are ``*``."""
    inside = ", ".join("*" if size is None else str(size) for size in sizes)
    return f"({inside},)" if len(sizes) == 1 else f"({inside})"


register_outputs(
    DiagonalGaussian,
    DiagonalLaplace,
    Bernoulli,
    Poisson,
    NegativeBinomial,
    ZeroInflatedNegativeBinomial,
    DiscretizedLogistic,
    VAEOutput,
    Latent,
    ELBOTerms,
)
