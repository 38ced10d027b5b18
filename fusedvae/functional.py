"""The operations as functions: what the modules are made of.

Every function checks its arguments before anything runs (TypeError and ValueError name the argument, what came and
what was expected), then runs on the backend chosen by ``backend=``, else by `fusedvae.use_backend`.

Common to all:

* a batch is dimension 0; the shapes are otherwise free. Any strides are taken; contiguous and channels_last
  tensors, halves of packed tensors and broadcast operands without a copy, others with one.
* dtypes float64, float32, bfloat16 and float16, mixed as in PyTorch's arithmetic (targets may also be integers).
  Work is done in float32, or float64 if an operand is; values have the promoted dtype of the operands, or float32
  under autocast, as for PyTorch's own losses. Each gradient has its operand's dtype.
* a mean and a log-variance may come packed in one tensor, halves along dimension 1 (or ``packed_dim``, -1 for the
  tokens of a transformer): pass it in the mean's place and None, said out loud, in the log-variance's.
* reductions: "batchmean" (sum over everything, divided by the batch size), "sum", "none" (one value per sample).

Formulas: Kingma & Welling 2014, "Auto-Encoding Variational Bayes" (arXiv:1312.6114), appendix B.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autograd, ops
from .backend import resolve
from .backend.reference import GIVEN, LIKELIHOODS, Formula, Objective, half_of
from .calls import LatentSpec, Operand, Operands, find
from .layout import broadcasts
from .torch_private import is_transformed

_FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_REDUCTIONS = {"batchmean": "batchmean", "sum": "sum", "none": "sample"}


_FORGOTTEN: Any = object()
"""Stands for a log-variance that was not given: None says that it is packed in the mean."""


class Latent(NamedTuple):
    """What `latent` returns."""

    z: Tensor
    """The sample, of mu's shape."""
    kl: Tensor
    """KL(q || N(0, I)), shape (batch,)."""


class ELBOTerms(NamedTuple):
    """The loss and its two terms, reduced alike, each differentiable on its own: loss = nll + beta * kl."""

    loss: Tensor
    nll: Tensor
    kl: Tensor


# --- checks -----------------------------------------------------------------------------------------------------


def _check_tensor(name: str, value: object, *, integers: bool = False) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(f"{name}: expected a strided tensor, got a nested one")
    if value.dtype not in _FLOATS and not (
        integers and not value.dtype.is_complex and not value.dtype.is_floating_point
    ):
        kinds = "a float" + (" or integer" if integers else "")
        raise TypeError(f"{name}: expected {kinds} tensor, got {value.dtype}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, got one of layout {value.layout}")


def _check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name}: expected on {other.device}, where {other_name} is; got it on {value.device}")


def _check_batched(name: str, value: Tensor) -> None:
    if value.dim() == 0:
        raise ValueError(f"{name}: expected a batch dimension, got a 0-dim tensor")


def _check_packed(name: str, value: Tensor, dim: int, expected: torch.Size | None = None) -> None:
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"packed_dim: expected an integer, got {type(dim).__name__}")
    if value.dim() >= 2 and (not -value.dim() <= dim < value.dim() or dim % value.dim() == 0):
        raise ValueError(
            f"packed_dim: expected a dimension of {name}, of shape {tuple(value.shape)}, not the batch; got {dim}"
        )
    if value.dim() < 2 or value.shape[dim] % 2:
        raise ValueError(
            f"{name}: packed (no log-variance given), expected an even size along dimension {dim}, "
            f"got shape {tuple(value.shape)}"
        )
    if expected is not None and half_of(value.shape, dim) != expected:
        raise ValueError(
            f"{name}: packed (no log-variance given), expected the shape of x {tuple(expected)} with twice the size "
            f"along dimension {dim}, got {tuple(value.shape)}"
        )


