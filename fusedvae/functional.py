"""The operations as functions: what the modules are made of.

Every function checks its arguments before anything runs (TypeError and ValueError name the argument, what came and
what was expected), then runs on the backend chosen by ``backend=``, else by `fusedvae.use_backend`.

Common to all:

* a batch is dimension 0; the shapes are otherwise free. Any strides are taken; contiguous and channels_last
  tensors, halves of packed tensors and broadcast operands without a copy, others with one.
* dtypes float64, float32, bfloat16 and float16, mixed as in PyTorch's arithmetic (targets may also be integers and
  bools). Work is done in float32, or float64 if an operand is. Sums have the promoted dtype of the operands, but no
  less than float32; values of elements have it, or float32 under autocast. Each gradient has its operand's dtype.
* a mean and its scale may come packed in one tensor, halves along dimension 1 (or ``packed_dim``, -1 for the tokens of
  a transformer): pass it in the mean's place and None, said out loud, in the scale's.
* ``scale`` says what the tensor beside a mean holds: "logvar" (sigma^2 = e^s), "logstd" (sigma = e^s), "std" (sigma =
  s), "var" (sigma^2 = s), "softplus" (sigma = softplus(s)); of a Laplace distribution "logscale" (b = e^s), "scale" (b
  = s), "softplus". ``clamp=(low, high)`` bounds s first, with no gradient outside; either may be None.
  ``eps`` is then added to what the form names (sigma^2 for "logvar" and "var", else sigma, or b).
* reductions: "batchmean" (sum over everything, divided by the batch size), "sum", "mean" (over elements),
  "weighted_mean" (sum of the weighted values, divided by the sum of the weights), "none" (sums over ``dim``: by default
  all but the batch, one value per sample; ``dim=()`` gives one an element).
* ``weight`` multiplies elements; a float or bool tensor that broadcasts to them. Where it is 0, values and gradients
  are exactly 0, whatever the operands hold.
* ``inplace=True`` has the gradient of the likelihood's first input (recon_x) written into the memory of that input, in
  the forward pass where gradients are made in it. So nobody may read recon_x after the loss; an operation before it
  that saved it for its own backward pass (a sigmoid, tanh or ReLU at a decoder's end) has autograd raise its error; and
  there are no second derivatives. With "none", ``return_terms`` or float16 it is written in the backward pass instead,
  unless the graph is kept. Where nothing needs that gradient, nothing is written. ValueError where it cannot be, or
  would be seen: recon_x is a leaf; its memory has gaps, is broadcast, or is another operand's too; it is a view of a
  tensor that something else holds; with the reference formulas, under torch.compile, torch.func and tracing.

Formulas: Kingma & Welling 2014, "Auto-Encoding Variational Bayes" (arXiv:1312.6114), appendix B.
"""

from __future__ import annotations

