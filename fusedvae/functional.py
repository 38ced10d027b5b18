"""The operations as functions: what the modules are made of.

Every function checks its arguments before anything runs (TypeError and ValueError name the argument, what came and
what was expected), then runs on the backend chosen by ``backend=``, else by `fusedvae.use_backend`.

Common to all:

* a batch is dimension 0; the shapes are otherwise free. Any strides are taken; contiguous and channels_last
  tensors, halves of packed tensors and broadcast operands without a copy, others with one.
* dtypes float64, float32, bfloat16 and float16, mixed as in PyTorch's arithmetic (targets may also be integers).
  Work is done in float32, or float64 if an operand is; values have the promoted dtype of the operands, or float32
  under autocast, as for PyTorch's own losses. Each gradient has its operand's dtype.
* a mean and a log-variance may come packed in one tensor, halves along dimension 1: pass it in the mean's place and
  None in the log-variance's.
* reductions: "batchmean" (sum over everything, divided by the batch size), "sum", "none" (one value a sample).

Formulas: Kingma & Welling 2014, "Auto-Encoding Variational Bayes" (arXiv:1312.6114), appendix B.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from functools import partial, reduce, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .autograd import elbo_formula
from .backend import current_choice, reference, resolve
from .ops import unpack

_FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_KERNEL_DTYPES = _FLOATS | {torch.uint8}
_REDUCTIONS = {"batchmean": "batchmean", "sum": "sum", "none": "sample"}


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


def _check_packed(name: str, value: Tensor, expected: torch.Size | None = None) -> None:
    if value.dim() < 2 or value.shape[1] % 2:
        raise ValueError(
            f"{name}: packed (no log-variance given), expected an even size along dimension 1, "
            f"got shape {tuple(value.shape)}"
        )
    if expected is not None and (value.shape[0], value.shape[1] // 2, *value.shape[2:]) != tuple(expected):
        raise ValueError(
            f"{name}: packed (no log-variance given), expected the shape of x {tuple(expected)} with twice the size "
            f"along dimension 1, got {tuple(value.shape)}"
        )


def _check_latents(mu: object, logvar: object) -> None:
    _check_tensor("mu", mu)
    _check_batched("mu", mu)  # type: ignore[arg-type]
    if logvar is None:
        _check_packed("mu", mu)  # type: ignore[arg-type]
        return
    _check_tensor("logvar", logvar)
    assert isinstance(mu, Tensor)
    assert isinstance(logvar, Tensor)
    if mu.shape != logvar.shape:
        raise ValueError(f"logvar: expected the shape of mu {tuple(mu.shape)}, got {tuple(logvar.shape)}")
    _check_same_device("logvar", logvar, "mu", mu)


def _check_reconstruction(recon_x: object, x: object, recon_logvar: object) -> None:
    _check_tensor("recon_x", recon_x)
    _check_tensor("x", x, integers=True)
    assert isinstance(recon_x, Tensor)
    assert isinstance(x, Tensor)
    _check_batched("x", x)
    _check_same_device("x", x, "recon_x", recon_x)
    if recon_logvar is None:
        _check_packed("recon_x", recon_x, x.shape)
        return
    if recon_x.shape != x.shape:
        raise ValueError(f"x: expected the shape of recon_x {tuple(recon_x.shape)}, got {tuple(x.shape)}")
    if isinstance(recon_logvar, Tensor):
        _check_tensor("recon_logvar", recon_logvar)
        _check_same_device("recon_logvar", recon_logvar, "recon_x", recon_x)
        _check_broadcast("recon_logvar", recon_logvar, recon_x.shape)
    elif not isinstance(recon_logvar, numbers.Real):
        raise TypeError(f"recon_logvar: expected a tensor, a number or None, got {type(recon_logvar).__name__}")


def _check_broadcast(name: str, value: Tensor, shape: torch.Size) -> None:
    trailing = shape[len(shape) - value.dim() :] if value.dim() <= len(shape) else None
    if trailing is None or any(s not in (1, t) for s, t in zip(value.shape, trailing, strict=True)):
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


# --- what is worked out once ------------------------------------------------------------------------------------

_Call = Callable[..., Any]
"""What computes an operation of operands that have been checked."""


def _remembered(prepare: Callable[..., _Call]) -> Callable[[tuple[Any, ...], tuple[Any, ...]], _Call]:
    """Remember what ``prepare`` returned for operands of the same types, sizes, strides and dtypes.

    Checking the arguments of a call and finding its way takes longer than many of the kernels, and a training loop
    makes the same calls over and over. ``prepare`` takes the operands, the first of which decides the device, then the
    options; it must not depend on values in tensors or on numbers among the operands.
    """
    memory: dict[tuple, _Call] = {}

    @wraps(prepare)
    def remembered(operands: tuple[Any, ...], options: tuple[Any, ...]) -> _Call:
        if ops.is_watched():
            return prepare(*operands, *options)
        try:
            key = (
                # All that may matter of an operand but the values in it.
                *[
                    (type(t), t.shape, t.stride(), t.dtype, t.device, t.requires_grad)
                    if isinstance(t, Tensor)
                    else type(t)
                    for t in operands
                ],
                *options,
                torch.is_grad_enabled(),
                torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(operands[0].device.type),
                current_choice(),
            )
            call = memory.get(key)
        except (AttributeError, RuntimeError, TypeError):  # not a tensor, without strides, or unhashable
            return prepare(*operands, *options)
        if call is None:
            call = prepare(*operands, *options)
            if len(memory) >= _MOST_REMEMBERED:
                memory.clear()
            memory[key] = call
        return call

    return remembered


_MOST_REMEMBERED = 1024


def _value_dtype(device_type: str, *operands: Tensor | float | None) -> torch.dtype:
    """The dtype of a loss over these operands."""
    dtypes = [t.dtype for t in operands if isinstance(t, Tensor) and t.dtype.is_floating_point]
    promoted = reduce(torch.promote_types, dtypes)
    if promoted not in (torch.float32, torch.float64) and torch.is_autocast_enabled(device_type):
        return torch.float32
    return promoted


# --- the latent -------------------------------------------------------------------------------------------------


def reparameterize(
    mu: Tensor,
    logvar: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sample z = mu + exp(logvar / 2) * eps, eps ~ N(0, 1), differentiable in mu and logvar.

    Args:
        mu: mean of q, shape (batch, ...); or mean and log-variance packed, with ``logvar=None``.
        logvar: log-variance of q, mu's shape.
        generator: where the noise's seed comes from; the device's default generator without it.
        noise: eps itself, mu's shape, instead of fresh noise.
        backend: overrides the process's choice for this call.

    Returns:
        z, of mu's shape (half a packed one's) and the promoted dtype of mu and logvar.
    """
    _check_generator(generator)
    if noise is not None and generator is not None:
        raise ValueError("generator: expected None when noise is given, which leaves nothing to draw")
    return _sample_call((mu, logvar, noise), (backend,))(mu, logvar, noise, generator)


