"""diffusers: the posteriors of its autoencoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import distributions, functional
from ..typing import Generator
from ._replacing import Everywhere, Replacement, check_equal, check_signature, example, in_the_place_of

DEFAULT_NOISE = "fused"


def replacements(noise: str) -> list[Replacement]:
    """The two classes of posteriors that the library has, each by one that reads the moments where they lie."""
    from diffusers.models.autoencoders import autoencoder_oobleck, vae
    from diffusers.utils.torch_utils import randn_tensor

    def of_the_library(self: Any, generator: Generator) -> dict[str, Any]:
        like = self._mu
        return {"noise": randn_tensor(self._shape, generator=generator, device=like.device, dtype=like.dtype)}

    attributes = {"_noise": of_the_library} if noise == "library" else {}
    found: list[Replacement] = []
    for original, base in (
        (vae.DiagonalGaussianDistribution, distributions.DiagonalGaussianDistribution),
        (autoencoder_oobleck.OobleckDiagonalGaussianDistribution, _Oobleck),
    ):
        check_signature(original, "__init__", "parameters, deterministic")
        check_signature(original, "sample", "generator")
        check_signature(original, "kl", "other")
        new = in_the_place_of(original, (base, original), **attributes)
        _compare(original, new)
        found.append(Everywhere("diffusers", original, new))
    return found


def _compare(original: Any, new: Any) -> None:
    """Compare all that two classes compute, on moments some of which are out of bounds."""
    moments, others, sample = 15 * example(2, 4, 2, 3, seed=0), example(2, 4, 2, 3, seed=1), example(2, 2, 2, 3, seed=2)
    for deterministic in (False, True):
        p, q = new(moments, deterministic), original(moments, deterministic)
        for name in ("mean", "std", "var", *(["logvar"] if not deterministic else [])):
            check_equal(f"{original.__name__}.{name}", getattr(p, name), getattr(q, name))
        for name in ("mode", "kl"):
            check_equal(f"{original.__name__}.{name}", getattr(p, name)(), getattr(q, name)())
    p, q = new(moments), original(moments)
    check_equal(f"{original.__name__}.kl", p.kl(new(others)), q.kl(original(others)))
    if hasattr(original, "nll"):
        check_signature(original, "nll", "sample, dims")
        check_equal(f"{original.__name__}.nll", p.nll(sample), q.nll(sample))
    drawn = q.sample(torch.Generator("cpu").manual_seed(3))
    noise = torch.randn(sample.shape, generator=torch.Generator("cpu").manual_seed(3), dtype=sample.dtype)
    check_equal(f"{original.__name__}.sample", q.mean + q.std * noise, drawn)


class _Oobleck(distributions.DiagonalGaussianDistribution):
    """The posterior of Stable Audio's autoencoder: std = softplus(s) + 1e-4 of the second half.

    Source: Evans et al. 2024 (arXiv:2407.14358). Its KL is twice what it is elsewhere, and a mean over all but the
    channels.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        super().__init__(parameters, deterministic, clamp=None)

    @property
    def scale(self) -> Tensor:
        """What the network gives for the standard deviation: a view of the parameters."""
        return self._unbounded_logvar

    @property
    def std(self) -> Tensor:
        return torch.nn.functional.softplus(self.scale) + _FLOOR

    @property
    def var(self) -> Tensor:
        return self.std**2

    @property
    def logvar(self) -> Tensor:
        return torch.log(self.var)

    def sample(self, generator: Generator = None) -> Tensor:
        if isinstance(generator, (tuple, list)) and len(generator) == 1:
            generator = generator[0]
        return functional.reparameterize(self._mu, None, scale="softplus", eps=_FLOOR, **self._noise(generator))

    def kl(self, other: Any = None) -> Tensor:  # type: ignore[override]
        if self.deterministic:
            return self._nothing()
        if other is not None:  # as the library has it, whose log-variances are not those of a KL
            value = (self.mean - other.mean) ** 2 / other.var + self.var / other.var + self.logvar - other.logvar - 1
            return value.sum(1).mean()
        mean = functional.kl_standard_normal(self._mu, None, scale="softplus", eps=_FLOOR, reduction="mean")
        return mean * (2 * self._shape[1])


_FLOOR = 1e-4