def _check_latents(mu: object, logvar: object, packed_dim: int) -> None:
    _check_tensor("mu", mu)
    _check_batched("mu", mu)  # type: ignore[arg-type]
    if logvar is None:
        _check_packed("mu", mu, packed_dim)  # type: ignore[arg-type]
        return
    _check_tensor("logvar", logvar)
    assert isinstance(mu, Tensor)
    assert isinstance(logvar, Tensor)
    if mu.shape != logvar.shape:
        raise ValueError(f"logvar: expected the shape of mu {tuple(mu.shape)}, got {tuple(logvar.shape)}")
    _check_same_device("logvar", logvar, "mu", mu)


def _check_divergence(inputs: Operands, packed_dim: int) -> None:
    """Check the inputs of a divergence: mu, logvar, and perhaps the prior's, which broadcast to mu's shape."""
    mu, logvar, *prior = inputs
    _check_latents(mu, logvar, packed_dim)
    assert isinstance(mu, Tensor)
    shape = mu.shape if logvar is not None else half_of(mu.shape, packed_dim)
    if not prior:
        return
    prior_mu, prior_logvar = prior
    if prior_logvar is None:
        _check_tensor("prior_mu", prior_mu)
        assert isinstance(prior_mu, Tensor)
        _check_same_device("prior_mu", prior_mu, "mu", mu)
        _check_packed("prior_mu", prior_mu, packed_dim)
        if not broadcasts(half_of(prior_mu.shape, packed_dim), shape):
            raise ValueError(
                f"prior_mu: packed (no log-variance given), expected a shape whose halves along dimension {packed_dim} "
                f"broadcast to {tuple(shape)}, got {tuple(prior_mu.shape)}"
            )
        return
    _check_parameter("prior_mu", prior_mu, shape, "mu", mu)
    _check_parameter("prior_logvar", prior_logvar, shape, "mu", mu)


def _checked_likelihood(likelihood: object) -> Formula:
    try:
        return LIKELIHOODS[likelihood]  # type: ignore[index]
    except (KeyError, TypeError):
        expected = ", ".join(map(repr, LIKELIHOODS))
        raise ValueError(f"likelihood: expected one of {expected}; got {likelihood!r}") from None


def _check_likelihood(formula: Formula, inputs: Operands, names: Sequence[str], packed_dim: int) -> None:
    """Check the inputs of a likelihood: recon_x, x, and whatever else it has, which broadcasts to x's shape."""
    recon_x, x, *others = inputs
    _check_tensor("recon_x", recon_x)
    _check_tensor("x", x, integers=True)
    assert isinstance(recon_x, Tensor)
    assert isinstance(x, Tensor)
    _check_batched("x", x)
    _check_same_device("x", x, "recon_x", recon_x)
    is_packed = any(inputs[scale] is None for _, scale in formula.pairs)
    if is_packed:
        _check_packed("recon_x", recon_x, packed_dim, x.shape)
    elif recon_x.shape != x.shape:
        raise ValueError(f"x: expected the shape of recon_x {tuple(recon_x.shape)}, got {tuple(x.shape)}")
    for name, value in zip(names[2:], others, strict=False):
        if value is not None:
            _check_parameter(name, value, x.shape, "recon_x", recon_x)


def _check_parameter(name: str, value: object, shape: torch.Size, other_name: str, other: Tensor) -> None:
    """Check what may be a number, or a tensor that broadcasts to a shape and lies where another does."""
    if isinstance(value, Tensor):
        _check_tensor(name, value)
        _check_same_device(name, value, other_name, other)
        _check_broadcast(name, value, shape)
    elif not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a tensor, a number or None, got {type(value).__name__}")


def _check_broadcast(name: str, value: Tensor, shape: torch.Size) -> None:
    if not broadcasts(value.shape, shape):
        raise ValueError(f"{name}: expected a shape that broadcasts to {tuple(shape)}, got {tuple(value.shape)}")


def _checked_reduction(reduction: object) -> str:
    if reduction == "mean":
        raise ValueError(
            "reduction: 'mean' over elements is refused, because the likelihood and the KL have different element "
            "counts and their balance would change; expected 'batchmean', 'sum' or 'none'"
        )
    if not isinstance(reduction, str) or reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: expected 'batchmean', 'sum' or 'none', got {reduction!r}")
    return _REDUCTIONS[reduction]