import enum
import math
import numbers
from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import autograd, ops
from .backend import resolve
from .backend.reference import (
    FORMULAS,
    GIVEN,
    LIKELIHOODS,
    Form,
    Formula,
    Number,
    Objective,
    Sampling,
    factor_of,
    form_fields,
    half_of,
    replaced,
    with_gradient_times,
)
from .calls import Operand, Operands, find
from .layout import broadcasts, dense_strides
from .linear import LinearLikelihoodCall, linear_likelihood, usual_block
from .random import normal
from .torch_private import (
    has_hooks_on_saved_tensors,
    is_any_autocast_enabled,
    is_base_held,
    is_sharded,
    is_transformed,
    is_watched,
)
from .typing import (
    Backend,
    Bounds,
    Dim,
    Dispersion,
    Estimator,
    Generator,
    LaplaceScale,
    LikelihoodName,
    LikelihoodScale,
    NormalScale,
    Rate,
    Reduction,
    TermReduction,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .typing import ELBOArguments, LinearELBOArguments

__all__ = [
    "ELBOTerms",
    "Latent",
    "bernoulli_nll",
    "discretized_logistic_nll",
    "elbo_loss",
    "gaussian_nll",
    "gaussian_nll_loss",
    "importance_weighted_bound",
    "kl_normal",
    "kl_standard_normal",
    "laplace_nll",
    "latent",
    "linear_elbo",
    "negative_binomial_nll",
    "poisson_nll",
    "reparameterize",
    "zero_inflated_negative_binomial_nll",
]

_FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_TOTALS = ("batchmean", "sum", "mean", "weighted_mean")


class _Absent(enum.Enum):  # (Of all objects with a name of their own, torch.compile knows these best.)
    """Stands for a log-variance that was not given: None says that it is packed in the mean."""

    LOGVAR = "<required>"
    PRIOR_LOGVAR = "<required with prior_mu>"

    def __repr__(self) -> str:
        return self.value


_REQUIRED: Any = _Absent.LOGVAR
_REQUIRED_WITH_PRIOR_MU: Any = _Absent.PRIOR_LOGVAR


def _check_forgotten(kl: Tensor | None) -> None:
    """Whether a bound may do without a log-variance: only where its KL is given."""
    if kl is None:
        raise TypeError("logvar: expected a tensor beside mu, or None if both are packed in mu; got nothing")


class Latent(NamedTuple):
    """What `latent` returns."""

    z: Tensor
    """The sample, of mu's shape; with ``samples``, that many of them in front."""
    kl: Tensor
    """The divergence of q from the prior, summed over ``dim``: by default shape (batch,)."""


class ELBOTerms(NamedTuple):
    """The loss and its two terms, each reduced, and each differentiable on its own: loss = nll + beta * kl."""

    loss: Tensor
    nll: Tensor
    kl: Tensor


class _Written(NamedTuple):
    """How users write the form of a scale."""

    scale: str | None
    clamp: Bounds
    eps: float


def _written(scale: str | None, clamp: Bounds, eps: float) -> _Written:
    """As users wrote it; hashable, as calls are found by it. (What they write by saying nothing is None.)"""
    return _Written(scale, tuple(clamp) if isinstance(clamp, list) else clamp, eps)


def _unless_usual(scale: str, clamp: Bounds, eps: float, usual: str) -> _Written | None:
    """The same, or None of the usual form."""
    return None if scale == usual and clamp is None and eps == 0.0 else _written(scale, clamp, eps)


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


def _check_packed(
    name: str, value: Tensor, dim: int, expected: torch.Size | None = None, *, dim_name: str = "packed_dim"
) -> None:
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"{dim_name}: expected an integer, got {type(dim).__name__}")
    if value.dim() >= 2 and (not -value.dim() <= dim < value.dim() or dim % value.dim() == 0):
        raise ValueError(
            f"{dim_name}: expected a dimension of {name}, of shape {tuple(value.shape)}, not the batch; got {dim}"
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
        half = half_of(prior_mu.shape, packed_dim)
        # Halves of size 1 would broadcast, too: but a mean alone looks like them where the latent has two dimensions.
        if not broadcasts(half, shape) or half[packed_dim] != shape[packed_dim % len(half) - len(half)]:
            raise ValueError(
                f"prior_mu: packed (no log-variance given), expected a shape whose halves along dimension {packed_dim} "
                f"have mu's size along it and broadcast to {tuple(shape)}, got {tuple(prior_mu.shape)}"
            )
        return
    _check_parameter("prior_mu", prior_mu, shape, "mu", mu)
    _check_parameter("prior_logvar", prior_logvar, shape, "mu", mu)


def _checked_form(names: tuple[str, str, str], written: _Written | None, formula: Formula) -> Form:
    """The form of a formula's scale, of the arguments of these names."""
    scale, clamp, eps = written or (None, None, 0.0)
    try:
        form = next(iter(formula.forms.values())) if scale is None else formula.forms[scale]
    except (KeyError, TypeError):
        expected = ", ".join(map(repr, formula.forms))
        raise ValueError(f"{names[0]}: expected one of {expected}; got {scale!r}") from None
    low, high = -math.inf, math.inf
    if clamp is not None:
        if not isinstance(clamp, tuple) or len(clamp) != 2:
            raise TypeError(f"{names[1]}: expected a pair (low, high) or None, got {clamp!r}")
        for bound in clamp:
            if bound is not None and (not isinstance(bound, numbers.Real) or isinstance(bound, bool)):
                raise TypeError(f"{names[1]}: expected numbers or None, got {type(bound).__name__}")
        low = low if clamp[0] is None else float(clamp[0])
        high = high if clamp[1] is None else float(clamp[1])
        if not low <= high:
            raise ValueError(f"{names[1]}: expected low <= high, got {clamp!r}")
    if not isinstance(eps, numbers.Real) or isinstance(eps, bool):
        raise TypeError(f"{names[2]}: expected a number, got {type(eps).__name__}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{names[2]}: expected at least 0, got {eps}")
    return replaced(form, low=low, high=high, eps=form.eps + float(eps))


def _checked_recon_form(formula: Formula, written: _Written | None) -> Form | None:
    """The form of a likelihood's scale, of the arguments ``recon_scale``, ...; None of one that has no scale."""
    names = ("recon_scale", "recon_clamp", "recon_eps")
    if formula.scales:
        return _checked_form(names, written, formula)
    absent = (None, None, 0.0)
    for name, value, nothing in zip(names, written or absent, absent, strict=True):
        if value != nothing:
            likelihood = formula.likelihood
            raise ValueError(f"{name}: expected none, as the {likelihood} likelihood has no scale; got {value!r}")
    return None


def _checked_forms(
    formula: Formula, posterior: _Written | None, prior: _Written | None, prior_scale: Operand
) -> list[Form]:
    """The forms of a divergence's scales. ``eps`` is the prior's too, where that comes from a network as well."""
    forms = [_checked_form(("scale", "clamp", "eps"), posterior, formula)]
    if len(formula.pairs) > 1:
        prior = prior or _Written("logvar", None, None)  # type: ignore[arg-type]
        eps = prior.eps
        if posterior is not None and eps is None:
            is_alike = posterior.scale == prior.scale and (prior_scale is None or isinstance(prior_scale, Tensor))
            eps = posterior.eps if is_alike else 0.0
        eps = 0.0 if eps is None else eps
        prior = replaced(prior, eps=eps)
        forms.append(_checked_form(("prior_scale", "prior_clamp", "prior_eps"), prior, formula))
    return forms


def _checked_likelihood(likelihood: object) -> Formula:
    try:
        return LIKELIHOODS[likelihood]  # type: ignore[index]
    except (KeyError, TypeError):
        expected = ", ".join(map(repr, LIKELIHOODS))
        raise ValueError(f"likelihood: expected one of {expected}; got {likelihood!r}") from None


def _check_likelihood(formula: Formula, inputs: Operands, names: Sequence[str], packed_dim: int) -> None:
    """Check the inputs of a likelihood: recon_x, x, and whatever else it has, which broadcasts to x's shape."""
    recon_x, x, *others = inputs
    first, *_ = names
    _check_tensor(first, recon_x)
    _check_tensor("x", x, integers=True)
    assert isinstance(recon_x, Tensor)
    assert isinstance(x, Tensor)
    _check_batched("x", x)
    _check_same_device("x", x, first, recon_x)
    is_packed = any(inputs[scale] is None for _, scale in formula.pairs)
    if is_packed:
        _check_packed(first, recon_x, packed_dim, x.shape)
    elif recon_x.shape != x.shape:
        raise ValueError(f"x: expected the shape of {first} {tuple(recon_x.shape)}, got {tuple(x.shape)}")
    for name, value in zip(names[2:], others, strict=False):
        if value is not None:
            _check_parameter(name, value, x.shape, first, recon_x)


def _check_parameter(name: str, value: object, shape: torch.Size, other_name: str, other: Tensor) -> None:
    """Check what may be a number, or a tensor that broadcasts to a shape and lies where another does."""
    if isinstance(value, Tensor):
        _check_tensor(name, value)
        _check_same_device(name, value, other_name, other)
        _check_broadcast(name, value, shape)
    elif not _is_number(value) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a tensor, a number or None, got {type(value).__name__}")


def _check_broadcast(name: str, value: Tensor, shape: torch.Size) -> None:
    if not broadcasts(value.shape, shape):
        raise ValueError(f"{name}: expected a shape that broadcasts to {tuple(shape)}, got {tuple(value.shape)}")


def _check_weight(name: str, weight: object, shape: torch.Size, other_name: str, other: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(weight).__name__}")
    _check_tensor(name, weight, integers=True)
    _check_same_device(name, weight, other_name, other)
    if weight.shape == shape[:1] and not broadcasts(weight.shape, shape):
        each = "unsqueeze(1)" if len(shape) == 2 else f"view({', '.join(['-1', *['1'] * (len(shape) - 1)])})"
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {tuple(shape)}, got {tuple(weight.shape)}; one a sample is "
            f"{name}.{each}"
        )
    _check_broadcast(name, weight, shape)


def _checked_reduction(reduction: object) -> TermReduction:
    if not isinstance(reduction, str) or reduction not in (*_TOTALS, "none"):
        expected = ", ".join(map(repr, _TOTALS))
        raise ValueError(f"reduction: expected {expected} or 'none', got {reduction!r}")
    return reduction  # type: ignore[return-value]


def _checked_reductions(reduction: object) -> tuple[TermReduction, TermReduction]:
    """Those of the likelihood and of the divergence."""
    if not isinstance(reduction, (tuple, list)):
        return (_checked_reduction(reduction),) * 2
    if len(reduction) != 2:
        expected = ", ".join(map(repr, _TOTALS))
        raise ValueError(
            f"reduction: expected {expected} or 'none', got {reduction!r}; or a pair of these, the likelihood's and "
            "the KL's"
        )
    first, second = map(_checked_reduction, reduction)
    if (first == "none") != (second == "none"):
        raise ValueError(f"reduction: expected 'none' for both or for neither, got {reduction!r}")
    return first, second


def _checked_dim(dim: object, dims: int, reduction: str) -> tuple[int, ...] | None:
    """Dimensions to sum over, of so many; None for all but the first."""
    if dim is None:
        return None
    if reduction != "none":
        raise ValueError(f"dim: expected None with reduction={reduction!r}; it is for 'none'")
    found = _dimensions("dim", dim, dims)
    return None if found and found == tuple(range(1, dims)) else found


def _dimensions(name: str, dim: object, dims: int) -> tuple[int, ...]:
    given = (dim,) if isinstance(dim, numbers.Integral) else dim
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"{name}: expected an integer or a sequence of them, got {type(dim).__name__}")
    found = set()
    for d in given:
        if not isinstance(d, numbers.Integral) or isinstance(d, bool):
            raise TypeError(f"{name}: expected an integer or a sequence of them, got {dim!r}")
        if not -dims <= int(d) < dims:
            raise ValueError(f"{name}: expected a dimension from {-dims} to {dims - 1}, got {d}")
        found.add(int(d) % dims)
    if len(found) != len(given):
        raise ValueError(f"{name}: expected each dimension once, got {dim!r}")
    return tuple(sorted(found))


