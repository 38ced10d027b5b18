"""KL(q || p) of a Gaussian posterior from its prior."""

from __future__ import annotations

import numbers

from torch import Tensor

from .. import autograd
from ..backend.reference import FORMULAS
from ..backend.specs import half_of, shape_of_mean
from ..calls import Operand, Operands, find
from ..layout import broadcasts
from ..typing import Backend, Bounds, Dim, NormalScale, TermReduction
from .checks import (
    REQUIRED_WITH_PRIOR_MU,
    check_latents,
    check_packed,
    check_parameter,
    check_same_device,
    check_tensor,
    checked_dim,
    checked_reduction,
    was_given,
)
from .forms import Written, as_written, checked_forms, unless_usual
from .objective import objective_call, weighting_of


def kl_standard_normal(
    mu: Tensor,
    logvar: Tensor | None,
    *,
    scale: NormalScale = "logvar",
    clamp: Bounds = None,
    eps: float = 0.0,
    weight: Tensor | None = None,
    reduction: TermReduction = "batchmean",
    dim: Dim = None,
    packed_dim: int = 1,
    backend: Backend | None = None,
) -> Tensor:
    """KL(N(mu, diag sigma^2) || N(0, I)) = sum((mu^2 + sigma^2 - 1 - log sigma^2) / 2).

    Args:
        mu: mean of q, shape (batch, ...); or mean and scale packed, with ``logvar=None``.
        logvar: log-variance of q, mu's shape; or what ``scale`` says.
        scale, clamp, eps: the form of the scale: see `fusedvae.functional`.
        weight: of the elements: see `fusedvae.functional`.
        reduction: "batchmean", "sum", "mean", "weighted_mean" or "none".
        dim: with "none", what is summed over: by default all but the batch.
        packed_dim: the dimension that halves of packed tensors are along.
        backend: overrides the process's choice for this call.
    """
    posterior = unless_usual(scale, clamp, eps, "logvar")
    return run_divergence(
        (mu, logvar), "kl_standard_normal", posterior, None, weight, None, reduction, dim, packed_dim, backend
    )


def kl_normal(
    mu: Tensor,
    logvar: Tensor | None,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = REQUIRED_WITH_PRIOR_MU,
    *,
    scale: NormalScale = "logvar",
    prior_scale: NormalScale = "logvar",
    clamp: Bounds = None,
    prior_clamp: Bounds = None,
    eps: float = 0.0,
    prior_eps: float | None = None,
    weight: Tensor | None = None,
    balance: float | None = None,
    reduction: TermReduction = "batchmean",
    dim: Dim = None,
    packed_dim: int = 1,
    backend: Backend | None = None,
) -> Tensor:
    """KL(N(mu, diag sigma^2) || N(prior_mu, diag sigma_p^2)), differentiable in all four.

    sum((sigma^2 / sigma_p^2 - 1 - d + (mu - prior_mu)^2 / sigma_p^2) / 2) with d = log sigma^2 - log sigma_p^2. Source:
    Kingma & Welling 2014 (arXiv:1312.6114), appendix B, for any two normal distributions.

    Args:
        mu: mean of q, shape (batch, ...); or mean and scale packed, with ``logvar=None``.
        logvar: log-variance of q, mu's shape; or what ``scale`` says.
        prior_mu: mean of p: a tensor that broadcasts to mu's shape, or a number; or mean and scale packed, with
            ``prior_logvar=None``. Without both, p = N(0, I).
        prior_logvar: log-variance of p, or what ``prior_scale`` says: a tensor that broadcasts to mu's shape, or a
            number.
        scale, clamp, eps, prior_scale, prior_clamp, prior_eps: the forms of the two scales: see
            `fusedvae.functional`. Without a ``prior_eps``, it is ``eps`` where the prior's scale is a tensor of the
            same form, else 0.
        weight: of the elements: see `fusedvae.functional`.
        balance: a number a from 0 to 1: the gradients to q are multiplied by 1 - a, those to p by a; the value is what
            it is (Hafner et al. 2021, arXiv:2010.02193, section 2.2).
        reduction: "batchmean", "sum", "mean", "weighted_mean" or "none".
        dim: with "none", what is summed over: by default all but the batch.
        packed_dim: the dimension that halves of packed tensors are along.
        backend: overrides the process's choice for this call.
    """
    formula, inputs = divergence_of(mu, logvar, prior_mu, prior_logvar)
    posterior = unless_usual(scale, clamp, eps, "logvar")
    prior = None
    if prior_scale != "logvar" or prior_clamp is not None or prior_eps is not None:
        prior = as_written(prior_scale, prior_clamp, prior_eps)  # type: ignore[arg-type]
    return run_divergence(inputs, formula, posterior, prior, weight, balance, reduction, dim, packed_dim, backend)


