"""scvi-tools: its normal distributions, with their samples and divergences, and the likelihoods of counts.

Source of the latter: Lopez et al. 2018 (doi:10.1038/s41592-018-0229-2).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributions
from torch import Tensor
from torch.distributions.utils import _standard_normal

from .. import distributions, functional
from ._replacing import Class, Method, Replacement, check_equal, check_signature, example, in_the_place_of


def replacements(noise: str) -> list[Replacement]:
    """torch's normal distribution where the library has it, the library's own, and two densities of counts."""
    import scvi

    library = scvi.distributions
    return [*_normals(library.Normal, noise), *_counts(library.NegativeBinomial, library.ZeroInflatedNegativeBinomial)]


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
        Class("scvi", torch.distributions.Normal, normal or distributions.Normal),
        Class("scvi", original, new),
    ]


# --- counts -----------------------------------------------------------------------------------------------------------


def _counts(*originals: Any) -> list[Replacement]:
    """``log_prob`` of the distributions of counts, and what keeps a dispersion that all cells share as it was given."""
    found: list[Replacement] = []
    for original in originals:
        check_signature(original, "log_prob", "value")
        log_prob = _log_prob_of(original.log_prob)
        value = 3 * example(4, 5, seed=0).abs().floor()
        moments = {"mu": 3 * example(4, 5, seed=1).exp(), "theta": example(5, seed=2).exp()}
        if "zi_logits" in original.arg_constraints:
            moments["zi_logits"] = example(4, 5, seed=3)
        p = original(**moments)
        check_equal(f"{original.__name__}.log_prob", log_prob(p, value), p.log_prob(value))
        found += [
            Method(original, "__init__", _keeping_theta(original.__init__)),
            Method(original, "log_prob", log_prob),
        ]
    return found


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
    """A density in one pass. Values are looked at only if the distribution validates its arguments."""

    @functools.wraps(original)
    def log_prob(self: Any, value: Tensor) -> Tensor:
        zi_logits = getattr(self, "zi_logits", None)
        expanded, theta = getattr(self, "_given", (None, None))
        if expanded is not self.theta:
            theta = self.theta
        shape = torch.broadcast_shapes(value.shape, self.mu.shape)
        if self._validate_args or self._eps != 1e-8 or not shape:
            return original(self, value)
        mu, x = self.mu.expand(shape), value.expand(shape)
        # The sign is a weight, inside of the kernel, and not a pass over the result.
        options: dict[str, Any] = {"weight": mu.new_full((), -1.0), "reduction": "none", "dim": ()}
        if zi_logits is None:
            return functional.negative_binomial_nll(mu, x, theta, **options)
        return functional.zero_inflated_negative_binomial_nll(mu, x, theta, zi_logits, **options)

    return log_prob