def _check_number(name: str, value: object) -> None:
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.dtype.is_floating_point:
            raise ValueError(
                f"{name}: expected a number or a 0-dim float tensor, got shape {tuple(value.shape)}, {value.dtype}"
            )
    elif not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number or a 0-dim tensor, got {type(value).__name__}")


def _check_generator(generator: object) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")


def _value_dtype(device_type: str, *operands: Tensor | float | None) -> torch.dtype:
    """The dtype of a loss over these operands: 0-dim tensors have no say beside others, as in PyTorch's arithmetic."""
    tensors = [t for t in operands if isinstance(t, Tensor) and t.dtype.is_floating_point]
    promoted = reduce(torch.promote_types, [t.dtype for t in tensors if t.dim() > 0] or [t.dtype for t in tensors])
    if promoted not in (torch.float32, torch.float64) and torch.is_autocast_enabled(device_type):
        return torch.float32
    return promoted


# --- the latent -------------------------------------------------------------------------------------------------


def reparameterize(
    mu: Tensor,
    logvar: Tensor | None,
    *,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    packed_dim: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Sample z = mu + exp(logvar / 2) * eps, eps ~ N(0, 1), differentiable in mu and logvar.

    Args:
        mu: mean of q, shape (batch, ...); or mean and log-variance packed, with ``logvar=None``.
        logvar: log-variance of q, mu's shape.
        generator: where the noise's seed comes from; the device's default generator without it.
        noise: eps itself, mu's shape, instead of fresh noise.
        packed_dim: the dimension that halves of packed tensors are along.
        backend: overrides the process's choice for this call.

    Returns:
        z, of mu's shape (half a packed one's) and the promoted dtype of mu and logvar.
    """
    _check_generator(generator)
    if noise is not None and generator is not None:
        raise ValueError("generator: expected None when noise is given, which leaves nothing to draw")
    return _sampled(mu, logvar, noise, generator, False, packed_dim, backend)[0]


def _sampled(
    mu: Tensor,
    logvar: Tensor | None,
    noise: Tensor | None,
    generator: torch.Generator | None,
    has_kl: bool,
    packed_dim: int,
    backend: str | None,
) -> Sequence[Tensor]:
    call = find(_latent_call, (mu, logvar, noise), has_kl, packed_dim, backend)
    seed = None
    if noise is None:
        seed = ops.draw_seed(mu.device, generator, by_dispatcher=call.is_dispatched)
    return autograd.latent(call, (mu, logvar, seed, noise))


def _latent_call(operands: Operands, has_kl: bool, packed_dim: int, backend: str | None) -> autograd.RecordedLatent:
    mu, logvar, noise = operands
    _check_latents(mu, logvar, packed_dim)
    assert isinstance(mu, Tensor)
    if noise is not None:
        _check_tensor("noise", noise)
        assert isinstance(noise, Tensor)
        expected = mu.shape if logvar is not None else half_of(mu.shape, packed_dim)
        if tuple(noise.shape) != tuple(expected):
            raise ValueError(f"noise: expected shape {tuple(expected)}, got {tuple(noise.shape)}")
        _check_same_device("noise", noise, "mu", mu)
    kl_dtype = _value_dtype(mu.device.type, mu, logvar) if has_kl else None
    spec = LatentSpec(kl_dtype, packed_dim, _backend_for(operands, backend))
    # The seed is drawn when all is checked; what it is like is known.
    seed = torch.empty((), dtype=torch.int64, device=mu.device) if noise is None else None
    return autograd.RecordedLatent((mu, logvar, seed, noise), spec)


def latent(
    mu: Tensor,
    logvar: Tensor | None,
    *,
    generator: torch.Generator | None = None,
    packed_dim: int = 1,
    backend: str | None = None,
) -> Latent:
    """Sample the latent and take its KL to the prior, in one pass over mu and logvar.

    z = mu + exp(logvar / 2) * eps; kl = sum((mu^2 + expm1(logvar) - logvar) / 2), a value per sample.

    Args:
        mu: mean of q, shape (batch, ...); or mean and log-variance packed, with ``logvar=None``.
        logvar: log-variance of q, mu's shape.
        generator: where the noise's seed comes from; the device's default generator without it.
        packed_dim: the dimension that halves of packed tensors are along.
        backend: overrides the process's choice for this call.

    Returns:
        `Latent` (z, kl): z of mu's shape (half a packed one's), kl of shape (batch,).
    """
    _check_generator(generator)
    z, kl = _sampled(mu, logvar, None, generator, True, packed_dim, backend)
    return Latent(z, kl)


def kl_standard_normal(
    mu: Tensor, logvar: Tensor | None, *, reduction: str = "batchmean", packed_dim: int = 1, backend: str | None = None
) -> Tensor:
    """KL(N(mu, diag e^logvar) || N(0, I)) = sum((mu^2 + expm1(logvar) - logvar) / 2).

    Args:
        mu: mean of q, shape (batch, ...); or mean and log-variance packed, with ``logvar=None``.
        logvar: log-variance of q, mu's shape.
        reduction: "batchmean", "sum" or "none" (shape (batch,)).
        packed_dim: the dimension that halves of packed tensors are along.
        backend: overrides the process's choice for this call.
    """
    operands = (mu, logvar, 1.0)
    call = find(_divergence_call, operands, "kl_standard_normal", reduction, packed_dim, backend)
    return autograd.objective(call, operands)[0]


def _divergence_call(
    operands: Operands, formula: str, reduction: str, packed_dim: int, backend: str | None
) -> autograd.RecordedObjective:
    """Of a divergence alone, of its inputs and 1, its coefficient."""
    _check_divergence(operands[:-1], packed_dim)
    return _objective_call(operands, (formula,), _checked_reduction(reduction), packed_dim, backend)


def kl_normal(
    mu: Tensor,
    logvar: Tensor | None,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None,
    *,
    reduction: str = "batchmean",
    packed_dim: int = 1,
    backend: str | None = None,
) -> Tensor:
    """KL(N(mu, diag e^logvar) || N(prior_mu, diag e^prior_logvar)), differentiable in all four.

    sum((expm1(d) - d + (mu - prior_mu)^2 e^-prior_logvar) / 2) with d = logvar - prior_logvar. Source: Kingma &
    Welling 2014 (arXiv:1312.6114), appendix B, for any two normal distributions.

    Args:
        mu: mean of q, shape (batch, ...); or mean and log-variance packed, with ``logvar=None``.
        logvar: log-variance of q, mu's shape.
        prior_mu: mean of p: a tensor that broadcasts to mu's shape, or a number; or mean and log-variance packed, with
            ``prior_logvar=None``. Without both, p = N(0, I).
        prior_logvar: log-variance of p: a tensor that broadcasts to mu's shape, or a number.
        reduction: "batchmean", "sum" or "none" (shape (batch,)).
        packed_dim: the dimension that halves of packed tensors are along.
        backend: overrides the process's choice for this call.
    """
    formula, prior = _prior_of(prior_mu, prior_logvar)
    operands = (mu, logvar, *prior, 1.0)
    call = find(_divergence_call, operands, formula, reduction, packed_dim, backend)
    return autograd.objective(call, operands)[0]


def _prior_of(prior_mu: Operand, prior_logvar: Operand) -> tuple[str, tuple[Operand, ...]]:
    """The divergence to this prior, and its inputs that are the prior's."""
    if prior_mu is None:
        if prior_logvar is not None:
            raise ValueError("prior_logvar: expected None without prior_mu; a prior of mean 0 has prior_mu=0.0")
        return "kl_standard_normal", ()
    return "kl_normal", (prior_mu, prior_logvar)


