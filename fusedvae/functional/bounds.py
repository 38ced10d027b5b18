"""The evidence lower bound, in one call."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .. import autograd
from ..backend.reference import FORMULAS, GIVEN, LIKELIHOODS
from ..calls import Operand, Operands, find
from ..typing import Backend, Bounds, LikelihoodName, LikelihoodScale, NormalScale, Reduction
from .checks import (
    REQUIRED,
    REQUIRED_WITH_PRIOR_MU,
    check_batch_size,
    check_factor,
    check_forgotten,
    check_integer,
    check_kl,
    check_nothing_beside_kl,
    check_tensor,
    checked_reductions,
)
from .divergences import check_divergence, divergence_of
from .forms import Written, as_written, checked_forms, checked_recon_form
from .likelihoods import check_likelihood, inputs_of
from .objective import check_memory, may_be_in_place, objective_call, weighting_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..typing import ELBOArguments


class ELBOTerms(NamedTuple):
    """The loss and its two terms, each reduced, and each differentiable on its own: loss = nll + beta * kl.

    They are of one operation: before the last of several backward passes, ``retain_graph=True`` is needed.
    """

    loss: Tensor
    nll: Tensor
    kl: Tensor


@overload
def elbo_loss(
    recon_x: Tensor,
    x: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None = ...,
    recon_logvar: Tensor | float | None = ...,
    *,
    return_terms: Literal[False] = ...,
    **others: Unpack[ELBOArguments],
) -> Tensor: ...


@overload
def elbo_loss(
    recon_x: Tensor,
    x: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None = ...,
    recon_logvar: Tensor | float | None = ...,
    *,
    return_terms: Literal[True],
    **others: Unpack[ELBOArguments],
) -> ELBOTerms: ...


@overload
def elbo_loss(
    recon_x: Tensor,
    x: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None = ...,
    recon_logvar: Tensor | float | None = ...,
    *,
    return_terms: bool,
    **others: Unpack[ELBOArguments],
) -> Tensor | ELBOTerms: ...


def elbo_loss(
    recon_x: Tensor,
    x: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None = REQUIRED,
    recon_logvar: Tensor | float | None = 0.0,
    *,
    likelihood: LikelihoodName = "gaussian",
    scale: NormalScale = "logvar",
    clamp: Bounds = None,
    eps: float = 0.0,
    recon_scale: LikelihoodScale | None = None,
    recon_clamp: Bounds = None,
    recon_eps: float = 0.0,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = REQUIRED_WITH_PRIOR_MU,
    prior_scale: NormalScale = "logvar",
    prior_clamp: Bounds = None,
    prior_eps: float | None = None,
    kl: Tensor | None = None,
    beta: float | Tensor = 1.0,
    full: bool = False,
    extra: Tensor | float | None = None,
    pos_weight: Tensor | float | None = None,
    zi_logits: Tensor | float | None = None,
    weight: Tensor | None = None,
    latent_weight: Tensor | None = None,
    reduction: Reduction = "batchmean",
    grad_scale: float | Tensor | None = None,
    return_terms: bool = False,
    inplace: bool = False,
    packed_dim: int = 1,
    backend: Backend | None = None,
) -> Tensor | ELBOTerms:
    """The negative evidence lower bound, NLL(x; recon_x, recon_logvar) + beta * KL(q || p), p = N(0, I) unless given.

    Terms as in `gaussian_nll` (or the function of another likelihood) and `kl_normal`.

    Args:
        recon_x: decoder mean, or what else the likelihood has first (logits, probabilities, a rate), shape (batch,
            ...); or mean and scale packed, with ``recon_logvar=None``.
        x: data, the shape of the mean; may be of integers or bools.
        mu: mean of q, shape (batch, ...); or mean and scale packed, with ``logvar=None``.
        logvar: log-variance of q, mu's shape; or what ``scale`` says.
        recon_logvar: decoder log-variance, or what ``recon_scale`` says of a likelihood that has a scale: a tensor that
            broadcasts to x's shape, or a number. Of a negative binomial likelihood it is theta.
        likelihood: "gaussian", of variance 1 half the squared error; "mse" for the squared error, without a half;
            "laplace"; "l1" for the absolute error; "bernoulli" of logits, "bernoulli_probs" of probabilities;
            "poisson", "negative_binomial" and "zero_inflated_negative_binomial" of counts;
            "discretized_logistic" of pixels in [-1, 1].
        scale, clamp, eps: the form of q's scale: see `fusedvae.functional`.
        recon_scale, recon_clamp, recon_eps: the form of the likelihood's: by default "logvar", or "logscale", "theta",
            "rate" (of recon_x itself).
        prior_mu: mean of the prior: a tensor that broadcasts to mu's shape, or a number; or mean and scale packed, with
            ``prior_logvar=None``. Without both, the prior is N(0, I).
        prior_logvar: log-variance of the prior, or what ``prior_scale`` says: a tensor that broadcasts to mu's shape,
            or a number.
        prior_scale, prior_clamp, prior_eps: the form of the prior's: see `kl_normal`.
        kl: the KL per sample that `latent` returned, instead of ``mu`` and ``logvar`` (both None then). Its elements
            are the batch: "mean" does not divide by the latent's size.
        beta: weight of the KL: a number, or a 0-dim tensor, whose value may change under a captured or compiled
            program, and which may need a gradient.
        full: add the likelihood's constant, what makes it a density (log(2 pi) / 2 of a Gaussian, log x! of a Poisson
            distribution), an element of x.
        extra: of the Laplace likelihood, what is added to the absolute error: see `laplace_nll`.
        pos_weight: of the Bernoulli likelihood of logits: see `bernoulli_nll`.
        zi_logits: of the zero-inflated likelihood: see `zero_inflated_negative_binomial_nll`.
        weight: of the elements of x, latent_weight: of those of the latent: see `fusedvae.functional`.
        reduction: "batchmean", "sum", "mean", "weighted_mean" or "none" (shape (batch,)); or a pair, of the
            likelihood's and of the KL's: ("mean", "batchmean") is what `torch.nn.functional.mse_loss` + KL code does.
            Of a pair of totals, x and the latent may have batches of different sizes, as frames and videos have.
        grad_scale: what gradients are made times, while the value is what it is: a number or a 0-dim tensor, the factor
            of a GradScaler, say, or 1 / the steps that gradients are accumulated over.
        return_terms: return `ELBOTerms` (loss, nll, kl), each differentiable on its own.
        inplace: write the gradient of recon_x into its memory: see `fusedvae.functional`.
        packed_dim: the dimension that halves of packed tensors are along.
        backend: overrides the process's choice for this call.
    """
    inputs = inputs_of(likelihood, recon_x, x, recon_logvar, extra, pos_weight, zi_logits)
    if logvar is REQUIRED:
        check_forgotten(kl)
        logvar = None
    if kl is not None:
        check_nothing_beside_kl(mu, logvar, prior_mu, prior_logvar, latent_weight)
    weightings = 0, 0
    if weight is not None or latent_weight is not None:
        first, second = checked_reductions(reduction)
        nll_weighting = () if weight is None else weighting_of("weight", weight, first, "x", x, 0.0, packed_dim)
        kl_weighting: tuple[Operand, ...] = ()
        if latent_weight is not None:
            kl_weighting = weighting_of("latent_weight", latent_weight, second, "mu", mu, logvar, packed_dim)
        inputs, weightings = (*inputs, *nll_weighting), (len(nll_weighting), len(kl_weighting))
    if kl is None:
        divergence, latents = divergence_of(mu, logvar, prior_mu, prior_logvar)
        operands: tuple[Operand, ...] = (*inputs, *latents, beta)
        if weightings[1]:
            operands = (*inputs, *latents, *kl_weighting, beta)
    else:
        divergence, operands = GIVEN.name, (*inputs, kl, beta)
    if grad_scale is not None:
        operands = (*operands, grad_scale)
    if isinstance(reduction, list) and len(reduction) == 2:
        reduction = tuple(reduction)
    inplace = inplace and may_be_in_place()
    call = find(
        _elbo_call,
        operands,
        likelihood,
        divergence,
        None if scale == "logvar" and clamp is None and eps == 0.0 else as_written(scale, clamp, eps),
        None
        if recon_scale is None and recon_clamp is None and recon_eps == 0.0
        else as_written(recon_scale, recon_clamp, recon_eps),
        None
        if prior_scale == "logvar" and prior_clamp is None and prior_eps is None
        else as_written(prior_scale, prior_clamp, prior_eps),  # type: ignore[arg-type]
        weightings,
        grad_scale is not None,
        full,
        reduction,
        return_terms,
        packed_dim,
        backend,
        inplace,
    )
    if inplace:
        check_memory(call, operands)
    values = autograd.objective(call, operands)
    return ELBOTerms(*values[:3]) if return_terms else values[0]


def _elbo_call(
    operands: Operands,
    likelihood: str,
    divergence: str,
    posterior: Written | None,
    recon: Written | None,
    prior: Written | None,
    weightings: tuple[int, int],
    is_grad_scaled: bool,
    full: bool,
    reduction: object,
    returns_terms: bool,
    packed_dim: int,
    backend: str | None,
    inplace: bool,
) -> autograd.DifferentiableObjective:
    formula = LIKELIHOODS[likelihood]
    count = len(formula.inputs)
    names = [
        "recon_x",
        *["recon_logvar" if (0, k) in formula.pairs else name for k, name in enumerate(formula.inputs)][1:],
    ]
    check_likelihood(formula, operands[:count], names, packed_dim)
    recon_form = checked_recon_form(formula, recon)
    x = operands[1]
    assert isinstance(x, Tensor)
    is_given = divergence == GIVEN.name
    second = GIVEN if is_given else FORMULAS[divergence]
    start = count + weightings[0]
    latents = operands[start : start + len(second.inputs)]
    if not is_given:
        check_divergence(latents, packed_dim)
        name, first = "mu", latents[0]
        forms = checked_forms(second, posterior, prior, latents[-1])
        assert isinstance(first, Tensor)
        check_batch_size(name, first, x, reduction)
    else:
        check_tensor("kl", latents[0])
        name, first, forms = "kl", latents[0], []
        assert isinstance(first, Tensor)
        check_kl(first, x, reduction)
    if first.device != x.device:
        raise ValueError(f"{name}: expected on {x.device}, where x is; got it on {first.device}")
    check_factor("beta", operands[-2 if is_grad_scaled else -1], x)
    if is_grad_scaled:
        check_factor("grad_scale", operands[-1], x)
    return objective_call(
        operands,
        [(formula, [recon_form] if recon_form else [], weightings[0]), (second, forms, weightings[1])],
        checked_reductions(reduction),
        None,
        packed_dim,
        backend,
        full=full,
        returns_terms=returns_terms,
        is_grad_scaled=is_grad_scaled,
        inplace=inplace,
    )


def importance_weighted_bound(log_weights: Tensor, dim: int = 0) -> Tensor:
    """log mean exp of log importance weights: a bound on log p(x) that rises with their number.

    The log-weights of K samples z of q(z|x) are log p(x|z) + log p(z) - log q(z|x). The gradient is that of
    sum(w * log_weights) with the normalised weights w as constants. Source: Burda, Grosse & Salakhutdinov 2016
    (arXiv:1509.00519), equations 8 and 13.

    Args:
        log_weights: a tensor with the K samples along ``dim``.
        dim: the dimension of the samples.

    Returns:
        The bound, without that dimension; nats, float32 at least.
    """
    check_tensor("log_weights", log_weights)
    check_integer("dim", dim)
    if log_weights.dim() == 0:
        raise ValueError("log_weights: expected a dimension of samples, got a 0-dim tensor")
    if not -log_weights.dim() <= dim < log_weights.dim():
        raise ValueError(f"dim: expected a dimension from {-log_weights.dim()} to {log_weights.dim() - 1}, got {dim}")
    widest = torch.promote_types(log_weights.dtype, torch.float32)
    return torch.logsumexp(log_weights.to(widest), int(dim)) - math.log(max(log_weights.shape[dim], 1))
