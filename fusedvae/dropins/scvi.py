"""scvi-tools: its normal distributions, with their samples and divergences, and the likelihoods of counts.

Source of the latter: Lopez et al. 2018 (doi:10.1038/s41592-018-0229-2).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributions
from torch import Tensor
from torch.distributions.utils import _standard_normal

from .. import distributions, functional
from ._replacing import Everywhere, Method, Replacement, check_equal, check_signature, example, in_the_place_of

DEFAULT_NOISE = "library"
"""Some of its methods draw again what others drew from the same seed, with distributions that they import where no
patch reaches: all must draw alike."""


def replacements(noise: str) -> list[Replacement]:
    """torch's normal distribution where the library has it, the library's own, and two densities of counts."""
    import scvi

    library = scvi.distributions
    counts = library._negative_binomial
    return [
        *_normals(library.Normal, noise),
        *_counts(counts.log_nb_positive, library.NegativeBinomial),
        *_counts(counts.log_zinb_positive, library.ZeroInflatedNegativeBinomial),
    ]


# --- normal distributions ---------------------------------------------------------------------------------------------


def _normals(original: Any, noise: str) -> list[Replacement]:
    def of_the_library(self: Any, shape: torch.Size) -> dict[str, Any]:
        drawn = _standard_normal(shape, dtype=self.loc.dtype, device=self.loc.device)
        batch = self.loc.shape or (1,)
        return {"noise": drawn.reshape(batch if shape == self.loc.shape else (-1, *batch))}

    attributes = {"_noise": of_the_library} if noise == "library" else {}
    normal = type("Normal", (distributions.Normal,), {**attributes, "__module__": __name__}) if attributes else None
    check_signature(original, "__init__", "mu, scale, validate_args, normal_mu")
    new = in_the_place_of(original, (original, distributions.Normal), **attributes)
    loc, scale, value = example(2, 3, seed=0), example(2, 3, seed=1).exp(), example(2, 3, seed=2)
    p, q = new(loc, scale, normal_mu=loc), original(loc, scale, normal_mu=loc)
    check_equal("scvi.distributions.Normal.log_prob", p.log_prob(value), q.log_prob(value))
    return [
        Everywhere("scvi", torch.distributions.Normal, normal or distributions.Normal),
        Everywhere("scvi", original, new),
    ]


# --- counts -----------------------------------------------------------------------------------------------------------


def _counts(function: Callable[..., Tensor], distribution: Any) -> list[Replacement]:
    """A density of counts as a function and as ``log_prob`` of a distribution, and what keeps a dispersion that all
    cells share as it was given."""
    is_inflated = "zi_logits" in distribution.arg_constraints
    inputs = "x, mu, theta, pi" if is_inflated else "x, mu, theta"
    check_signature(sys.modules[function.__module__], function.__name__, f"{inputs}, eps, log_fn, lgamma_fn")
    check_signature(distribution, "log_prob", "value")
    density, log_prob = _density_of(function), _log_prob_of(distribution.log_prob)
    value = 3 * example(4, 5, seed=0).abs().floor()
    moments = {"mu": 3 * example(4, 5, seed=1).exp(), "theta": example(5, seed=2).exp()}
    if is_inflated:
        moments["zi_logits"] = example(4, 5, seed=3)
    check_equal(function.__name__, density(value, *moments.values()), function(value, *moments.values()))
    p = distribution(**moments)
    check_equal(f"{distribution.__name__}.log_prob", log_prob(p, value), p.log_prob(value))
    return [
        Everywhere("scvi", function, density),
        Method(distribution, "__init__", _keeping_theta(distribution.__init__)),
        Method(distribution, "log_prob", log_prob),
    ]


def _density(x: Tensor, mu: Tensor, theta: Tensor, zi_logits: Tensor | None = None) -> Tensor:
    """The logarithm of a density in one pass, an element of all that is given, broadcast."""
    shape = torch.broadcast_shapes(*[t.shape for t in (x, mu, theta, zi_logits) if t is not None])
    mu, x = mu.expand(shape), x.expand(shape)
    # The sign is a weight, inside of the kernel, and not a pass over the result.
    options: dict[str, Any] = {"weight": mu.new_full((), -1.0), "reduction": "none", "dim": ()}
    if zi_logits is None:
        return functional.negative_binomial_nll(mu, x, theta, **options)
    return functional.zero_inflated_negative_binomial_nll(mu, x, theta, zi_logits, **options)


def _density_of(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A density as a function. What is asked of it that the kernels do not have, and JAX's arrays, remain the
    library's."""

    signature = inspect.signature(original)

    @functools.wraps(original)
    def density(*arguments: Any, **named: Any) -> Tensor:
        bound = signature.bind(*arguments, **named)
        bound.apply_defaults()
        *inputs, eps, log_fn, lgamma_fn = bound.arguments.values()
        is_known = eps == 1e-8 and log_fn is torch.log and lgamma_fn is torch.lgamma
        if not is_known or not all(isinstance(t, Tensor) for t in inputs) or not any(t.dim() for t in inputs):
            return original(*arguments, **named)
        return _density(*inputs)

    return density


def _keeping_theta(original: Callable[..., None]) -> Callable[..., None]:
    """The library expands theta to a value an element; the gradient of what was given is summed by the kernel."""

    @functools.wraps(original)
    def initialize(self: Any, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        theta = named.get("theta")
        if isinstance(theta, Tensor):
            self._given = self.theta, theta

    return initialize


def _log_prob_of(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A density as a method. Values are looked at only if the distribution validates its arguments."""

    @functools.wraps(original)
    def log_prob(self: Any, value: Tensor) -> Tensor:
        expanded, theta = getattr(self, "_given", (None, self.theta))
        if expanded is not self.theta:
            theta = self.theta
        if self._validate_args or self._eps != 1e-8 or not (value.dim() or self.mu.dim()):
            return original(self, value)
        return _density(value, self.mu, theta, getattr(self, "zi_logits", None))

    return log_prob