# --- the likelihood ---------------------------------------------------------------------------------------------


def gaussian_nll(
    recon_x: Tensor,
    x: Tensor,
    recon_logvar: Tensor | float | None = 0.0,
    *,
    full: bool = False,
    reduction: str = "batchmean",
    packed_dim: int = 1,
    backend: str | None = None,
) -> Tensor:
    """-log N(x; recon_x, diag e^recon_logvar) = sum((l + (recon_x - x)^2 e^-l [+ log 2 pi]) / 2), l = recon_logvar.

    Args:
        recon_x: decoder mean, shape (batch, ...); or mean and log-variance packed, with ``recon_logvar=None``.
        x: data, the shape of the mean; may be of integers.
        recon_logvar: decoder log-variance: a tensor that broadcasts to x's shape, or a number.
        full: add the constant log(2 pi) / 2 an element.
        reduction: "batchmean", "sum" or "none" (shape (batch,)).
        packed_dim: the dimension that halves of packed tensors are along.
        backend: overrides the process's choice for this call.
    """
    return _likelihood("gaussian", (recon_x, x, recon_logvar, None), full, reduction, packed_dim, backend)


def _likelihood(
    likelihood: str, operands: Operands, full: bool, reduction: str, packed_dim: int, backend: str | None
) -> Tensor:
    """A likelihood alone, of its inputs (and None, the beta of a divergence that is not there)."""
    call = find(_likelihood_call, operands, likelihood, full, reduction, packed_dim, backend)
    return autograd.objective(call, operands)[0]