def divergence_of(
    mu: Operand, logvar: Operand, prior_mu: Operand, prior_logvar: Operand
) -> tuple[str, tuple[Operand, ...]]:
    """The divergence of a posterior from this prior, and its inputs."""
    if prior_mu is None:
        if was_given(prior_logvar):
            raise ValueError("prior_logvar: expected None without prior_mu; a prior of mean 0 has prior_mu=0.0")
        return "kl_standard_normal", (mu, logvar)
    if prior_logvar is REQUIRED_WITH_PRIOR_MU:
        raise TypeError(
            "prior_logvar: expected a tensor or number beside prior_mu, or None if both are packed in prior_mu; "
            "got nothing"
        )
    return "kl_normal", (mu, logvar, prior_mu, prior_logvar)


def run_divergence(
    inputs: tuple[Operand, ...],
    formula: str,
    posterior: Written | None,
    prior: Written | None,
    weight: Tensor | None,
    balance: float | None,
    reduction: str,
    dim: Dim,
    packed_dim: int,
    backend: str | None,
) -> Tensor:
    """A divergence alone: its coefficient is 1."""
    weighting: tuple[Operand, ...] = ()
    if weight is not None:
        weighting = weighting_of("weight", weight, reduction, "mu", inputs[0], inputs[1], packed_dim)
    operands = (*inputs, *weighting, 1.0)
    if isinstance(dim, list):
        dim = tuple(dim)
    call = find(
        _divergence_call,
        operands,
        formula,
        posterior,
        prior,
        len(weighting),
        balance,
        reduction,
        dim,
        packed_dim,
        backend,
    )
    return autograd.objective(call, operands)[0]


def _divergence_call(
    operands: Operands,
    name: str,
    posterior: Written | None,
    prior: Written | None,
    weighting: int,
    balance: float | None,
    reduction: str,
    dim: Dim,
    packed_dim: int,
    backend: str | None,
) -> autograd.DifferentiableObjective:
    """Of a divergence alone, of its inputs, what its weight adds, and 1, its coefficient."""
    formula = FORMULAS[name]
    inputs = operands[: len(formula.inputs)]
    check_divergence(inputs, packed_dim)
    if balance is not None and (not isinstance(balance, numbers.Real) or isinstance(balance, bool)):
        raise TypeError(f"balance: expected a number or None, got {type(balance).__name__}")
    if balance is not None and not 0 <= balance <= 1:
        raise ValueError(f"balance: expected a number from 0 to 1, got {balance}")
    mu = inputs[0]
    assert isinstance(mu, Tensor)
    return objective_call(
        operands,
        [(formula, checked_forms(formula, posterior, prior, inputs[-1]), weighting)],
        (checked_reduction(reduction),),
        checked_dim(dim, mu.dim(), reduction),
        packed_dim,
        backend,
        balance=None if balance is None else float(balance),
    )


def check_divergence(inputs: Operands, packed_dim: int) -> None:
    """Check the inputs of a divergence: mu, logvar, and perhaps the prior's, which broadcast to mu's shape."""
    mu, logvar, *prior = inputs
    check_latents(mu, logvar, packed_dim)
    assert isinstance(mu, Tensor)
    shape = shape_of_mean(mu, logvar, packed_dim)
    if not prior:
        return
    prior_mu, prior_logvar = prior
    if prior_logvar is None:
        check_tensor("prior_mu", prior_mu)
        assert isinstance(prior_mu, Tensor)
        check_same_device("prior_mu", prior_mu, "mu", mu)
        check_packed("prior_mu", prior_mu, packed_dim)
        half = half_of(prior_mu.shape, packed_dim)
        # Halves of size 1 would broadcast, too: but a mean alone looks like them where the latent has two dimensions.
        if not broadcasts(half, shape) or half[packed_dim] != shape[packed_dim % len(half) - len(half)]:
            raise ValueError(
                f"prior_mu: packed (no log-variance given), expected a shape whose halves along dimension {packed_dim} "
                f"have mu's size along it and broadcast to {tuple(shape)}, got {tuple(prior_mu.shape)}"
            )
        return
    check_parameter("prior_mu", prior_mu, shape, "mu", mu)
    check_parameter("prior_logvar", prior_logvar, shape, "mu", mu)