def _check_number(name: str, value: object) -> None:
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.dtype.is_floating_point:
            raise ValueError(
                f"{name}: expected a number or a 0-dim float tensor, got shape {tuple(value.shape)}, {value.dtype}"
            )
    elif not _is_number(value):
        raise TypeError(f"{name}: expected a number or a 0-dim tensor, got {type(value).__name__}")


def _check_factor(name: str, value: object, x: Tensor) -> None:
    """Check a coefficient; a tensor of one has a value, wherever it is."""
    _check_number(name, value)
    if isinstance(value, Tensor) and value.device.type == "meta" != x.device.type:
        _check_same_device(name, value, "x", x)


def _is_number(value: object) -> bool:
    """Whether it is a number as PyTorch takes them: no fraction. (A bool counts where it is a coefficient.)"""
    return isinstance(value, numbers.Real) and (
        isinstance(value, numbers.Integral) or not isinstance(value, numbers.Rational)
    )


def _value_dtype(device_type: str, *operands: Tensor | float | None, is_sum: bool = True) -> torch.dtype:
    """The dtype of values of these operands: 0-dim tensors have no say beside others, as in PyTorch's arithmetic.

    Sums have float32 at least: float16 ends at 65504, and bfloat16 has eight digits, in base 2.
    """
    tensors = [t for t in operands if isinstance(t, Tensor) and t.dtype.is_floating_point]
    promoted = reduce(torch.promote_types, [t.dtype for t in tensors if t.dim() > 0] or [t.dtype for t in tensors])
    if promoted not in (torch.float32, torch.float64) and (is_sum or torch.is_autocast_enabled(device_type)):
        return torch.float32
    return promoted


# --- the latent -------------------------------------------------------------------------------------------------


def reparameterize(
    mu: Tensor,
    logvar: Tensor | None,
    *,
    scale: NormalScale = "logvar",
    clamp: Bounds = None,
    eps: float = 0.0,
    samples: int | None = None,
    offset: int = 0,
    generator: Generator = None,
    noise: Tensor | None = None,
    packed_dim: int = 1,
    backend: Backend | None = None,
) -> Tensor:
    """Sample z = mu + sigma * noise, noise ~ N(0, 1), differentiable in mu and logvar.

    Args:
        mu: mean of q, shape (batch, ...); or mean and scale packed, with ``logvar=None``.
        logvar: log-variance of q, mu's shape; or what ``scale`` says.
        scale, clamp, eps: the form of the scale: see `fusedvae.functional`.
        samples: how many samples to draw, along a dimension in front; None for one, without it.
        offset: position of the first element in the noise stream: a process that holds the rows [r0, r1) of a batch
            passes r0 * (elements a row), and gets the noise that one process would have given these rows.
        generator: where the noise's seed comes from; the device's default generator without it. One of another device
            is taken too, and a sequence of them, one a sample of the batch.
        noise: the noise itself, of z's shape, instead of fresh noise.
        packed_dim: the dimension that halves of packed tensors are along.
        backend: overrides the process's choice for this call.

    Returns:
        z, of mu's shape (half a packed one's; ``samples`` in front) and the promoted dtype of mu and logvar.
    """
    written = _unless_usual(scale, clamp, eps, "logvar")
    return _sampled(
        (mu, logvar), None, False, written, None, samples, None, offset, generator, noise, packed_dim, backend
    )[0]


def latent(
    mu: Tensor,
    logvar: Tensor | None,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = _REQUIRED_WITH_PRIOR_MU,
    *,
    scale: NormalScale = "logvar",
    prior_scale: NormalScale = "logvar",
    clamp: Bounds = None,
    prior_clamp: Bounds = None,
    eps: float = 0.0,
    prior_eps: float | None = None,
    estimator: Estimator = "analytic",
    samples: int | None = None,
    dim: Dim = None,
    offset: int = 0,
    generator: Generator = None,
    noise: Tensor | None = None,
    packed_dim: int = 1,
    backend: Backend | None = None,
) -> Latent:
    """Sample the latent and take its divergence from the prior, in one pass over what describes the two.

    z = mu + sigma * noise; kl as in `kl_normal`, or its estimate at the sample, log q(z) - log p(z) (Burda et al. 2016,
    arXiv:1509.00519), which has the KL for its mean.

    Args:
        mu: mean of q, shape (batch, ...); or mean and scale packed, with ``logvar=None``.
        logvar: log-variance of q, mu's shape; or what ``scale`` says.
        prior_mu, prior_logvar: those of the prior, as `kl_normal` takes them; N(0, I) without.
        scale, clamp, eps, prior_scale, prior_clamp, prior_eps: the forms of the two scales: see `kl_normal`.
        estimator: "analytic", or "sample" for the divergence at the sample, with the gradients along the path of z.
        samples: how many samples to draw, along a dimension in front; None for one, without it.
        dim: what kl is summed over, counted in mu's dimensions: by default all but the batch; () for nothing.
        offset, generator, noise: where the noise comes from, as for `reparameterize`.
        packed_dim: the dimension that halves of packed tensors are along.
        backend: overrides the process's choice for this call.

    Returns:
        `Latent` (z, kl): z of mu's shape (half a packed one's), kl of shape (batch,), or what ``dim`` leaves. With
        ``samples``, z has that many in front; so has kl at the samples.
    """
    if estimator != "analytic" and estimator != "sample":
        raise ValueError(f"estimator: expected 'analytic' or 'sample', got {estimator!r}")
    formula, inputs = _divergence_of(mu, logvar, prior_mu, prior_logvar)
    posterior = _unless_usual(scale, clamp, eps, "logvar")
    prior = None
    if prior_scale != "logvar" or prior_clamp is not None or prior_eps is not None:
        prior = _written(prior_scale, prior_clamp, prior_eps)  # type: ignore[arg-type]
    if estimator == "analytic" and samples is not None:  # the samples have one divergence
        options = (generator, noise, packed_dim, backend)
        z = _sampled(inputs[:2], None, False, posterior, None, samples, None, offset, *options)[0]
        return Latent(z, _divergence(inputs, formula, posterior, prior, None, None, "none", dim, packed_dim, backend))
    z, kl = _sampled(
        inputs,
        formula,
        estimator == "sample",
        posterior,
        prior,
        samples,
        dim,
        offset,
        generator,
        noise,
        packed_dim,
        backend,
    )
    return Latent(z, kl)


def _sampled(
    inputs: tuple[Operand, ...],
    divergence: str | None,
    at_sample: bool,
    posterior: _Written | None,
    prior: _Written | None,
    samples: int | None,
    dim: Dim,
    offset: int,
    generator: Generator,
    noise: Tensor | None,
    packed_dim: int,
    backend: Backend | None,
) -> Sequence[Tensor]:
    """The sample of a divergence's inputs and, if it has a name, the divergence."""
    if noise is not None and generator is not None:
        raise ValueError("generator: expected None when noise is given, which leaves nothing to draw")
    if generator is not None and not isinstance(generator, torch.Generator):
        noise, generator = _noise_of_each(generator, inputs, samples, packed_dim, backend), None
    first = None
    if type(offset) is not int or offset != 0:
        if not isinstance(offset, numbers.Integral) or isinstance(offset, bool):
            raise TypeError(f"offset: expected an integer, got {type(offset).__name__}")
        if offset < 0:
            raise ValueError(f"offset: expected at least 0, got {offset}")
        first = float(offset)  # a number as others among the operands: calls do not depend on it
    operands = (*inputs, None, first, noise)
    if isinstance(dim, list):
        dim = tuple(dim)
    call = find(_latent_call, operands, divergence, at_sample, posterior, prior, samples, dim, packed_dim, backend)
    seed = None
    if noise is None:
        mu = inputs[0]
        assert isinstance(mu, Tensor)
        seed = ops.draw_seed(mu.device, generator, by_dispatcher=call.is_dispatched)
    return autograd.latent(call, (*inputs, seed, first, noise))


