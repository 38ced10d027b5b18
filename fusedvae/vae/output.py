"""What a pass through a VAE computes, and the bounds of it."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

from torch import Tensor

from .. import functional
from ..backend.evaluation import with_gradient_times
from ..backend.reference import LIKELIHOODS, PLAIN, Form, Formula
from ..functional import ELBOTerms, Latent
from ..functional.checks import check_number, check_tensor, check_weight, checked_reductions, shown
from ..functional.forms import as_written
from ..functional.likelihoods import inputs_of, run_likelihood
from ..functional.objective import summed_kl
from ..losses import checked_recon_options
from ..typing import Bounds, LikelihoodName, LikelihoodScale, Reduction, TermReduction


class VAEOutput(NamedTuple):
    """All that one pass through a `VAE` computes.

    With several samples, K of them, ``recon_x`` and ``z`` have these in front: ``(K, batch, *)``; for the
    importance-weighted bound with one, too.
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
        kind = Kind.of(self.form)
        return negative_bound(
            Decoded(self.recon_x, self.recon_logvar if kind.formula.pairs else 0.0, kind, self.zi_logits),
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


class Kind(NamedTuple):
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
        low, high = self.clamp or (None, None)
        found = (*_POSITIONS[self.likelihood, self.scale], low, high, self.eps)
        return None if found == (0, 0, None, None, 0.0) else found

    @classmethod
    def of(cls, numbers: tuple[int, int, float | None, float | None, float] | None) -> Kind:
        if numbers is None:
            return _PLAIN_GAUSSIAN
        likelihood, scale, low, high, eps = numbers
        clamp = None if (low, high) == (None, None) else (low, high)
        return cls(*_NAMES[likelihood, scale], clamp, eps)


_NAMES: dict[tuple[int, int], tuple[Any, Any]] = {
    (number, position): (likelihood, scale)
    for number, (likelihood, formula) in enumerate(LIKELIHOODS.items())
    for position, scale in enumerate(formula.forms if formula.scales else [None])
}
"""The likelihoods and the scales that they may have, by their positions."""

_POSITIONS = {names: positions for positions, names in _NAMES.items()}
_POSITIONS |= {(likelihood, None): (number, 0) for number, likelihood in enumerate(LIKELIHOODS)}
"""And the other way round; without a word, a likelihood has the first of its scales. Compilers look this up, not all of
which can list the forms of a formula."""

_PLAIN_GAUSSIAN = Kind("gaussian", None, None, 0.0)


class Decoded(NamedTuple):
    """p(x|z) as the functional interface takes it; with several samples, these in front of the batch."""

    mean: Tensor
    scale: Tensor | float | None
    """0.0 of a likelihood that has none; None where it is packed in the mean, along the channels."""
    kind: Kind
    zi_logits: Tensor | None = None

    def nll(
        self, x: Tensor, full: bool, weight: Tensor | None, reduction: TermReduction, inplace: bool = False
    ) -> Tensor:
        """-log p(x|z) of several samples: a total over all of them, or with "none" ``(samples, batch)``.

        The kernels read each element of ``x``, expanded to the samples, where it lies.
        """
        check_tensor("x", x, integers=True)
        if weight is not None:  # of x, not of the samples in front of it
            check_weight("weight", weight, x.shape, "x", x)
        targets = x.expand(self.mean.shape[0], *x.shape)
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


def negative_bound(
    p: Decoded,
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
        kl = summed_kl(kl, of_kl)
    terms = ELBOTerms(nll + (kl * beta).to(kl.dtype), nll, kl)
    terms = ELBOTerms(*[_with_gradient_times(value, grad_scale) for value in terms])
    return terms if return_terms else terms.loss


def _negative_importance_weighted_bound(
    p: Decoded,
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
        raise ValueError(f"beta: expected 1 with bound='iwae', got {shown(beta)}")
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
