"""Distributions as other libraries have them, on the fused kernels.

`DiagonalGaussianDistribution` is the posterior of latent diffusion's autoencoders; `Normal` a
`torch.distributions.Normal`. Each can take the place of the class of its name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributions
from torch import Tensor
from torch.distributions.kl import register_kl

from . import functional
from .backend.reference import FORMULAS
from .backend.specs import shape_of_mean
from .functional.checks import check_broadcast, check_latents, check_packed, check_tensor, dimensions
from .functional.forms import as_written, checked_form
from .layout import broadcasts
from .typing import Bounds, Dim, Generator

__all__ = ["DiagonalGaussianDistribution", "Normal"]


class DiagonalGaussianDistribution:
    """A batch of normal distributions whose moments a network gives: the class of this name in `diffusers`.

    Each method reads the moments where they lie, once, and bounds the log-variance as it goes; `mean`, `logvar`, `std`
    and `var` are worked out when they are asked for, and not kept.

    Its source is Rombach et al. 2022 (arXiv:2112.10752), whose class the libraries and their forks have with small
    changes: this one takes the arguments of all of them.

    Args:
        parameters: the means and then the log-variances along ``chunk_dim``, shape (batch, ...); or a pair (mean,
            logvar) of tensors of one shape.
        deterministic: whether the variance is 0: samples are the mean, and `kl` and `nll` are a 0 of shape (1,).
        chunk_dim: the dimension that the halves are along; not the batch.
        clamp: bounds (low, high) of the log-variance, either of which may be None; or None for none.

    Raises:
        TypeError, ValueError: parameters that are no float tensors, or do not fit.
    """

    parameters: Tensor | Sequence[Tensor]
    deterministic: bool

    def __init__(
        self,
        parameters: Tensor | Sequence[Tensor],
        deterministic: bool = False,
        *,
        chunk_dim: int = 1,
        clamp: Bounds = (-30.0, 20.0),
    ) -> None:
        pair = parameters if isinstance(parameters, (tuple, list)) else (parameters, None)
        if len(pair) != 2:
            raise ValueError(f"parameters: expected a tensor or a pair (mean, logvar), got {len(pair)} of them")
        self._mu: Any = pair[0]
        self._logvar: Any = pair[1]
        if self._logvar is None:
            check_tensor("parameters", self._mu)
            check_packed("parameters", self._mu, chunk_dim, dim_name="chunk_dim")
        else:
            check_latents(self._mu, self._logvar, chunk_dim)
        checked_form(("scale", "clamp", "eps"), as_written("logvar", clamp, 0.0), FORMULAS["kl_standard_normal"])
        self.parameters = parameters
        self.deterministic = deterministic
        self._chunk_dim, self._clamp = chunk_dim, clamp

    @property
    def mean(self) -> Tensor:
        """The means, (batch, ...): a view of the parameters."""
        return self._mu if self._logvar is not None else self._mu.chunk(2, dim=self._chunk_dim)[0]

    @property
    def logvar(self) -> Tensor:
        """The log-variances, bounded."""
        logvar = self._unbounded_logvar
        low, high = self._clamp or (None, None)
        return logvar if low is None and high is None else logvar.clamp(low, high)

    @property
    def std(self) -> Tensor:
        """The standard deviations: 0 if deterministic."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        """The variances: 0 if deterministic."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(self.logvar)

    @property
    def _unbounded_logvar(self) -> Tensor:
        return self._logvar if self._logvar is not None else self._mu.chunk(2, dim=self._chunk_dim)[1]

    def sample(self, generator: Generator = None) -> Tensor:
        """Draw mean + std * noise, differentiable in the parameters: a tensor of the mean's shape and dtype.

        Args:
            generator: where the noise's seed comes from; on the CPU, it may be for parameters elsewhere. A list has one
                for each sample of the batch, whose noise is then what it would be in a batch of its own; a list of one
                is that one.
        """
        if self.deterministic:
            return self.mean.clone()
        if isinstance(generator, (tuple, list)) and len(generator) == 1:
            generator = generator[0]
        return functional.reparameterize(
            self._mu,
            self._logvar,
            clamp=self._clamp,
            packed_dim=self._chunk_dim,
            **self._noise(generator),
        )

    def _noise(self, generator: Generator) -> dict[str, Any]:
        """Where a sample's noise comes from, as an argument of `functional.reparameterize`."""
        return {"generator": generator}

    def kl(
        self,
        other: Any = None,
        dims: Dim = None,
        *,
        no_sum: bool = False,
        reduction: str = "sum",
    ) -> Tensor:
        """The divergence from N(0, I), or from ``other``: (m^2 + var - 1 - logvar) / 2, summed.

        Args:
            other: another one, of this class or with a ``mean`` and a ``logvar`` like it.
            dims: what to sum over: dimensions 1, 2 and 3 by default, as in `diffusers`, which leaves the last dimension
                of a video's moments; those of fewer dimensions are summed over all but the batch.
            no_sum: a value an element, **without the half**, as the forks that have this argument give it.
            reduction: "sum", or "mean" of the elements along ``dims``.

        Returns:
            (batch,), or what ``dims`` leave; of half precision in float32.
        """
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction: expected 'sum' or 'mean', got {reduction!r}")
        if no_sum and (dims is not None or reduction != "sum"):
            raise ValueError("no_sum: expected False with dims or reduction='mean'")
        if self.deterministic:
            return self._nothing()
        mean = self._shape
        dims = () if no_sum else self._dims(dims)
        prior_mu, prior_logvar, prior_clamp = self._prior(other)
        total = functional.kl_normal(
            self._mu,
            self._logvar,
            prior_mu,
            prior_logvar,
            clamp=self._clamp,
            prior_clamp=prior_clamp,
            weight=self._mu.new_full((), 2.0) if no_sum else None,
            reduction="none",
            dim=dims,
            packed_dim=self._chunk_dim,
        )
        if reduction == "mean":
            total = total / max(math.prod(mean) // max(math.prod(total.shape), 1), 1)
        return total

    def nll(self, sample: Tensor, dims: Dim = (1, 2, 3)) -> Tensor:
        """-log of the density at a sample, (log 2 pi + logvar + (sample - mean)^2 / var) / 2, summed over ``dims``.

        Args:
            sample: a tensor of the mean's shape, or that broadcasts to it.
            dims: what to sum over; of moments with fewer than four dimensions, by default all but the batch.
        """
        if self.deterministic:
            return self._nothing()
        check_tensor("sample", sample, integers=True)
        shape = self._shape
        if sample.shape != shape:
            check_broadcast("sample", sample, shape)
            sample = sample.expand(shape)
        return functional.gaussian_nll(
            self._mu,
            sample,
            self._logvar,
            clamp=self._clamp,
            full=True,
            reduction="none",
            dim=self._dims(None if tuple(dims) == (1, 2, 3) else dims) if isinstance(dims, Sequence) else dims,
            packed_dim=self._chunk_dim,
        )

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    @property
    def _shape(self) -> torch.Size:
        return shape_of_mean(self._mu, self._logvar, self._chunk_dim)

    def _dims(self, dims: Dim) -> Dim:
        """Dimensions to sum over, as `functional` takes them; those of `diffusers` unless told."""
        if dims is not None:
            return dimensions("dims", dims, len(self._shape))
        return (1, 2, 3) if len(self._shape) > 4 else None

    def _prior(self, other: Any) -> tuple[Tensor | None, Tensor | None, Bounds]:
        """The moments of another one and the bounds of its log-variance, as `functional.kl_normal` takes them."""
        if other is None:
            return None, None, None
        if getattr(other, "deterministic", False):
            raise ValueError("other: expected a distribution that has a density, got a deterministic one")
        if not isinstance(other, DiagonalGaussianDistribution):
            if not (hasattr(other, "mean") and hasattr(other, "logvar")):
                raise TypeError(f"other: expected a distribution with a mean and a logvar, got {type(other).__name__}")
            return other.mean, other.logvar, None
        if not broadcasts(other._shape, self._shape):
            expected = f"of a shape that broadcasts to {tuple(self._shape)}"
            raise ValueError(f"other: expected a distribution {expected}, got one of {tuple(other._shape)}")
        if other._logvar is None and other._chunk_dim % other._mu.dim() != self._chunk_dim % self._mu.dim():
            return other.mean, other._unbounded_logvar, other._clamp
        return other._mu, other._logvar, other._clamp

    def _nothing(self) -> Tensor:
        return torch.zeros(1, device=self._mu.device)


class Normal(torch.distributions.Normal):
    """A `torch.distributions.Normal` whose samples and divergences come from the fused kernels.

    What torch's class does in several passes over memory is one: `rsample`, and `torch.distributions.kl_divergence`
    between two of them or one of them and torch's own, also under `torch.distributions.Independent`, which is what
    pyro's TraceMeanField_ELBO calls. All else is torch's.

    No argument's values are looked at unless ``validate_args=True`` asks for it, so that nothing waits for a GPU.
    Samples are those of the package's noise (`fusedvae.random`), seeded by torch's default generator.

    Args:
        loc: mean, a float tensor or a number.
        scale: standard deviation, likewise; the two broadcast.
        validate_args: whether to check the values of arguments, as torch does by default.
    """

    def __init__(self, loc: Tensor | float, scale: Tensor | float, validate_args: bool | None = None) -> None:
        super().__init__(loc, scale, validate_args=bool(validate_args))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Normal:
        """The distribution with these batch dimensions, without a copy of its parameters."""
        new: Normal = super().expand(batch_shape, self._get_checked_instance(Normal, _instance))
        return new

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - as torch has it
        """Draw without a gradient: what `rsample` draws."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008 - as torch has it
        """Draw loc + scale * noise, differentiable in both, of shape sample_shape + batch_shape."""
        shape = self._extended_shape(sample_shape)
        draws = torch.Size(sample_shape).numel()
        if draws == 0:
            return (self.loc + self.scale).expand(shape)
        z = functional.reparameterize(
            _batched(self.loc),
            _batched(self.scale),
            scale="std",
            samples=draws if len(sample_shape) else None,
            **self._noise(shape),
        )
        return z.reshape(shape)

    def _noise(self, shape: torch.Size) -> dict[str, Any]:
        """Where the noise of this shape comes from, as an argument of `functional.reparameterize`."""
        return {}


def _batched(moment: Tensor) -> Tensor:
    """With a batch dimension."""
    return moment.view(1) if moment.dim() == 0 else moment


@register_kl(Normal, Normal)
@register_kl(Normal, torch.distributions.Normal)
@register_kl(torch.distributions.Normal, Normal)
def _kl_of_normals(p: torch.distributions.Normal, q: torch.distributions.Normal) -> Tensor:
    moments = [p.loc, p.scale, q.loc, q.scale]
    # Numbers may lie anywhere, as in PyTorch's arithmetic.
    spread = [t for t in moments if t.dim() > 0] or moments
    dtype = functools.reduce(torch.promote_types, [t.dtype for t in spread])
    loc, scale, prior_loc, prior_scale = [t if t.dim() > 0 else t.to(spread[0].device, dtype) for t in moments]
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    return functional.kl_normal(
        _batched(loc.expand(shape)),
        _batched(scale.expand(shape)),
        prior_loc,
        prior_scale,
        scale="std",
        prior_scale="std",
        reduction="none",
        dim=(),
    ).reshape(shape)