def _likelihood_call(
    operands: Operands, likelihood: str, full: bool, reduction: str, packed_dim: int, backend: str | None
) -> autograd.RecordedObjective:
    formula = LIKELIHOODS[likelihood]
    _check_likelihood(formula, operands[:-1], formula.inputs, packed_dim)
    return _objective_call(operands, (formula.name,), _checked_reduction(reduction), packed_dim, backend, full=full)


def laplace_nll(
    recon_x: Tensor,
    x: Tensor,
    log_scale: Tensor | float | None = 0.0,
    *,
    extra: Tensor | float | None = None,
    full: bool = False,
    reduction: str = "batchmean",
    packed_dim: int = 1,
    backend: str | None = None,
) -> Tensor:
    """-log Laplace(x; recon_x, b) = sum((abs(recon_x - x) + extra) / b + log b [+ log 2]), b = e^log_scale.

    With ``extra``, what else is divided by the scale: a perceptual loss, as in the autoencoders of latent diffusion
    (Esser et al. 2021, arXiv:2012.09841). Source of the density: Kotz, Kozubowski & Podgórski 2001, section 2.1.

    Args:
        recon_x: decoder median, shape (batch, ...); or median and log-scale packed, with ``log_scale=None``.
        x: data, the shape of the median; may be of integers.
        log_scale: logarithm of the scale b: a tensor that broadcasts to x's shape, or a number.
        extra: added to the absolute error of each element: a tensor that broadcasts to x's shape, or a number.
        full: add the constant log 2 per element.
        reduction: "batchmean", "sum" or "none" (shape (batch,)).
        packed_dim: the dimension that halves of packed tensors are along.
        backend: overrides the process's choice for this call.
    """
    inputs = (recon_x, x, log_scale, 0.0 if extra is None else extra)
    return _likelihood("laplace", (*inputs, None), full, reduction, packed_dim, backend)


def gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
    *,
    backend: str | None = None,
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
        backend: overrides the process's choice for this call.

    Raises:
        ValueError: a negative variance (not looked for in compiled or transformed code, where torch's own check would
            break the graph), a variance or target of another shape, or an unknown reduction.
    """
    _check_tensor("input", input)
    _check_tensor("target", target, integers=True)
    _check_same_device("target", target, "input", input)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    spread: Tensor | float
    if isinstance(var, Tensor):
        _check_tensor("var", var)
        _check_same_device("var", var, "input", input)
        if not torch.compiler.is_compiling() and not is_transformed((var,)) and torch.any(var < 0):
            raise ValueError("var: has negative entries")
        spread = var
        if var.shape != input.shape:
            if var.shape == input.shape[:-1]:
                spread = var.unsqueeze(-1)
            elif var.dim() != input.dim() or sum(v for s, v in zip(input.shape, var.shape, strict=True) if s != v) != 1:
                raise ValueError(f"var: expected a shape that fits {tuple(input.shape)}, got {tuple(var.shape)}")
            else:
                _check_broadcast("var", var, input.shape)
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
            input, target = torch.broadcast_tensors(input, target)
        except RuntimeError:
            raise ValueError(
                f"target: expected a shape that broadcasts with input's {tuple(input.shape)}, got {tuple(target.shape)}"
            ) from None
    if input.dim() == 0:
        input, target = input.view(1), target.view(1)
        spread = spread.view(1) if isinstance(spread, Tensor) else spread
        how = "sum" if reduction == "none" else reduction
    else:
        how = "element" if reduction == "none" else reduction
    operands = (input, target, spread, None)
    return autograd.objective(find(_variance_call, operands, full, float(eps), how, backend), operands)[0]


def _variance_call(
    operands: Operands, full: bool, eps: float, reduction: str, backend: str | None
) -> autograd.RecordedObjective:
    return _objective_call(operands, ("gaussian_nll_of_variance",), reduction, 1, backend, full=full, parameter=eps)


# --- the bound --------------------------------------------------------------------------------------------------


def elbo_loss(
    recon_x: Tensor,
    x: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None = _FORGOTTEN,
    recon_logvar: Tensor | float | None = 0.0,
    *,
    likelihood: str = "gaussian",
    prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = None,
    kl: Tensor | None = None,
    beta: float | Tensor = 1.0,
    full: bool = False,
    extra: Tensor | float | None = None,
    reduction: str = "batchmean",
    return_terms: bool = False,
    packed_dim: int = 1,
    backend: str | None = None,
) -> Tensor | ELBOTerms:
    """The negative evidence lower bound, NLL(x; recon_x, recon_logvar) + beta * KL(q || p), p = N(0, I) unless given.

    Terms as in `gaussian_nll` (or the function of another likelihood) and `kl_normal`, each summed over everything but
    the batch.

    Args:
        recon_x: decoder mean, shape (batch, ...); or mean and log-variance packed, with ``recon_logvar=None``.
        x: data, the shape of the mean; may be of integers.
        mu: mean of q, shape (batch, ...); or mean and log-variance packed, with ``logvar=None``.
        logvar: log-variance of q, mu's shape.
        recon_logvar: decoder log-variance, or what else a likelihood has for a scale: a tensor that broadcasts to x's
            shape, or a number.
        likelihood: a name of `fusedvae.backend.reference.LIKELIHOODS`: "gaussian", "laplace".
        prior_mu: mean of the prior: a tensor that broadcasts to mu's shape, or a number; or mean and log-variance
            packed, with ``prior_logvar=None``. Without both, the prior is N(0, I).
        prior_logvar: log-variance of the prior: a tensor that broadcasts to mu's shape, or a number.
        kl: the per-sample KL that `latent` returned, instead of ``mu`` and ``logvar`` (both None then).
        beta: weight of the KL: a number, or a 0-dim tensor, whose value may change under a captured or compiled
            program, and which may need a gradient.
        full: add the likelihood's constant (log(2 pi) / 2 of a Gaussian) an element of x.
        extra: a further input of a likelihood that has one.
        reduction: "batchmean", "sum" or "none" (shape (batch,)).
        return_terms: return `ELBOTerms` (loss, nll, kl), each differentiable on its own.
        packed_dim: the dimension that halves of packed tensors are along.
        backend: overrides the process's choice for this call.
    """
    inputs = _inputs_of(likelihood, recon_x, x, recon_logvar, extra)
    if logvar is _FORGOTTEN:
        if kl is None:
            raise TypeError("logvar: expected a tensor beside mu, or None if both are packed in mu; got nothing")
        logvar = None
    if kl is None:
        divergence, prior = _prior_of(prior_mu, prior_logvar)
        operands: tuple[Operand, ...] = (*inputs, mu, logvar, *prior, beta)
    else:
        divergence, operands = GIVEN.name, (*inputs, kl, beta)
        if mu is not None or logvar is not None:
            raise ValueError("kl: expected None when mu or logvar is given; they say the same thing")
        if prior_mu is not None or prior_logvar is not None:
            raise ValueError("kl: expected None when prior_mu or prior_logvar is given; it is to a prior already")
    call = find(_elbo_call, operands, likelihood, divergence, full, reduction, return_terms, packed_dim, backend)
    values = autograd.objective(call, operands)
    return ELBOTerms(*values[:3]) if return_terms else values[0]


def _inputs_of(
    likelihood: str, recon_x: Tensor, x: Tensor, scale: Tensor | float | None, extra: Tensor | float | None
) -> tuple[Operand, ...]:
    """The inputs of a likelihood: as many of these as it has."""
    formula = _checked_likelihood(likelihood)
    inputs = (recon_x, x, scale, 0.0 if extra is None else extra)[: len(formula.inputs)]
    if extra is not None and "extra" not in formula.inputs:
        raise ValueError(f"extra: expected None, as the {likelihood} likelihood has no such input")
    return inputs


def _elbo_call(
    operands: Operands,
    likelihood: str,
    divergence: str,
    full: bool,
    reduction: str,
    return_terms: bool,
    packed_dim: int,
    backend: str | None,
) -> autograd.RecordedObjective:
    formula = LIKELIHOODS[likelihood]
    count = len(formula.inputs)
    _check_likelihood(formula, operands[:count], ("recon_x", "x", "recon_logvar", "extra"), packed_dim)
    x, latents, beta = operands[1], operands[count:-1], operands[-1]
    assert isinstance(x, Tensor)
    if divergence != GIVEN.name:
        _check_divergence(latents, packed_dim)
        name, first = "mu", latents[0]
    else:
        (kl,) = latents
        _check_tensor("kl", kl)
        name, first = "kl", kl
        assert isinstance(kl, Tensor)
        if kl.dim() != 1:
            raise ValueError(f"kl: expected one value per sample, shape ({x.shape[0]},), got {tuple(kl.shape)}")
    assert isinstance(first, Tensor)
    if first.shape[0] != x.shape[0]:
        raise ValueError(f"{name}: expected the batch size of x, {x.shape[0]}, got {first.shape[0]}")
    if first.device != x.device:
        raise ValueError(f"{name}: expected on {x.device}, where x is; got it on {first.device}")
    _check_number("beta", beta)
    return _objective_call(
        operands,
        (formula.name, divergence),
        _checked_reduction(reduction),
        packed_dim,
        backend,
        full=full,
        returns_terms=return_terms,
    )


def _backend_for(operands: Operands, requested: str | None) -> str:
    """The backend that serves these operands: the reference where only operations of PyTorch can."""
    first = operands[0]
    assert isinstance(first, Tensor)
    name = resolve(first.device.type, requested)
    return "reference" if is_transformed(operands) else name


def _objective_call(
    operands: Operands,
    formulas: tuple[str, ...],
    reduction: str,
    packed_dim: int,
    backend: str | None,
    *,
    full: bool = False,
    parameter: float = 0.0,
    returns_terms: bool = False,
) -> autograd.RecordedObjective:
    """The call of an objective of these formulas' terms, whose inputs, and beta behind them, have been checked."""
    first = operands[0]
    assert isinstance(first, Tensor)
    enabled, beta = torch.is_grad_enabled(), operands[-1]
    needed = [enabled and isinstance(t, Tensor) and t.requires_grad for t in operands[:-1]]
    if formulas[-1] == GIVEN.name:
        needed[-1] = False  # not made by kernels
    spec = Objective(
        formulas,
        parameter,
        packed_dim,
        bool(full),
        reduction,
        _value_dtype(first.device.type, *operands[:-1]),
        bool(returns_terms) or (isinstance(beta, Tensor) and beta.requires_grad),  # its gradient is the divergence
        (*needed, False),
        _backend_for(operands, backend),
    )
    return autograd.RecordedObjective(operands, spec)