def _latent_call(
    operands: Operands,
    divergence: str | None,
    at_sample: bool,
    posterior: _Written | None,
    prior: _Written | None,
    samples: int | None,
    dim: Dim,
    packed_dim: int,
    backend: str | None,
) -> autograd.RecordedLatent:
    *inputs, _, first, noise = operands
    formula = FORMULAS[divergence or "kl_standard_normal"]
    _check_divergence(inputs, packed_dim)
    forms = _checked_forms(formula, posterior, prior, inputs[-1] if len(inputs) > 2 else None)
    mu, logvar = inputs[:2]
    assert isinstance(mu, Tensor)
    mean = mu.shape if logvar is not None else half_of(mu.shape, packed_dim)
    _check_samples(samples)
    if noise is not None:
        _check_tensor("noise", noise)
        assert isinstance(noise, Tensor)
        expected = mean if samples is None else (samples, *mean)
        if tuple(noise.shape) != tuple(expected):
            raise ValueError(f"noise: expected shape {tuple(expected)}, got {tuple(noise.shape)}")
        _check_same_device("noise", noise, "mu", mu)
    summed = tuple(range(1, len(mean))) if dim is None else _dimensions("dim", dim, len(mean))
    if samples is not None:
        summed = tuple([d + 1 for d in summed])
    spec = Sampling(
        formula.name,
        *form_fields(forms),
        samples,
        at_sample,
        _value_dtype(mu.device.type, *inputs, is_sum=bool(summed)) if divergence else None,
        summed,
        packed_dim,
        _backend_for(operands, backend),
    )
    # The seed is drawn when all is checked; what it is like is known.
    seed = torch.empty((), dtype=torch.int64, device=mu.device) if noise is None else None
    return autograd.RecordedLatent((*inputs, seed, first, noise), spec)


def _check_samples(samples: object) -> None:
    if samples is None:
        return
    if not isinstance(samples, numbers.Integral) or isinstance(samples, bool):
        raise TypeError(f"samples: expected an integer or None, got {type(samples).__name__}")
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")


def _noise_of_each(
    generators: Sequence[torch.Generator],
    inputs: tuple[Operand, ...],
    samples: int | None,
    packed_dim: int,
    backend: Backend | None,
) -> Tensor:
    """The noise of a batch, that of each of its samples from a generator of its own."""
    mu, logvar = inputs[:2]
    _check_latents(mu, logvar, packed_dim)
    assert isinstance(mu, Tensor)
    if not isinstance(generators, (list, tuple)) or not all(isinstance(g, torch.Generator) for g in generators):
        raise TypeError(
            f"generator: expected a torch.Generator, a list of them or None, got {type(generators).__name__}"
        )
    if samples is not None:
        raise ValueError("samples: expected None with a generator for each sample of the batch")
    if len(generators) != mu.shape[0]:
        raise ValueError(f"generator: expected one for each of {mu.shape[0]} samples, got {len(generators)}")
    shape = mu.shape if logvar is not None else half_of(mu.shape, packed_dim)
    noise = torch.empty(shape, dtype=torch.float32, device=mu.device)
    for own, generator in zip(noise, generators, strict=True):
        seed = ops.draw_seed(mu.device, generator, by_dispatcher=False)
        own.copy_(normal(tuple(own.shape), seed, device=mu.device, backend=backend))
    return noise


# --- divergences ------------------------------------------------------------------------------------------------------


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
    posterior = _unless_usual(scale, clamp, eps, "logvar")
    return _divergence(
        (mu, logvar), "kl_standard_normal", posterior, None, weight, None, reduction, dim, packed_dim, backend
    )