@_remembered
def _sample_call(mu: Tensor, logvar: Tensor | None, noise: Tensor | None, backend: str | None) -> _Call:
    _check_latents(mu, logvar)
    if noise is not None:
        _check_tensor("noise", noise)
        expected = mu.shape if logvar is not None else (mu.shape[0], mu.shape[1] // 2, *mu.shape[2:])
        if tuple(noise.shape) != tuple(expected):
            raise ValueError(f"noise: expected shape {tuple(expected)}, got {tuple(noise.shape)}")
        _check_same_device("noise", noise, "mu", mu)
    name = resolve(mu.device.type, backend)
    if name == "reference":
        sample: _Call = _reference_sample
    else:
        sample = ops.reparameterize.prepared(mu, logvar, None, noise, options=(name,))
    if noise is not None:
        return lambda mu, logvar, noise, _: sample(mu, logvar, None, noise)
    device = mu.device
    draw_seed = ops.draw_seed.prepared(device, None)
    return lambda mu, logvar, _, generator: sample(mu, logvar, draw_seed(device, generator), None)


def _reference_sample(mu: Tensor, logvar: Tensor | None, seed: Tensor | None, noise: Tensor | None) -> Tensor:
    mean, log_variance = unpack(mu, logvar)
    if noise is None:
        assert seed is not None
        noise = reference.normal(tuple(mean.shape), seed, reference.working_dtype(mean, log_variance))
    z = reference.sample(mean, log_variance, noise)
    return z.to(torch.promote_types(mean.dtype, log_variance.dtype))


def latent(
    mu: Tensor,
    logvar: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Latent:
    """Sample the latent and take its KL to the prior, in one pass over mu and logvar.

    z = mu + exp(logvar / 2) * eps; kl = sum((mu^2 + expm1(logvar) - logvar) / 2), a value a sample.

    Args:
        mu: mean of q, shape (batch, ...); or mean and log-variance packed, with ``logvar=None``.
        logvar: log-variance of q, mu's shape.
        generator: where the noise's seed comes from; the device's default generator without it.
        backend: overrides the process's choice for this call.

    Returns:
        `Latent` (z, kl): z of mu's shape (half a packed one's), kl of shape (batch,).
    """
    _check_generator(generator)
    return Latent(*_latent_call((mu, logvar), (backend,))(mu, logvar, generator))


@_remembered
def _latent_call(mu: Tensor, logvar: Tensor | None, backend: str | None) -> _Call:
    _check_latents(mu, logvar)
    name = resolve(mu.device.type, backend)
    kl_dtype = _value_dtype(mu.device.type, mu, logvar)
    if name == "reference":
        run: _Call = partial(_reference_latent, kl_dtype)
    else:
        run = ops.latent.prepared(mu, logvar, None, options=(kl_dtype, name))
    device = mu.device
    draw_seed = ops.draw_seed.prepared(device, None)
    return lambda mu, logvar, generator: run(mu, logvar, draw_seed(device, generator))


def _reference_latent(kl_dtype: torch.dtype, mu: Tensor, logvar: Tensor | None, seed: Tensor) -> tuple[Tensor, Tensor]:
    kl = reference.reduce(reference.kl_standard_normal(*unpack(mu, logvar)), "sample")
    return _reference_sample(mu, logvar, seed, None), kl.to(kl_dtype)


def kl_standard_normal(
    mu: Tensor, logvar: Tensor | None = None, *, reduction: str = "batchmean", backend: str | None = None
) -> Tensor:
    """KL(N(mu, diag e^logvar) || N(0, I)) = sum((mu^2 + expm1(logvar) - logvar) / 2).

    Args:
        mu: mean of q, shape (batch, ...); or mean and log-variance packed, with ``logvar=None``.
        logvar: log-variance of q, mu's shape.
        reduction: "batchmean", "sum" or "none" (shape (batch,)).
        backend: overrides the process's choice for this call.
    """
    call = _kl_call((mu, logvar), (reduction, backend))
    return call(None, None, None, mu, logvar, None, 1.0)[0]


@_remembered
def _kl_call(mu: Tensor, logvar: Tensor | None, reduction: str, backend: str | None) -> _Call:
    _check_latents(mu, logvar)
    return _objective_call(None, None, None, mu, logvar, None, 1.0, _checked_reduction(reduction), backend)


# --- the likelihood ---------------------------------------------------------------------------------------------


def gaussian_nll(
    recon_x: Tensor,
    x: Tensor,
    recon_logvar: Tensor | float | None = 0.0,
    *,
    full: bool = False,
    reduction: str = "batchmean",
    backend: str | None = None,
) -> Tensor:
    """-log N(x; recon_x, diag e^recon_logvar) = sum((l + (recon_x - x)^2 e^-l [+ log 2 pi]) / 2), l = recon_logvar.

    Args:
        recon_x: decoder mean, shape (batch, ...); or mean and log-variance packed, with ``recon_logvar=None``.
        x: data, the shape of the mean; may be of integers.
        recon_logvar: decoder log-variance: a tensor that broadcasts to x's shape, or a number.
        full: add the constant log(2 pi) / 2 an element.
        reduction: "batchmean", "sum" or "none" (shape (batch,)).
        backend: overrides the process's choice for this call.
    """
    call = _nll_call((recon_x, x, recon_logvar), (full, reduction, backend))
    return call(recon_x, x, recon_logvar, None, None, None, 0.0)[0]


@_remembered
def _nll_call(
    recon_x: Tensor,
    x: Tensor,
    recon_logvar: Tensor | float | None,
    full: bool,
    reduction: str,
    backend: str | None,
) -> _Call:
    _check_reconstruction(recon_x, x, recon_logvar)
    how = _checked_reduction(reduction)
    return _objective_call(recon_x, x, recon_logvar, None, None, None, 0.0, how, backend, full=full)


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
        reduction: "mean" (over elements), "sum" or "none" (one value an element).
        backend: overrides the process's choice for this call.

    Raises:
        ValueError: a negative variance (not looked for in compiled code, where torch's own check would break the
            graph), a variance or target of another shape, or an unknown reduction.
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
        if not torch.compiler.is_compiling() and torch.any(var < 0):
            raise ValueError("var: has negative entries")
        spread = var
        if var.shape != input.shape:
            if var.shape == input.shape[:-1]:
                spread = var.unsqueeze(-1)
            elif var.dim() != input.dim() or sum(s for s, v in zip(input.shape, var.shape, strict=True) if s != v) == 0:
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
    call = _variance_call((input, target, spread), (full, eps, how, backend))
    return call(input, target, spread, None, None, None, 0.0)[0]


@_remembered
def _variance_call(
    mean: Tensor, x: Tensor, var: Tensor | float, full: bool, eps: float, reduction: str, backend: str | None
) -> _Call:
    return _objective_call(mean, x, var, None, None, None, 0.0, reduction, backend, full=full, floor=float(eps))


# --- the bound --------------------------------------------------------------------------------------------------


def elbo_loss(
    recon_x: Tensor,
    x: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None = None,
    recon_logvar: Tensor | float | None = 0.0,
    *,
    kl: Tensor | None = None,
    beta: float | Tensor = 1.0,
    full: bool = False,
    reduction: str = "batchmean",
    return_terms: bool = False,
    backend: str | None = None,
) -> Tensor | ELBOTerms:
    """The negative evidence lower bound, NLL(x; recon_x, recon_logvar) + beta * KL(q || N(0, I)).

    Terms as in `gaussian_nll` and `kl_standard_normal`, each summed over everything but the batch.

    Args:
        recon_x: decoder mean, shape (batch, ...); or mean and log-variance packed, with ``recon_logvar=None``.
        x: data, the shape of the mean; may be of integers.
        mu: mean of q, shape (batch, ...); or mean and log-variance packed, with ``logvar=None``.
        logvar: log-variance of q, mu's shape.
        recon_logvar: decoder log-variance: a tensor that broadcasts to x's shape, or a number.
        kl: the per-sample KL that `latent` returned, instead of ``mu`` and ``logvar`` (both None then).
        beta: weight of the KL: a number, or a 0-dim tensor, whose value may change under a captured or compiled
            program, and which may need a gradient.
        full: add the constant log(2 pi) / 2 an element of x.
        reduction: "batchmean", "sum" or "none" (shape (batch,)).
        return_terms: return `ELBOTerms` (loss, nll, kl), each differentiable on its own.
        backend: overrides the process's choice for this call.
    """
    operands = (recon_x, x, recon_logvar, mu, logvar, kl, beta)
    values = _elbo_call(operands, (full, reduction, return_terms, backend))(*operands)
    return ELBOTerms(*values[:3]) if return_terms else values[0]


@_remembered
def _elbo_call(
    recon_x: Tensor,
    x: Tensor,
    recon_logvar: Tensor | float | None,
    mu: Tensor | None,
    logvar: Tensor | None,
    kl: Tensor | None,
    beta: float | Tensor,
    full: bool,
    reduction: str,
    return_terms: bool,
    backend: str | None,
) -> _Call:
    _check_reconstruction(recon_x, x, recon_logvar)
    if kl is None:
        _check_latents(mu, logvar)
        assert mu is not None
        batch, witness, device = mu.shape[0], "mu", mu.device
    else:
        _check_tensor("kl", kl)
        if mu is not None or logvar is not None:
            raise ValueError("kl: expected None when mu or logvar is given; they say the same thing")
        if kl.dim() != 1:
            raise ValueError(f"kl: expected one value a sample, shape ({x.shape[0]},), got {tuple(kl.shape)}")
        batch, witness, device = kl.shape[0], "kl", kl.device
    if batch != x.shape[0]:
        raise ValueError(f"{witness}: expected the batch size of x, {x.shape[0]}, got {batch}")
    if device != x.device:
        raise ValueError(f"{witness}: expected on {x.device}, where x is; got it on {device}")
    _check_number("beta", beta)
    how = _checked_reduction(reduction)
    return _objective_call(recon_x, x, recon_logvar, mu, logvar, kl, beta, how, backend, full=full, terms=return_terms)


def _objective_call(
    recon_x: Tensor | None,
    x: Tensor | None,
    spread: Tensor | float | None,
    mu: Tensor | None,
    logvar: Tensor | None,
    kl: Tensor | None,
    beta: float | Tensor,
    reduction: str,
    backend: str | None,
    *,
    full: bool = False,
    floor: float | None = None,
    terms: bool = False,
) -> _Call:
    """What computes an objective with both halves or either: a sequence of the loss or, with ``terms``, loss, NLL, KL.

    With a ``floor``, ``spread`` is a variance, not its logarithm, and at least that.
    """
    witness = mu if recon_x is None else recon_x
    assert witness is not None
    device = witness.device
    name = resolve(device.type, backend)
    dtype = _value_dtype(device.type, recon_x, x, spread, mu, logvar, kl)
    enabled = torch.is_grad_enabled()
    needed = [enabled and isinstance(t, Tensor) and t.requires_grad for t in (recon_x, x, spread, mu, logvar)]
    learned_beta = isinstance(beta, Tensor) and beta.requires_grad  # its gradient is the KL
    how = floor is not None, floor or 0.0, bool(full), reduction
    if name == "reference":
        return partial(_reference_objective, how, dtype)
    options = (*how, dtype, bool(terms) or learned_beta, needed, name)

    def in_kernel_form(operands: tuple[Any, ...]) -> tuple[Any, ...]:
        """Targets of a dtype that kernels know, numbers in memory on the device."""
        recon_x, x, spread, mu, logvar, kl, beta = operands
        if x is not None and x.dtype not in _KERNEL_DTYPES:
            x = x.to(torch.float32)
        spread, beta = (t.to(device) if isinstance(t, Tensor) else t for t in (spread, beta))
        return recon_x, x, spread, mu, logvar, kl, beta

    operands = (recon_x, x, spread, mu, logvar, kl, beta)
    converted = in_kernel_form(operands)
    call = ops.elbo.prepared(*converted, options=options)
    if all(a is b for a, b in zip(operands, converted, strict=True)):
        return call
    return lambda *operands: call(*in_kernel_form(operands))


def _reference_objective(how: tuple[Any, ...], dtype: torch.dtype, *operands: Any) -> list[Tensor]:
    recon_x, x, *rest = operands
    if x is not None and x.dtype not in _KERNEL_DTYPES:
        x = x.to(torch.float32)
    return [value.to(dtype) for value in elbo_formula(recon_x, x, *rest, *how)]
