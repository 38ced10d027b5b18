"""Negative log-likelihoods -log p(x | z)."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .. import autograd
from ..backend.reference import FORMULAS, LIKELIHOODS, Form, Formula
from ..calls import Operand, Operands, find
from ..torch_private import is_transformed
from ..typing import Backend, Bounds, Dim, Dispersion, LaplaceScale, NormalScale, Rate, TermReduction
from .checks import (
    check_batched,
    check_broadcast,
    check_packed,
    check_parameter,
    check_same_device,
    check_tensor,
    checked_dim,
    checked_reduction,
    shown,
)
from .forms import Written, checked_form, unless_usual
from .objective import check_memory, may_be_in_place, objective_call, weighting_of


def gaussian_nll(
    recon_x: Tensor,
    x: Tensor,
    recon_logvar: Tensor | float | None = 0.0,
    *,
    scale: NormalScale = "logvar",
    clamp: Bounds = None,
    eps: float = 0.0,
    full: bool = False,
    weight: Tensor | None = None,
    reduction: TermReduction = "batchmean",
    dim: Dim = None,
    inplace: bool = False,
    packed_dim: int = 1,
    backend: Backend | None = None,
) -> Tensor:
    """-log N(x; recon_x, diag sigma^2) = sum((log sigma^2 + (recon_x - x)^2 / sigma^2 [+ log 2 pi]) / 2).

    Args:
        recon_x: decoder mean, shape (batch, ...); or mean and scale packed, with ``recon_logvar=None``.
        x: data, the shape of the mean; may be of integers or bools.
        recon_logvar: decoder log-variance, or what ``scale`` says: a tensor that broadcasts to x's shape, or a number.
        scale, clamp, eps: the form of the scale: see `fusedvae.functional`.
        full: add the constant log(2 pi) / 2 an element.
        weight: of the elements: see `fusedvae.functional`.
        reduction: "batchmean", "sum", "mean", "weighted_mean" or "none".
        dim: with "none", what is summed over: by default all but the batch.
        inplace: write the gradient of recon_x into its memory: see `fusedvae.functional`.
        packed_dim: the dimension that halves of packed tensors are along.
        backend: overrides the process's choice for this call.
    """
    written = unless_usual(scale, clamp, eps, "logvar")
    return run_likelihood(
        "gaussian", (recon_x, x, recon_logvar), written, full, weight, reduction, dim, packed_dim, backend, inplace
    )


def laplace_nll(
    recon_x: Tensor,
    x: Tensor,
    log_scale: Tensor | float | None = 0.0,
    *,
    scale: LaplaceScale = "logscale",
    clamp: Bounds = None,
    eps: float = 0.0,
    extra: Tensor | float | None = None,
    full: bool = False,
    weight: Tensor | None = None,
    reduction: TermReduction = "batchmean",
    dim: Dim = None,
    inplace: bool = False,
    packed_dim: int = 1,
    backend: Backend | None = None,
) -> Tensor:
    """-log Laplace(x; recon_x, b) = sum((abs(recon_x - x) + extra) / b + log b [+ log 2]).

    With ``extra``, what else is divided by the scale: a perceptual loss, as in the autoencoders of latent diffusion
    (Esser et al. 2021, arXiv:2012.09841). Source of the density: Kotz, Kozubowski & Podgórski 2001, section 2.1.

    Args:
        recon_x: decoder median, shape (batch, ...); or median and scale packed, with ``log_scale=None``.
        x: data, the shape of the median; may be of integers or bools.
        log_scale: logarithm of the scale b, or what ``scale`` says: a tensor that broadcasts to x's shape, or a number.
        scale: "logscale" (b = e^s), "scale" (b = s) or "softplus" (b = softplus(s)).
        clamp, eps: bounds of s, and what is added to b: see `fusedvae.functional`.
        extra: added to the absolute error of each element: a tensor that broadcasts to x's shape, or a number.
        full: add the constant log 2 an element.
        weight: of the elements: see `fusedvae.functional`.
        reduction: "batchmean", "sum", "mean", "weighted_mean" or "none".
        dim: with "none", what is summed over: by default all but the batch.
        inplace: write the gradient of recon_x into its memory: see `fusedvae.functional`.
        packed_dim: the dimension that halves of packed tensors are along.
        backend: overrides the process's choice for this call.
    """
    inputs = (recon_x, x, log_scale, 0.0 if extra is None else extra)
    written = unless_usual(scale, clamp, eps, "logscale")
    return run_likelihood("laplace", inputs, written, full, weight, reduction, dim, packed_dim, backend, inplace)


def bernoulli_nll(
    recon_x: Tensor,
    x: Tensor,
    *,
    from_logits: bool = True,
    pos_weight: Tensor | float | None = None,
    weight: Tensor | None = None,
    reduction: TermReduction = "batchmean",
    dim: Dim = None,
    inplace: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """-log Bernoulli(x; p), the binary cross-entropy, for targets in [0, 1].

    sum(softplus(a) - x a) of logits a = recon_x, as torch.nn.functional.binary_cross_entropy_with_logits; or
    sum(-x log p - (1 - x) log(1 - p)) of probabilities p = recon_x, no logarithm below -100, as
    torch.nn.functional.binary_cross_entropy, whose derivative by p it has. Source: Kingma & Welling 2014
    (arXiv:1312.6114), appendix C.1.

    Args:
        recon_x: logits, shape (batch, ...); or probabilities, with ``from_logits=False``: NaN comes of others.
        x: data, the shape of recon_x; may be of integers or bools.
        from_logits: what recon_x is.
        pos_weight: of logits, how many times the part of x counts: a tensor that broadcasts to x's shape, or a number.
        weight: of the elements: see `fusedvae.functional`.
        reduction: "batchmean", "sum", "mean", "weighted_mean" or "none".
        dim: with "none", what is summed over: by default all but the batch.
        inplace: write the gradient of recon_x into its memory: see `fusedvae.functional`.
        backend: overrides the process's choice for this call.
    """
    inputs: tuple[Operand, ...] = (recon_x, x)
    if from_logits:
        inputs = (*inputs, 1.0 if pos_weight is None else pos_weight)
    elif pos_weight is not None:
        raise ValueError(f"pos_weight: expected None with probabilities, as it is for logits; got {shown(pos_weight)}")
    name = "bernoulli" if from_logits else "bernoulli_probs"
    return run_likelihood(name, inputs, None, False, weight, reduction, dim, 1, backend, inplace)


def discretized_logistic_nll(
    recon_x: Tensor,
    x: Tensor,
    log_scale: Tensor | float | None = 0.0,
    *,
    scale: LaplaceScale = "logscale",
    clamp: Bounds = None,
    eps: float = 0.0,
    weight: Tensor | None = None,
    reduction: TermReduction = "batchmean",
    dim: Dim = None,
    inplace: bool = False,
    packed_dim: int = 1,
    backend: Backend | None = None,
) -> Tensor:
    """-log of the logistic distribution's mass in the bin of x, one of 256 in [-1, 1]: 8-bit images / 127.5 - 1.

    A bin ends 1/255 to either side of x; those at -1 and 1 (below -0.999 and above 0.999) are open. With edges (x +-
    1/255 - recon_x) / s the mass is sigmoid(upper) - sigmoid(lower), computed as softplus(-upper) + softplus(lower) -
    log(1 - e^-(upper - lower)), in which nothing cancels: where PixelCNN++ goes over to the density at the middle times
    the width (a mass below 1e-5), this has what that approximates. Nothing is missing of the mass: there is no constant
    to add. Source: Salimans et al. 2017, "PixelCNN++" (arXiv:1701.05517), section 2.1.

    Args:
        recon_x: decoder mean, shape (batch, ...); or mean and scale packed, with ``log_scale=None``.
        x: data in [-1, 1], the shape of the mean.
        log_scale: logarithm of the scale s, or what ``scale`` says: a tensor that broadcasts to x's shape, or a number.
        scale: "logscale" (s = e^l), "scale" (s = l) or "softplus" (s = softplus(l)).
        clamp, eps: bounds of l, and what is added to s: see `fusedvae.functional`. ``clamp=(-7, None)`` is usual.
        weight: of the elements: see `fusedvae.functional`.
        reduction: "batchmean", "sum", "mean", "weighted_mean" or "none".
        dim: with "none", what is summed over: by default all but the batch.
        inplace: write the gradient of recon_x into its memory: see `fusedvae.functional`.
        packed_dim: the dimension that halves of packed tensors are along.
        backend: overrides the process's choice for this call.
    """
    written = unless_usual(scale, clamp, eps, "logscale")
    inputs = (recon_x, x, log_scale)
    return run_likelihood(
        "discretized_logistic", inputs, written, False, weight, reduction, dim, packed_dim, backend, inplace
    )


def poisson_nll(
    rate: Tensor,
    x: Tensor,
    *,
    scale: Rate = "rate",
    clamp: Bounds = None,
    eps: float = 0.0,
    full: bool = False,
    weight: Tensor | None = None,
    reduction: TermReduction = "batchmean",
    dim: Dim = None,
    inplace: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """-log Poisson(x; rate) = sum(rate - x log rate [+ log x!]).

    As torch.nn.functional.poisson_nll_loss with ``log_input=False`` (``scale="rate"``) or ``log_input=True``
    (``scale="lograte"``). With ``full`` it is -torch.distributions.Poisson(rate).log_prob(x), to which log x! belongs
    (PyTorch's loss has Stirling's approximation of it), computed so that of whole numbers x nothing cancels.

    Args:
        rate: mean number of counts, or what ``scale`` says, shape (batch, ...).
        x: counts, the shape of the rate; need not be integers. With ``full``, NaN comes of negative ones.
        scale: "rate" (the rate itself, to which 1e-8 is added), "lograte" (its logarithm) or "softplus" (a number of
            which it is the softplus; and 1e-8).
        clamp, eps: bounds of what is given, and what more is added to the rate: see `fusedvae.functional`.
        full: add log x!, the logarithm of gamma(x + 1), an element.
        weight: of the elements: see `fusedvae.functional`.
        reduction: "batchmean", "sum", "mean", "weighted_mean" or "none".
        dim: with "none", what is summed over: by default all but the batch.
        inplace: write the gradient of rate into its memory: see `fusedvae.functional`.
        backend: overrides the process's choice for this call.
    """
    written = unless_usual(scale, clamp, eps, "rate")
    return run_likelihood("poisson", (rate, x), written, full, weight, reduction, dim, 1, backend, inplace)


def negative_binomial_nll(
    mu: Tensor,
    x: Tensor,
    theta: Tensor | float | None,
    *,
    scale: Dispersion = "theta",
    clamp: Bounds = None,
    eps: float = 0.0,
    weight: Tensor | None = None,
    reduction: TermReduction = "batchmean",
    dim: Dim = None,
    inplace: bool = False,
    packed_dim: int = 1,
    backend: Backend | None = None,
) -> Tensor:
    """-log NB(x; mu, theta), the negative binomial distribution by its mean and inverse dispersion.

    sum(theta log(s / (theta + e)) + x log(s / (mu + e)) - lgamma(x + theta) + lgamma(theta) + lgamma(x + 1)), s =
    theta + mu + e, e = 1e-8: the variance is mu + mu^2 / theta. Values are those of scvi-tools' log_nb_positive, log x!
    included (so there is no constant to add), but to the last digits also of a large theta, whose log-gamma functions
    cancel. Source: Lopez et al. 2018, "Deep generative modeling for single-cell transcriptomics"
    (doi:10.1038/s41592-018-0229-2).

    Args:
        mu: mean number of counts, shape (batch, ...), at least 0.
        x: counts, the shape of mu, at least 0; need not be integers. NaN comes of what is out of its range.
        theta: inverse dispersion, more than 0, or what ``scale`` says: a tensor that broadcasts to x's shape (one a
            gene, or one a gene and cell), or a number.
        scale: "theta" (itself), "logtheta" (theta = e^t: scvi-tools' ``px_r``) or "softplus" (theta = softplus(t)).
        clamp, eps: bounds of t, and what is added to theta: see `fusedvae.functional`.
        weight: of the elements: see `fusedvae.functional`.
        reduction: "batchmean", "sum", "mean", "weighted_mean" or "none".
        dim: with "none", what is summed over: by default all but the batch.
        inplace: write the gradient of mu into its memory: see `fusedvae.functional`.
        packed_dim: with ``theta=None``, the dimension along which mu and theta are halves of ``mu``.
        backend: overrides the process's choice for this call.
    """
    written = unless_usual(scale, clamp, eps, "theta")
    inputs = (mu, x, theta)
    return run_likelihood(
        "negative_binomial", inputs, written, False, weight, reduction, dim, packed_dim, backend, inplace
    )


def zero_inflated_negative_binomial_nll(
    mu: Tensor,
    x: Tensor,
    theta: Tensor | float | None,
    zi_logits: Tensor | float,
    *,
    scale: Dispersion = "theta",
    clamp: Bounds = None,
    eps: float = 0.0,
    weight: Tensor | None = None,
    reduction: TermReduction = "batchmean",
    dim: Dim = None,
    inplace: bool = False,
    packed_dim: int = 1,
    backend: Backend | None = None,
) -> Tensor:
    """-log ZINB(x; mu, theta, zi_logits): the negative binomial distribution, some of it moved to zero.

    With the probability p = sigmoid(zi_logits) of a dropout, sum(-log((1 - p) NB(x))), and where x < 1e-8 sum(-log(p +
    (1 - p) NB(0))), NB as in `negative_binomial_nll`: the values of scvi-tools' log_zinb_positive. Source: Lopez et al.
    2018, "Deep generative modeling for single-cell transcriptomics" (doi:10.1038/s41592-018-0229-2).

    Args:
        mu, x, theta, scale, clamp, eps: as `negative_binomial_nll` takes them.
        zi_logits: logits of the dropout: a tensor that broadcasts to x's shape, or a number.
        weight: of the elements: see `fusedvae.functional`.
        reduction: "batchmean", "sum", "mean", "weighted_mean" or "none".
        dim: with "none", what is summed over: by default all but the batch.
        inplace: write the gradient of mu into its memory: see `fusedvae.functional`.
        packed_dim: with ``theta=None``, the dimension along which mu and theta are halves of ``mu``.
        backend: overrides the process's choice for this call.
    """
    written = unless_usual(scale, clamp, eps, "theta")
    inputs = (mu, x, theta, zi_logits)
    return run_likelihood(
        "zero_inflated_negative_binomial", inputs, written, False, weight, reduction, dim, packed_dim, backend, inplace
    )


def run_likelihood(
    likelihood: str,
    inputs: tuple[Operand, ...],
    written: Written | None,
    full: bool,
    weight: Tensor | None,
    reduction: str,
    dim: Dim,
    packed_dim: int,
    backend: str | None,
    inplace: bool = False,
) -> Tensor:
    """A likelihood alone: the beta of the divergence that is not there is None."""
    weighting: tuple[Operand, ...] = ()
    if weight is not None:
        weighting = weighting_of("weight", weight, reduction, "x", inputs[1], 0.0, packed_dim)
    operands = (*inputs, *weighting, None)
    if isinstance(dim, list):
        dim = tuple(dim)
    inplace = inplace and may_be_in_place()
    call = find(
        _likelihood_call,
        operands,
        likelihood,
        written,
        len(weighting),
        full,
        reduction,
        dim,
        packed_dim,
        backend,
        inplace,
    )
    if inplace:
        check_memory(call, operands)
    return autograd.objective(call, operands)[0]


def _likelihood_call(
    operands: Operands,
    likelihood: str,
    written: Written | None,
    weighting: int,
    full: bool,
    reduction: str,
    dim: Dim,
    packed_dim: int,
    backend: str | None,
    inplace: bool,
) -> autograd.DifferentiableObjective:
    formula = LIKELIHOODS[likelihood]
    inputs = operands[: len(formula.inputs)]
    check_likelihood(formula, inputs, formula.inputs, packed_dim)
    forms = [checked_form(("scale", "clamp", "eps"), written, formula)] if formula.scales else []
    x = inputs[1]
    assert isinstance(x, Tensor)
    return objective_call(
        operands,
        [(formula, forms, weighting)],
        (checked_reduction(reduction),),
        checked_dim(dim, x.dim(), reduction),
        packed_dim,
        backend,
        full=full,
        inplace=inplace,
    )


def checked_likelihood(likelihood: object) -> Formula:
    try:
        return LIKELIHOODS[likelihood]  # type: ignore[index]
    except (KeyError, TypeError):
        expected = ", ".join(map(repr, LIKELIHOODS))
        raise ValueError(f"likelihood: expected one of {expected}; got {likelihood!r}") from None


def inputs_of(
    likelihood: str,
    recon_x: Tensor,
    x: Tensor,
    scale: Tensor | float | None,
    extra: Tensor | float | None,
    pos_weight: Tensor | float | None,
    zi_logits: Tensor | float | None,
) -> tuple[Operand, ...]:
    """The inputs of a likelihood: as many of these as it has."""
    formula = checked_likelihood(likelihood)
    others = formula.inputs[2:]
    found: tuple[Operand, ...] = (recon_x, x)
    if formula.pairs:
        found = (recon_x, x, scale)
    elif isinstance(scale, Tensor) or scale:
        what = f"none, as the {likelihood} likelihood has no scale"
        raise ValueError(f"recon_logvar: expected {what}; got {shown(scale)}")
    if formula.pairs and isinstance(scale, (int, float)) and not scale and "theta" in others:
        raise ValueError(f"recon_logvar: expected theta, as the likelihood is {likelihood}; got {scale}")
    if "extra" in others:
        found = (*found, 0.0 if extra is None else extra)
    elif extra is not None:
        raise ValueError(f"extra: expected None, as the {likelihood} likelihood has no such input; got {shown(extra)}")
    if "pos_weight" in others:
        found = (*found, 1.0 if pos_weight is None else pos_weight)
    elif pos_weight is not None:
        raise ValueError(
            f"pos_weight: expected None, as the {likelihood} likelihood has no such input; got {shown(pos_weight)}"
        )
    if "zi_logits" in others:
        if zi_logits is None:
            raise TypeError(f"zi_logits: expected a tensor or a number, as the likelihood is {likelihood}; got None")
        found = (*found, zi_logits)
    elif zi_logits is not None:
        raise ValueError(
            f"zi_logits: expected None, as the {likelihood} likelihood has no such input; got {shown(zi_logits)}"
        )
    return found


def check_likelihood(formula: Formula, inputs: Operands, names: Sequence[str], packed_dim: int) -> None:
    """Check the inputs of a likelihood: recon_x, x, and whatever else it has, which broadcasts to x's shape."""
    recon_x, x, *others = inputs
    first, *_ = names
    check_tensor(first, recon_x)
    check_tensor("x", x, integers=True)
    assert isinstance(recon_x, Tensor)
    assert isinstance(x, Tensor)
    check_batched("x", x)
    check_same_device("x", x, first, recon_x)
    is_packed = any(inputs[scale] is None for _, scale in formula.pairs)
    if is_packed:
        check_packed(first, recon_x, packed_dim, x.shape)
    elif recon_x.shape != x.shape:
        raise ValueError(f"x: expected the shape of {first} {tuple(recon_x.shape)}, got {tuple(x.shape)}")
    for name, value in zip(names[2:], others, strict=False):
        if value is not None:
            check_parameter(name, value, x.shape, first, recon_x)


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: Literal["mean", "sum", "none"] = "mean",
    *,
    check: bool = True,
    backend: Backend | None = None,
) -> Tensor:
    """`torch.nn.functional.gaussian_nll_loss`, its signature and its results, in one pass.

    (log v + (input - target)^2 / v [+ log 2 pi]) / 2 with v = max(var, eps); the clamp is invisible to autograd.

    Args:
        input: mean of the Gaussian.
        target: sample of it, broadcastable against input.
        var: variance: input's shape, or that with its last dimension missing or one dimension of size 1, or a float.
        full: add the constant log(2 pi) / 2 an element.
        eps: lower bound of the variance.
        reduction: "mean" (over elements), "sum" or "none" (one value per element).
        check: look for negative variances, as PyTorch does; on a GPU the host waits for that. Without it, they count as
            eps.
        backend: overrides the process's choice for this call.

    Raises:
        ValueError: a negative variance (not looked for in compiled or transformed code, where torch's own check would
            break the graph), a variance or target of another shape, or an unknown reduction.
    """
    check_tensor("input", input)
    check_tensor("target", target, integers=True)
    check_same_device("target", target, "input", input)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    spread: Tensor | float
    if isinstance(var, Tensor):
        check_tensor("var", var)
        check_same_device("var", var, "input", input)
        if check and not torch.compiler.is_compiling() and not is_transformed((var,)) and torch.any(var < 0):
            raise ValueError("var: has negative entries")
        spread = var
        if var.shape != input.shape:
            if var.shape == input.shape[:-1]:
                spread = var.unsqueeze(-1)
            elif var.dim() != input.dim() or sum(v for s, v in zip(input.shape, var.shape, strict=True) if s != v) != 1:
                raise ValueError(f"var: expected a shape that fits {tuple(input.shape)}, got {tuple(var.shape)}")
            else:
                check_broadcast("var", var, input.shape)
    elif isinstance(var, numbers.Real):
        if var < 0:
            raise ValueError(f"var: expected at least 0, got {var}")
        spread = float(var)
    else:
        raise TypeError(f"var: expected a tensor or a number, got {type(var).__name__}")
    if not isinstance(eps, numbers.Real):
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
    if input.shape != target.shape:
        try:
            dtype = torch.result_type(input, target)  # in which a 0-dim tensor has no say
            input, target = torch.broadcast_tensors(*[t.to(dtype) if t.dim() == 0 else t for t in (input, target)])
        except RuntimeError:
            raise ValueError(
                f"target: expected a shape that broadcasts with input's {tuple(input.shape)}, got {tuple(target.shape)}"
            ) from None
    if input.dim() == 0:
        input, target = input.view(1), target.view(1)
        spread = spread.view(1) if isinstance(spread, Tensor) else spread
        reduction = "sum" if reduction == "none" else reduction
    operands = (input, target, spread, None)
    return autograd.objective(find(_variance_call, operands, full, float(eps), reduction, backend), operands)[0]


def _variance_call(
    operands: Operands, full: bool, eps: float, reduction: str, backend: str | None
) -> autograd.DifferentiableObjective:
    """Of variances that are bounded by eps, of which their gradients know nothing."""
    terms = [(FORMULAS["gaussian_nll"], [Form("bounded", eps=eps)], 0)]
    return objective_call(operands, terms, (reduction,), () if reduction == "none" else None, 1, backend, full=full)