def kl_normal(
    mu: Tensor,
    logvar: Tensor | None,
    prior_mu: Tensor | float | None = None,
    prior_logvar: Tensor | float | None = _REQUIRED_WITH_PRIOR_MU,
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
    formula, inputs = _divergence_of(mu, logvar, prior_mu, prior_logvar)
    posterior = _unless_usual(scale, clamp, eps, "logvar")
    prior = None
    if prior_scale != "logvar" or prior_clamp is not None or prior_eps is not None:
        prior = _written(prior_scale, prior_clamp, prior_eps)  # type: ignore[arg-type]
    return _divergence(inputs, formula, posterior, prior, weight, balance, reduction, dim, packed_dim, backend)


def _is_given(prior_logvar: Tensor | float | None) -> bool:
    return prior_logvar is not None and prior_logvar is not _REQUIRED_WITH_PRIOR_MU


def _divergence_of(
    mu: Operand, logvar: Operand, prior_mu: Operand, prior_logvar: Operand
) -> tuple[str, tuple[Operand, ...]]:
    """The divergence of a posterior from this prior, and its inputs."""
    if prior_mu is None:
        if _is_given(prior_logvar):
            raise ValueError("prior_logvar: expected None without prior_mu; a prior of mean 0 has prior_mu=0.0")
        return "kl_standard_normal", (mu, logvar)
    if prior_logvar is _REQUIRED_WITH_PRIOR_MU:
        raise TypeError(
            "prior_logvar: expected a tensor or number beside prior_mu, or None if both are packed in prior_mu; "
            "got nothing"
        )
    return "kl_normal", (mu, logvar, prior_mu, prior_logvar)


def _divergence(
    inputs: tuple[Operand, ...],
    formula: str,
    posterior: _Written | None,
    prior: _Written | None,
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
        weighting = _weighting("weight", weight, reduction, "mu", inputs[0], inputs[1], packed_dim)
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


def _weighting(
    name: str, weight: Tensor, reduction: str, of: str, mean: Operand, scale: Operand, packed_dim: int
) -> tuple[Operand, ...]:
    """The operands that a weight adds to a term's: itself and, for a weighted mean, 1 / its sum over all elements."""
    _check_tensor(of, mean, integers=True)
    assert isinstance(mean, Tensor)
    if scale is None:
        _check_packed(of, mean, packed_dim)
    shape = mean.shape if scale is not None else half_of(mean.shape, packed_dim)
    _check_weight(name, weight, shape, of, mean)
    if reduction != "weighted_mean":
        return (weight,)
    times = math.prod(shape) / max(weight.numel(), 1)
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64  # there is no other on Apple's GPUs
    total = weight.sum(dtype=dtype)
    if is_sharded((total,)):  # PyTorch 2.6 would take the reciprocal of each process's part
        total = total.full_tensor()  # type: ignore[attr-defined]
    return weight, 1.0 / (total * times)


def _divergence_call(
    operands: Operands,
    name: str,
    posterior: _Written | None,
    prior: _Written | None,
    weighting: int,
    balance: float | None,
    reduction: str,
    dim: Dim,
    packed_dim: int,
    backend: str | None,
) -> autograd.RecordedObjective:
    """Of a divergence alone, of its inputs, what its weight adds, and 1, its coefficient."""
    formula = FORMULAS[name]
    inputs = operands[: len(formula.inputs)]
    _check_divergence(inputs, packed_dim)
    if balance is not None and (not isinstance(balance, numbers.Real) or isinstance(balance, bool)):
        raise TypeError(f"balance: expected a number or None, got {type(balance).__name__}")
    if balance is not None and not 0 <= balance <= 1:
        raise ValueError(f"balance: expected a number from 0 to 1, got {balance}")
    mu = inputs[0]
    assert isinstance(mu, Tensor)
    return _objective_call(
        operands,
        [(formula, _checked_forms(formula, posterior, prior, inputs[-1]), weighting)],
        (_checked_reduction(reduction),),
        _checked_dim(dim, mu.dim(), reduction),
        packed_dim,
        backend,
        balance=None if balance is None else float(balance),
    )


# --- likelihoods ------------------------------------------------------------------------------------------------------


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
    written = _unless_usual(scale, clamp, eps, "logvar")
    return _likelihood(
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
    written = _unless_usual(scale, clamp, eps, "logscale")
    return _likelihood("laplace", inputs, written, full, weight, reduction, dim, packed_dim, backend, inplace)


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
    torch.nn.functional.binary_cross_entropy, whose derivatives it has. Source: Kingma & Welling 2014
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
        raise ValueError("pos_weight: expected None with probabilities; it is for logits")
    name = "bernoulli" if from_logits else "bernoulli_probs"
    return _likelihood(name, inputs, None, False, weight, reduction, dim, 1, backend, inplace)


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
    written = _unless_usual(scale, clamp, eps, "logscale")
    inputs = (recon_x, x, log_scale)
    return _likelihood(
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
    (PyTorch's loss has Stirling's approximation of it), computed so that nothing cancels.

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
    written = _unless_usual(scale, clamp, eps, "rate")
    return _likelihood("poisson", (rate, x), written, full, weight, reduction, dim, 1, backend, inplace)


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
    written = _unless_usual(scale, clamp, eps, "theta")
    inputs = (mu, x, theta)
    return _likelihood(
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
    written = _unless_usual(scale, clamp, eps, "theta")
    inputs = (mu, x, theta, zi_logits)
    return _likelihood(
        "zero_inflated_negative_binomial", inputs, written, False, weight, reduction, dim, packed_dim, backend, inplace
    )


def _likelihood(
    likelihood: str,
    inputs: tuple[Operand, ...],
    written: _Written | None,
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
        weighting = _weighting("weight", weight, reduction, "x", inputs[1], 0.0, packed_dim)
    operands = (*inputs, *weighting, None)
    if isinstance(dim, list):
        dim = tuple(dim)
    inplace = inplace and _may_be_in_place()
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
        _check_memory(call, operands)
    return autograd.objective(call, operands)[0]


def _likelihood_call(
    operands: Operands,
    likelihood: str,
    written: _Written | None,
    weighting: int,
    full: bool,
    reduction: str,
    dim: Dim,
    packed_dim: int,
    backend: str | None,
    inplace: bool,
) -> autograd.RecordedObjective:
    formula = LIKELIHOODS[likelihood]
    inputs = operands[: len(formula.inputs)]
    _check_likelihood(formula, inputs, formula.inputs, packed_dim)
    forms = [_checked_form(("scale", "clamp", "eps"), written, formula)] if formula.scales else []
    x = inputs[1]
    assert isinstance(x, Tensor)
    return _objective_call(
        operands,
        [(formula, forms, weighting)],
        (_checked_reduction(reduction),),
        _checked_dim(dim, x.dim(), reduction),
        packed_dim,
        backend,
        full=full,
        inplace=inplace,
    )


def _may_be_in_place() -> bool:
    """Whether autograd notices that what an operation before has saved was written over.

    Hooks on saved tensors, as checkpoints have them, give back what they kept, whatever has become of it.
    """
    return is_watched() or not has_hooks_on_saved_tensors()


def _check_memory(call: autograd.RecordedObjective, operands: Operands) -> None:
    """Check that the gradient of the first operand may be written into its memory, if it is: nobody else sees that.

    Memory is nothing that calls are found by: each is checked anew.
    """
    if not call.in_place:
        return
    first, *others = operands
    assert isinstance(first, Tensor)
    name, *names = call.terms[0].formula.inputs
    expected = f"{name}: expected memory that its gradient may be written into (inplace=True), got"
    is_view = first._is_view()  # (What it is a view of has no name here: that would hold it.)
    if first.is_leaf or (is_view and first._base.is_leaf):  # type: ignore[union-attr]
        raise ValueError(f"{expected} that of a leaf, which keeps its values")
    if getattr(first, "is_overwritten", False):
        raise ValueError(f"{expected} one that has it already, of an earlier loss, where the values were")
    storage = first.untyped_storage().data_ptr()
    for k, other in enumerate(others):
        if isinstance(other, Tensor) and storage and other.untyped_storage().data_ptr() == storage:
            raise ValueError(f"{expected} some that {names[k] if k < len(names) else 'another operand'} lies in too")
    if is_view and first._base.numel() != first.numel():  # type: ignore[union-attr]
        raise ValueError(f"{expected} a part of a larger tensor, which it is a view of")
    if is_view and is_base_held(first):
        raise ValueError(f"{expected} that of a tensor which it is a view of, and which something else holds")


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
    _check_tensor("input", input)
    _check_tensor("target", target, integers=True)
    _check_same_device("target", target, "input", input)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    spread: Tensor | float
    if isinstance(var, Tensor):
        _check_tensor("var", var)
        _check_same_device("var", var, "input", input)
        if check and not torch.compiler.is_compiling() and not is_transformed((var,)) and torch.any(var < 0):
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
        reduction = "sum" if reduction == "none" else reduction
    operands = (input, target, spread, None)
    return autograd.objective(find(_variance_call, operands, full, float(eps), reduction, backend), operands)[0]


def _variance_call(
    operands: Operands, full: bool, eps: float, reduction: str, backend: str | None
) -> autograd.RecordedObjective:
    """Of variances that are bounded by eps, of which their gradients know nothing."""
    terms = [(FORMULAS["gaussian_nll"], [Form("bounded", eps=eps)], 0)]
    return _objective_call(operands, terms, (reduction,), () if reduction == "none" else None, 1, backend, full=full)


# --- the bound --------------------------------------------------------------------------------------------------


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
    logvar: Tensor | None = _REQUIRED,
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
    prior_logvar: Tensor | float | None = _REQUIRED_WITH_PRIOR_MU,
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
        kl: the KL per sample that `latent` returned, instead of ``mu`` and ``logvar`` (both None then); its mean is
            over the batch.
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
        grad_scale: what gradients are made times, while the value is what it is: a number or a 0-dim tensor, the factor
            of a GradScaler, say, or 1 / the steps that gradients are accumulated over.
        return_terms: return `ELBOTerms` (loss, nll, kl), each differentiable on its own.
        inplace: write the gradient of recon_x into its memory: see `fusedvae.functional`.
        packed_dim: the dimension that halves of packed tensors are along.
        backend: overrides the process's choice for this call.
    """
    inputs = _inputs_of(likelihood, recon_x, x, recon_logvar, extra, pos_weight, zi_logits)
    if logvar is _REQUIRED:
        _check_forgotten(kl)
        logvar = None
    weightings = 0, 0
    if weight is not None or latent_weight is not None:
        first, second = reduction if isinstance(reduction, (tuple, list)) else (reduction, reduction)
        mine = () if weight is None else _weighting("weight", weight, first, "x", x, 0.0, packed_dim)
        theirs: tuple[Operand, ...] = ()
        if latent_weight is not None:
            if kl is not None:
                raise ValueError("latent_weight: expected None when kl is given, whose elements are summed already")
            theirs = _weighting("latent_weight", latent_weight, second, "mu", mu, logvar, packed_dim)
        inputs, weightings = (*inputs, *mine), (len(mine), len(theirs))
    if kl is None:
        divergence, latents = _divergence_of(mu, logvar, prior_mu, prior_logvar)
        operands: tuple[Operand, ...] = (*inputs, *latents, beta)
        if weightings[1]:
            operands = (*inputs, *latents, *theirs, beta)
    else:
        divergence, operands = GIVEN.name, (*inputs, kl, beta)
        if mu is not None or logvar is not None:
            raise ValueError("kl: expected None when mu or logvar is given; they say the same thing")
        if prior_mu is not None or _is_given(prior_logvar):
            raise ValueError("kl: expected None when prior_mu or prior_logvar is given; it is to a prior already")
    if grad_scale is not None:
        operands = (*operands, grad_scale)
    if isinstance(reduction, list) and len(reduction) == 2:
        reduction = tuple(reduction)
    inplace = inplace and _may_be_in_place()
    call = find(
        _elbo_call,
        operands,
        likelihood,
        divergence,
        None if scale == "logvar" and clamp is None and eps == 0.0 else _written(scale, clamp, eps),
        None
        if recon_scale is None and recon_clamp is None and recon_eps == 0.0
        else _written(recon_scale, recon_clamp, recon_eps),
        None
        if prior_scale == "logvar" and prior_clamp is None and prior_eps is None
        else _written(prior_scale, prior_clamp, prior_eps),  # type: ignore[arg-type]
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
        _check_memory(call, operands)
    values = autograd.objective(call, operands)
    return ELBOTerms(*values[:3]) if return_terms else values[0]


def _inputs_of(
    likelihood: str,
    recon_x: Tensor,
    x: Tensor,
    scale: Tensor | float | None,
    extra: Tensor | float | None,
    pos_weight: Tensor | float | None,
    zi_logits: Tensor | float | None,
) -> tuple[Operand, ...]:
    """The inputs of a likelihood: as many of these as it has."""
    formula = _checked_likelihood(likelihood)
    others = formula.inputs[2:]
    found: tuple[Operand, ...] = (recon_x, x)
    if formula.pairs:
        found = (recon_x, x, scale)
    elif isinstance(scale, Tensor) or scale:
        raise ValueError(f"recon_logvar: expected none, as the {likelihood} likelihood has no scale")
    if formula.pairs and isinstance(scale, (int, float)) and not scale and "theta" in others:
        raise ValueError(f"recon_logvar: expected theta, as the likelihood is {likelihood}; got {scale}")
    if "extra" in others:
        found = (*found, 0.0 if extra is None else extra)
    elif extra is not None:
        raise ValueError(f"extra: expected None, as the {likelihood} likelihood has no such input")
    if "pos_weight" in others:
        found = (*found, 1.0 if pos_weight is None else pos_weight)
    elif pos_weight is not None:
        raise ValueError(f"pos_weight: expected None, as the {likelihood} likelihood has no such input")
    if "zi_logits" in others:
        if zi_logits is None:
            raise TypeError(f"zi_logits: expected a tensor or a number, as the likelihood is {likelihood}; got None")
        found = (*found, zi_logits)
    elif zi_logits is not None:
        raise ValueError(f"zi_logits: expected None, as the {likelihood} likelihood has no such input")
    return found


def _check_kl(kl: Tensor, x: Tensor) -> None:
    """Check a KL that is given: one value per sample of the batch of x."""
    of_several = (
        '; of several samples in front, take the likelihood by itself, one value each: reduction="none", dim=-1'
    )
    if kl.dim() != 1:
        hint = of_several if kl.dim() == 2 else ""
        raise ValueError(f"kl: expected one value per sample, shape ({x.shape[0]},), got {tuple(kl.shape)}{hint}")
    if kl.shape[0] != x.shape[0]:
        hint = of_several if x.dim() > 2 and kl.shape[0] == x.shape[1] else ""
        raise ValueError(f"kl: expected the batch size of x, {x.shape[0]}, got {kl.shape[0]}{hint}")


def _elbo_call(
    operands: Operands,
    likelihood: str,
    divergence: str,
    posterior: _Written | None,
    recon: _Written | None,
    prior: _Written | None,
    weightings: tuple[int, int],
    is_grad_scaled: bool,
    full: bool,
    reduction: object,
    returns_terms: bool,
    packed_dim: int,
    backend: str | None,
    inplace: bool,
) -> autograd.RecordedObjective:
    formula = LIKELIHOODS[likelihood]
    count = len(formula.inputs)
    names = [
        "recon_x",
        *["recon_logvar" if (0, k) in formula.pairs else name for k, name in enumerate(formula.inputs)][1:],
    ]
    _check_likelihood(formula, operands[:count], names, packed_dim)
    recon_form = _checked_recon_form(formula, recon)
    x = operands[1]
    assert isinstance(x, Tensor)
    is_given = divergence == GIVEN.name
    second = GIVEN if is_given else FORMULAS[divergence]
    start = count + weightings[0]
    latents = operands[start : start + len(second.inputs)]
    if not is_given:
        _check_divergence(latents, packed_dim)
        name, first = "mu", latents[0]
        forms = _checked_forms(second, posterior, prior, latents[-1])
    else:
        (kl,) = latents
        _check_tensor("kl", kl)
        name, first, forms = "kl", kl, []
        assert isinstance(kl, Tensor)
        _check_kl(kl, x)
    assert isinstance(first, Tensor)
    if first.shape[0] != x.shape[0]:
        raise ValueError(f"{name}: expected the batch size of x, {x.shape[0]}, got {first.shape[0]}")
    if first.device != x.device:
        raise ValueError(f"{name}: expected on {x.device}, where x is; got it on {first.device}")
    _check_factor("beta", operands[-2 if is_grad_scaled else -1], x)
    if is_grad_scaled:
        _check_factor("grad_scale", operands[-1], x)
    return _objective_call(
        operands,
        [(formula, [recon_form] if recon_form else [], weightings[0]), (second, forms, weightings[1])],
        _checked_reductions(reduction),
        None,
        packed_dim,
        backend,
        full=full,
        returns_terms=returns_terms,
        is_grad_scaled=is_grad_scaled,
        inplace=inplace,
    )


# --- a linear layer and the bound -------------------------------------------------------------------------------------


@overload
def linear_elbo(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    x: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None = ...,
    recon_logvar: Tensor | float | None = ...,
    *,
    return_terms: Literal[False] = ...,
    **arguments: Unpack[LinearELBOArguments],
) -> Tensor: ...


@overload
def linear_elbo(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    x: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None = ...,
    recon_logvar: Tensor | float | None = ...,
    *,
    return_terms: Literal[True],
    **arguments: Unpack[LinearELBOArguments],
) -> ELBOTerms: ...


@overload
def linear_elbo(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    x: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None = ...,
    recon_logvar: Tensor | float | None = ...,
    *,
    return_terms: bool,
    **arguments: Unpack[LinearELBOArguments],
) -> Tensor | ELBOTerms: ...


def linear_elbo(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    x: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None = _REQUIRED,
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
    prior_logvar: Tensor | float | None = _REQUIRED_WITH_PRIOR_MU,
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
    block: int | None = None,
    packed_dim: int = 1,
    backend: Backend | None = None,
) -> Tensor | ELBOTerms:
    """`elbo_loss` of ``recon_x = hidden @ linear_weight.T + linear_bias``, of which only some columns are ever stored.

    The decoder's last linear layer and the likelihood, a block of columns at a time: neither the layer's output nor its
    gradient is in memory as a whole. The gradients of hidden, linear_weight and linear_bias are made on the way, in the
    forward pass. With "none", and for float16 without ``grad_scale``, the backward pass makes them, and multiplies out
    the output once more. Values, gradients and derivatives of any order are those of `torch.nn.functional.linear` and
    `elbo_loss`, up to the order of sums.

    It saves memory where x has many columns, and time where the output is larger than the caches. Of 20,000 columns,
    each with a scale, it takes 4 MB beside the gradients in the place of 143 at batch 512, and 0.8 of the time of a
    CPU's core; at batch 128 a fifth of the memory, in the same time, give or take a tenth. Where all columns are one
    block (784, or 2,000, at batch 128) there is nothing to save, and it is the two functions one after the other.
    So it is where something has to see operations of PyTorch, or there are no kernels: with the reference formulas,
    under torch.compile, torch.func and tracing, for tensors that are made of others, and for a ``weight`` that needs a
    gradient.

    Args:
        hidden: the layer's input, shape (batch, ..., in_features).
        linear_weight: its weight, shape (out_features, in_features), as `torch.nn.Linear` has it; with
            ``recon_logvar=None`` (2 * out_features, in_features): the rows of the mean, then those of its scale.
        linear_bias: its bias, of as many elements as the weight has rows, or None.
        x: data, shape (batch, ..., out_features).
        recon_logvar: as `elbo_loss` takes it: a number, a tensor that broadcasts to x's shape (one a column, say), or
            None for one that the layer gives.
        mu, logvar, kl, beta, weight, reduction and all others: as `elbo_loss` takes them.
        block: how many columns of x are computed at a time; by default so many that a block has about 2^19 elements (on
            a GPU, 2^20).

    Under autocast, the products are in its dtype, as those of `torch.nn.functional.linear`.
    """
    if logvar is _REQUIRED:
        _check_forgotten(kl)
        logvar = None
    of_nll, of_kl = _checked_reductions(reduction)
    _check_number("beta", beta)
    written = _written(recon_scale, recon_clamp, recon_eps)
    nll = _linear_likelihood(
        hidden,
        linear_weight,
        linear_bias,
        x,
        recon_logvar,
        likelihood=likelihood,
        written=written,
        full=full,
        extra=extra,
        pos_weight=pos_weight,
        zi_logits=zi_logits,
        weight=weight,
        reduction=of_nll,
        grad_scale=grad_scale,
        block=block,
        backend=backend,
    )
    if kl is None:
        formula, inputs = _divergence_of(mu, logvar, prior_mu, prior_logvar)
        posterior = _written(scale, clamp, eps)
        prior = _written(prior_scale, prior_clamp, prior_eps)  # type: ignore[arg-type]
        divergence = _divergence(
            inputs, formula, posterior, prior, latent_weight, None, of_kl, None, packed_dim, backend
        )
        name, batch = "mu", inputs[0].shape[0]  # type: ignore[union-attr]
    else:
        if mu is not None or logvar is not None:
            raise ValueError("kl: expected None when mu or logvar is given; they say the same thing")
        if prior_mu is not None or _is_given(prior_logvar):
            raise ValueError("kl: expected None when prior_mu or prior_logvar is given; it is to a prior already")
        if latent_weight is not None:
            raise ValueError("latent_weight: expected None when kl is given, whose elements are summed already")
        _check_tensor("kl", kl)
        _check_kl(kl, x)
        _check_same_device("kl", kl, "x", x)
        name, batch = "kl", kl.shape[0]
        kl = kl.to(torch.promote_types(kl.dtype, torch.float32))
        divergence = kl if of_kl == "none" else kl.sum() if of_kl == "sum" else kl.mean()
    if batch != x.shape[0]:
        raise ValueError(f"{name}: expected the batch size of x, {x.shape[0]}, got {batch}")
    weighted = (divergence * beta).to(divergence.dtype)
    if grad_scale is not None:  # of beta, too
        weighted, divergence = [with_gradient_times(value, grad_scale) for value in (weighted, divergence)]
    loss = nll + weighted
    return ELBOTerms(loss, nll, divergence) if return_terms else loss


def _linear_likelihood(
    hidden: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    x: Tensor,
    recon_logvar: Tensor | float | None,
    *,
    likelihood: LikelihoodName,
    written: _Written,
    full: bool,
    reduction: TermReduction,
    extra: Tensor | float | None = None,
    pos_weight: Tensor | float | None = None,
    zi_logits: Tensor | float | None = None,
    weight: Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    block: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """The likelihood of what a linear layer gives."""
    is_packed = recon_logvar is None and bool(_checked_likelihood(likelihood).pairs)
    _check_linear(hidden, linear_weight, linear_bias, x, is_packed)
    _check_block(block)
    if grad_scale is not None:
        _check_number("grad_scale", grad_scale)
    # What the layer gives, as far as checks go: it has no memory.
    stand_in = hidden.new_empty(()).expand(*hidden.shape[:-1], len(linear_weight))
    inputs = _inputs_of(likelihood, stand_in, x, recon_logvar, extra, pos_weight, zi_logits)
    formula = LIKELIHOODS[likelihood]
    names = ["recon_logvar" if (0, k) in formula.pairs else name for k, name in enumerate(formula.inputs)]
    _check_likelihood(formula, inputs, names, -1)
    form = _checked_recon_form(formula, written)
    weighting = () if weight is None else _weighting("weight", weight, reduction, "x", x, 0.0, 1)
    is_cast = is_any_autocast_enabled() and torch.amp.is_autocast_available(hidden.device.type)
    if is_cast and torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, linear_weight = hidden.to(dtype), linear_weight.to(dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(dtype)
    if linear_weight.dtype != hidden.dtype:
        raise TypeError(f"linear_weight: expected {hidden.dtype}, as hidden is, got {linear_weight.dtype}")
    if linear_bias is not None and linear_bias.dtype != hidden.dtype:
        raise TypeError(f"linear_bias: expected {hidden.dtype}, as hidden is, got {linear_bias.dtype}")
    operands = (hidden, linear_weight, linear_bias, x, *inputs[2:], weight)
    name = _backend_for(operands, backend)
    is_weight_learned = weight is not None and weight.requires_grad
    if name == "reference" or is_weight_learned or ops.needs_dispatcher(operands):
        block = x.shape[-1]  # whatever that is: a compiler may not know
    elif block is None:
        block = usual_block(x.shape[:-1].numel(), x.device.type)
    if block >= x.shape[-1]:
        out = torch.nn.functional.linear(hidden, linear_weight, linear_bias)
        options = (written, full, weight, reduction, None, max(out.dim() - 1, 1), backend)
        nll = _likelihood(likelihood, (out, *inputs[1:]), *options)
        return nll if grad_scale is None else with_gradient_times(nll, grad_scale)
    lead, columns = x.shape[:-1], x.shape[-1]
    factor: Number = factor_of(reduction if weight is not None or reduction != "weighted_mean" else "mean", x.shape)
    for normalizer in weighting[1:]:
        factor = factor * normalizer  # type: ignore[operator]
    rows = [_rows(t, lead, columns) for t in (*operands[3:-1], *weighting[:1])]
    enabled = torch.is_grad_enabled()
    spec = Objective(
        (formula.in_full if full and formula.in_full else formula.name,),
        *form_fields([form] if form else []),
        None,
        (weight is not None,),
        (False,),
        1,
        full,
        ("none" if reduction == "none" else "sum",),
        None,
        _value_dtype(x.device.type, hidden, *rows),
        False,
        (False,) * (len(rows) + 3),  # (the layer's output, and beta and grad_scale)
        True,
        name,
    )
    taken = (hidden.reshape(-1, hidden.shape[-1]), linear_weight, linear_bias, *rows)
    call = LinearLikelihoodCall(
        spec,
        block,
        [enabled and isinstance(t, Tensor) and t.requires_grad for t in taken],
        is_deferred=reduction == "none" or (hidden.dtype == torch.float16 and grad_scale is None),
    )
    if isinstance(grad_scale, Tensor):  # a factor of one over so many has more digits than float32
        grad_scale = grad_scale.to(x.device, torch.float64)
    factors = factor, factor if grad_scale is None else factor * grad_scale
    value = linear_likelihood(call, factors, taken)
    if reduction == "none":
        return value if len(lead) == 1 else value.view(lead).flatten(1).sum(1)
    return value


def _rows(operand: Operand, lead: torch.Size, columns: int) -> Operand:
    """An operand that broadcasts to (*lead, columns), as a matrix that broadcasts to (rows, columns)."""
    if not isinstance(operand, Tensor) or operand.dim() == 0:
        return operand
    if operand.shape[:-1].numel() != 1:
        operand = operand.expand(*lead, operand.shape[-1])
    return operand.reshape(-1, operand.shape[-1]) if operand.dim() != 2 else operand


def _check_linear(hidden: object, weight: object, bias: object, x: object, is_packed: bool) -> None:
    """Check a linear layer, and x against what it gives."""
    _check_tensor("hidden", hidden)
    _check_tensor("linear_weight", weight)
    _check_tensor("x", x, integers=True)
    assert isinstance(hidden, Tensor)
    assert isinstance(weight, Tensor)
    assert isinstance(x, Tensor)
    if hidden.dim() < 2:
        raise ValueError(f"hidden: expected shape (batch, ..., in_features), got {tuple(hidden.shape)}")
    if x.shape[:-1] != hidden.shape[:-1]:
        expected = ", ".join(map(str, hidden.shape[:-1]))
        raise ValueError(f"x: expected shape ({expected}, out_features) beside hidden, got {tuple(x.shape)}")
    expected_weight = ((2 if is_packed else 1) * x.shape[-1], hidden.shape[-1])
    if tuple(weight.shape) != expected_weight:
        why = "a mean and a scale for each column of x" if is_packed else "as many rows as x has columns"
        raise ValueError(f"linear_weight: expected shape {expected_weight}, {why}, got {tuple(weight.shape)}")
    _check_same_device("linear_weight", weight, "hidden", hidden)
    _check_same_device("x", x, "hidden", hidden)
    if bias is not None:
        _check_tensor("linear_bias", bias)
        assert isinstance(bias, Tensor)
        if tuple(bias.shape) != expected_weight[:1]:
            raise ValueError(f"linear_bias: expected shape {expected_weight[:1]}, got {tuple(bias.shape)}")
        _check_same_device("linear_bias", bias, "hidden", hidden)


def _check_block(block: object) -> None:
    if block is None:
        return
    if not isinstance(block, numbers.Integral) or isinstance(block, bool):
        raise TypeError(f"block: expected an integer or None, got {type(block).__name__}")
    if block < 1:
        raise ValueError(f"block: expected at least 1, got {block}")


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
    _check_tensor("log_weights", log_weights)
    if not isinstance(dim, numbers.Integral) or isinstance(dim, bool):
        raise TypeError(f"dim: expected an integer, got {type(dim).__name__}")
    if not -log_weights.dim() <= dim < log_weights.dim():
        raise ValueError(f"dim: expected a dimension from {-log_weights.dim()} to {log_weights.dim() - 1}, got {dim}")
    widest = torch.promote_types(log_weights.dtype, torch.float32)
    return torch.logsumexp(log_weights.to(widest), int(dim)) - math.log(max(log_weights.shape[dim], 1))


def _backend_for(operands: Operands, requested: str | None) -> str:
    """The backend that serves these operands: the reference where only operations of PyTorch can."""
    first = operands[0]
    assert isinstance(first, Tensor)
    name = resolve(first.device.type, requested, index=first.device.index)
    return "reference" if is_transformed(operands) and not is_sharded(operands) else name


def _objective_call(
    operands: Operands,
    terms: Sequence[tuple[Formula, Sequence[Form], int]],
    reductions: tuple[str, ...],
    dim: tuple[int, ...] | None,
    packed_dim: int,
    backend: str | None,
    *,
    full: bool = False,
    balance: float | None = None,
    returns_terms: bool = False,
    is_grad_scaled: bool = False,
    inplace: bool = False,
) -> autograd.RecordedObjective:
    """The call of an objective of terms: formulas, their forms, and how many operands a weight adds to each.

    The operands have been checked: the inputs and the weighting of each term, then beta, then what gradients are scaled
    by.
    """
    first = operands[0]
    assert isinstance(first, Tensor)
    enabled = torch.is_grad_enabled()
    if full:
        terms = [(FORMULAS[f.in_full] if f.in_full else f, forms, weighting) for f, forms, weighting in terms]
    needed: list[bool] = []
    name, is_weight_learned = _backend_for(operands, backend), False
    for formula, _, weighting in terms:
        start = len(needed)
        inputs = operands[start : start + len(formula.inputs)]
        # What was given is nothing that kernels make.
        needed += [enabled and isinstance(t, Tensor) and t.requires_grad and formula is not GIVEN for t in inputs]
        for t in operands[len(needed) : len(needed) + weighting]:
            is_weight_learned = is_weight_learned or (isinstance(t, Tensor) and t.requires_grad)
        needed += [False] * weighting
    beta = operands[len(needed)]
    data = operands[: len(needed)]
    weighted = tuple([weighting > 0 for _, _, weighting in terms])
    spec = Objective(
        tuple([formula.name for formula, _, _ in terms]),
        *form_fields([form for _, forms, _ in terms for form in forms]),
        balance,
        weighted,
        tuple([weighting > 1 for _, _, weighting in terms]),
        packed_dim,
        bool(full),
        # Without weights, all count the same.
        tuple(["mean" if r == "weighted_mean" and not w else r for r, w in zip(reductions, weighted, strict=True)]),
        dim,
        _value_dtype(first.device.type, *data, is_sum=dim != ()),
        bool(returns_terms) or (isinstance(beta, Tensor) and beta.requires_grad),  # its gradient is the divergence
        (*needed, *[False] * (len(operands) - len(needed))),
        is_grad_scaled,
        "reference" if is_weight_learned else name,  # kernels know no gradients of weights
    )
    call = autograd.RecordedObjective(operands, spec, in_place=inplace and needed[0])
    if call.in_place:
        if call.forward is None:
            raise ValueError(
                "inplace: expected False where gradients have memory of their own: with the reference formulas (which "
                "compute the gradients of weights, too), under torch.compile, torch.func and tracing; got True"
            )
        strides, dense = first.stride(), dense_strides(first.shape, first.stride())
        if any(size > 1 and s != d for size, s, d in zip(first.shape, strides, dense, strict=True)) or first.is_neg():
            raise ValueError(
                f"{call.terms[0].formula.inputs[0]}: expected memory that its gradient may be written into (inplace="
                f"True), got some with gaps, or broadcast: strides {strides} of shape {tuple(first.shape)}"
            )
    return call
