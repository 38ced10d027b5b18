"""The sample of the latent, and with it the divergence of its distribution from the prior."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import autograd, ops
from ..backend.evaluation import laid_out_as
from ..backend.reference import FORMULAS, form_fields
from ..backend.specs import Sampling, shape_of_mean
from ..calls import Operand, Operands, find
from ..random import normal
from ..typing import Backend, Bounds, Dim, Estimator, Generator, NormalScale
from .checks import (
    REQUIRED_WITH_PRIOR_MU,
    check_count,
    check_integer,
    check_latents,
    check_same_device,
    check_tensor,
    dimensions,
)
from .divergences import check_divergence, divergence_of, run_divergence
from .forms import Written, as_written, checked_forms, unless_usual
from .objective import backend_for, value_dtype


class Latent(NamedTuple):
    """What `latent` returns: of one operation, so that all backward passes but the last need ``retain_graph=True``."""

    z: Tensor
    """The sample, of mu's shape; with ``samples``, that many of them in front."""
    kl: Tensor
    """The divergence of q from the prior, summed over ``dim``: by default shape (batch,)."""


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
    written = unless_usual(scale, clamp, eps, "logvar")
    return _sampled(
        (mu, logvar), None, False, written, None, samples, None, offset, generator, noise, packed_dim, backend
    )[0]


def latent(
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
    formula, inputs = divergence_of(mu, logvar, prior_mu, prior_logvar)
    posterior = unless_usual(scale, clamp, eps, "logvar")
    prior = None
    if prior_scale != "logvar" or prior_clamp is not None or prior_eps is not None:
        prior = as_written(prior_scale, prior_clamp, prior_eps)  # type: ignore[arg-type]
    if estimator == "analytic" and samples is not None:  # the samples have one divergence
        # It comes first: what is wrong with a prior is said before a generator is drawn from.
        kl = run_divergence(inputs, formula, posterior, prior, None, None, "none", dim, packed_dim, backend)
        options = (generator, noise, packed_dim, backend)
        return Latent(_sampled(inputs[:2], None, False, posterior, None, samples, None, offset, *options)[0], kl)
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


_OFFSETS = 2**53
"""Up to here every integer is a float64."""


def _sampled(
    inputs: tuple[Operand, ...],
    divergence: str | None,
    at_sample: bool,
    posterior: Written | None,
    prior: Written | None,
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
    if noise is not None and offset:
        raise ValueError(f"offset: expected 0 when noise is given, which is no part of a stream; got {offset}")
    if generator is not None and not isinstance(generator, torch.Generator):
        if offset:
            raise ValueError(f"offset: expected 0 with generators that each have a stream of their own, got {offset}")
        noise, generator = _noise_of_each(generator, inputs, samples, packed_dim, backend), None
    first = None
    if type(offset) is not int or offset != 0:
        check_integer("offset", offset)
        if offset < 0:
            raise ValueError(f"offset: expected at least 0, got {offset}")
        if offset >= _OFFSETS:
            raise ValueError(f"offset: expected less than 2^53, got {offset}")
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
    posterior: Written | None,
    prior: Written | None,
    samples: int | None,
    dim: Dim,
    packed_dim: int,
    backend: str | None,
) -> autograd.DifferentiableLatent:
    *inputs, _, first, noise = operands
    formula = FORMULAS[divergence or "kl_standard_normal"]
    check_integer("packed_dim", packed_dim)
    check_divergence(inputs, packed_dim)
    forms = checked_forms(formula, posterior, prior, inputs[-1] if len(inputs) > 2 else None)
    mu, logvar = inputs[:2]
    assert isinstance(mu, Tensor)
    mean = shape_of_mean(mu, logvar, packed_dim)
    check_count("samples", samples)
    if noise is not None:
        check_tensor("noise", noise)
        assert isinstance(noise, Tensor)
        expected = mean if samples is None else (samples, *mean)
        if tuple(noise.shape) != tuple(expected):
            raise ValueError(f"noise: expected shape {tuple(expected)}, got {tuple(noise.shape)}")
        check_same_device("noise", noise, "mu", mu)
    summed = tuple(range(1, len(mean))) if dim is None else dimensions("dim", dim, len(mean))
    if samples is not None:
        summed = tuple([d + 1 for d in summed])
    maps, squared, limits = form_fields(forms)
    spec = Sampling(
        divergence=formula.name,
        maps=maps,
        squared=squared,
        limits=limits,
        samples=samples,
        at_sample=at_sample,
        kl_dtype=value_dtype(mu.device.type, *inputs, is_sum=dim is None or bool(summed)) if divergence else None,
        kl_dim=summed,
        packed_dim=int(packed_dim),
        backend=backend_for(operands, backend),
    )
    # The seed is drawn when all is checked; what it is like is known.
    seed = torch.empty((), dtype=torch.int64, device=mu.device) if noise is None else None
    return autograd.DifferentiableLatent((*inputs, seed, first, noise), spec)


def _noise_of_each(
    generators: Sequence[torch.Generator],
    inputs: tuple[Operand, ...],
    samples: int | None,
    packed_dim: int,
    backend: Backend | None,
) -> Tensor:
    """The noise of a batch, that of each of its samples from a generator of its own."""
    mu, logvar = inputs[:2]
    check_latents(mu, logvar, packed_dim)
    assert isinstance(mu, Tensor)
    given = generators if isinstance(generators, (list, tuple)) else [generators]
    for generator in given:
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator: expected a torch.Generator, a list of them or None, got {type(generator).__name__}"
            )
    check_count("samples", samples)
    if len(generators) != mu.shape[0]:
        raise ValueError(f"generator: expected one for each of {mu.shape[0]} samples, got {len(generators)}")
    shape = shape_of_mean(mu, logvar, packed_dim)
    own = shape[1:] if samples is None else (samples, *shape[1:])
    drawn = []
    for generator in generators:
        seed = ops.draw_seed(mu.device, generator, by_dispatcher=False)
        drawn.append(normal(tuple(own), seed, device=mu.device, backend=backend))
    dim = 0 if samples is None else 1
    noise = torch.stack(drawn, dim) if drawn else torch.empty((*own[:dim], 0, *own[dim:]), device=mu.device)
    return laid_out_as(noise, mu)
