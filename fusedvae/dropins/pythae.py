"""pythae: the samples of all its models, and the losses of those that are made of them and a likelihood.

Sources of the models: Kingma & Welling 2014 (VAE), Higgins et al. 2017 (BetaVAE), Burgess et al. 2018
(DisentangledBetaVAE), Burda et al. 2016 (IWAE), Rainforth et al. 2018 (CIWAE, MIWAE, PIWAE), Tomczak & Welling 2018
(VAMP), Kingma et al. 2016 (VAE_IAF), Rezende & Mohamed 2015 (VAE_LinNF).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import functional, ops, random
from ..typing import LikelihoodName
from ._replacing import Method, Replacement, check_equal, check_signature, example

_Losses = tuple[Tensor, ...]

DEFAULT_NOISE = "fused"


def replacements(noise: str) -> list[Replacement]:
    """``_sample_gauss`` wherever it is defined, and the ``loss_function`` of the models listed below."""
    from pythae import models

    sample = _sample_of_library_noise if noise == "library" else _sample
    found: list[Replacement] = []
    for model in _subclasses(models.base.BaseAE):
        if "_sample_gauss" in vars(model):
            check_signature(model, "_sample_gauss", "mu, std")
            _compare_samples(model)
            found.append(Method(model, "_sample_gauss", sample))
    for name, (new, arguments) in _LOSSES.items():
        model = getattr(models, name)
        check_signature(model, "loss_function", arguments)
        _compare_losses(model, new, arguments)
        found.append(Method(model, "loss_function", new))
    return found


def _subclasses(model: Any) -> Iterator[Any]:
    for subclass in model.__subclasses__():
        if subclass.__module__.startswith("pythae."):
            yield subclass
            yield from _subclasses(subclass)


# --- samples ----------------------------------------------------------------------------------------------------------


def _sample(self: Any, mu: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """A sample and its noise."""
    seed = ops.draw_seed(std.device, None, by_dispatcher=True)
    noise = random.normal(std.shape, seed, dtype=std.dtype, device=std.device)
    return functional.reparameterize(mu, std, scale="std", noise=noise), noise


def _sample_of_library_noise(self: Any, mu: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    noise = torch.randn_like(std)
    return functional.reparameterize(mu, std, scale="std", noise=noise), noise


def _compare_samples(model: Any) -> None:
    mu, std = example(2, 3, seed=0), example(2, 3, seed=1).exp()
    with torch.random.fork_rng(devices=[]):
        z, noise = model._sample_gauss(None, mu, std)
    check_equal(f"{model.__name__}._sample_gauss", mu + std * noise, z)


# --- losses -----------------------------------------------------------------------------------------------------------

_LIKELIHOODS: dict[str, LikelihoodName] = {"mse": "gaussian", "bce": "bernoulli_probs"}
"""Of the library's names: its "mse" has the half."""


def _nll(self: Any, recon_x: Tensor, x: Tensor) -> Tensor:
    """-log p(x|z) but for its constant, summed over the last dimension."""
    if self.model_config.reconstruction_loss == "bce":
        return functional.bernoulli_nll(recon_x, x, from_logits=False, reduction="none", dim=-1)
    return functional.gaussian_nll(recon_x, x, reduction="none", dim=-1)


def _rows(recon_x: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return recon_x.reshape(x.shape[0], -1), x.reshape(x.shape[0], -1)


def _kl(mu: Tensor, log_var: Tensor) -> Tensor:
    return functional.kl_standard_normal(mu, log_var, reduction="none", dim=-1)


def _nll_of_normal(z: Tensor, mu: Tensor, log_var: Tensor) -> Tensor:
    """-log N(z; mu, e^log_var) but for its constant, summed over the last dimension."""
    return functional.gaussian_nll(mu, z, log_var, reduction="none", dim=-1)


def _nll_of_standard_normal(z: Tensor) -> Tensor:
    return functional.gaussian_nll(z, z.new_zeros(()).expand_as(z), reduction="none", dim=-1)


def _means(*values: Tensor) -> _Losses:
    return tuple([value.mean(dim=0) for value in values])


def _bound(self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, beta: float) -> _Losses:
    recon_x, x = _rows(recon_x, x)
    likelihood = _LIKELIHOODS[self.model_config.reconstruction_loss]
    terms = functional.elbo_loss(recon_x, x, mu, log_var, likelihood=likelihood, beta=beta, return_terms=True)
    return tuple(terms)


def _vae(self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> _Losses:
    return _bound(self, recon_x, x, mu, log_var, 1.0)


def _beta_vae(self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> _Losses:
    return _bound(self, recon_x, x, mu, log_var, self.beta)


def _disentangled_beta_vae(
    self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor, epoch: int
) -> _Losses:
    nll, kl = _nll(self, *_rows(recon_x, x)), _kl(mu, log_var)
    capacity = self.C * min(epoch / (self.warmup_epoch + 1), 1)
    return _means(nll + self.beta * torch.abs(kl - capacity), nll, kl)


def _vamp(self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor, epoch: int) -> _Losses:
    nll = _nll(self, *_rows(recon_x, x))
    kl = -self._log_p_z(z) - _nll_of_normal(z, mu, log_var)
    beta = 1.0
    if self.linear_scheduling > 0 and self.training:
        beta = min(epoch / self.linear_scheduling, 1.0)
    return _means(nll + beta * kl, nll, kl)


def _flow(
    self: Any,
    recon_x: Tensor,
    x: Tensor,
    mu: Tensor,
    log_var: Tensor,
    z0: Tensor,
    zk: Tensor,
    log_abs_det_jac: Tensor,
) -> _Losses:
    nll = _nll(self, *_rows(recon_x, x))
    kl = _nll_of_standard_normal(zk) - _nll_of_normal(z0, mu, log_var) - log_abs_det_jac
    return _means(nll + kl, nll, kl)


def _terms_of_samples(
    self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    """-log p(x|z) and log q(z|x) - log p(z) at each sample; the samples lie between the batch and the rest.

    Each element of ``x`` is read where it lies, for all samples of it.
    """
    batch, *samples, elements = recon_x.shape
    targets = x.reshape(batch, *[1] * len(samples), elements).expand(recon_x.shape)
    return _nll(self, recon_x, targets), _nll_of_standard_normal(z) - _nll_of_normal(z, mu, log_var)


def _weighted(log_weights: Tensor) -> Tensor:
    """-sum(w log w~), the normalised weights w as constants, over dimension 1."""
    return -(log_weights.softmax(1).detach() * log_weights).sum(1)


def _iwae(self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> _Losses:
    nll, kl = _terms_of_samples(self, recon_x, x, mu, log_var, z)
    return _weighted(-(nll + kl)).mean(), nll.mean(), kl.mean()


def _ciwae(self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> _Losses:
    nll, kl = _terms_of_samples(self, recon_x, x, mu, log_var, z)
    of_one, of_all = (nll + kl).mean(dim=-1), _weighted(-(nll + kl))
    return _means(self.beta * of_one + (1 - self.beta) * of_all, nll, kl)


def _miwae(self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> _Losses:
    nll, kl = _terms_of_samples(self, recon_x, x, mu, log_var, z)
    return _means(_weighted(-(nll + kl)).mean(dim=-1), nll, kl)


def _piwae(self: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> _Losses:
    nll, kl = _terms_of_samples(self, recon_x, x, mu, log_var, z)
    log_weights = -(nll + kl)
    return _means(_weighted(log_weights).mean(dim=-1), _weighted(log_weights.flatten(1)), nll, kl)


_PLAIN = "recon_x, x, mu, log_var, z"
_FLOWING = "recon_x, x, mu, log_var, z0, zk, log_abs_det_jac"
_LOSSES: dict[str, tuple[Callable[..., _Losses], str]] = {
    "VAE": (_vae, _PLAIN),
    "BetaVAE": (_beta_vae, _PLAIN),
    "DisentangledBetaVAE": (_disentangled_beta_vae, f"{_PLAIN}, epoch"),
    "VAMP": (_vamp, f"{_PLAIN}, epoch"),
    "VAE_IAF": (_flow, _FLOWING),
    "VAE_LinNF": (_flow, _FLOWING),
    "IWAE": (_iwae, _PLAIN),
    "CIWAE": (_ciwae, _PLAIN),
    "MIWAE": (_miwae, _PLAIN),
    "PIWAE": (_piwae, _PLAIN),
}


def _compare_losses(model: Any, new: Callable[..., _Losses], arguments: str) -> None:
    """Compare two loss functions, of a model that has what they ask of it."""
    samples = {"IWAE": (3,), "CIWAE": (3,), "MIWAE": (2, 3), "PIWAE": (2, 3)}.get(model.__name__, ())
    latent, data = (2, *samples, 4), (2, *samples, 5)
    given = {
        "recon_x": example(*data, seed=0).sigmoid(),
        "x": example(2, 5, seed=1).sigmoid(),
        "mu": example(*latent, seed=2),
        "log_var": example(*latent, seed=3),
        "z": example(*latent, seed=4),
        "z0": example(*latent, seed=5),
        "zk": example(*latent, seed=6),
        "log_abs_det_jac": example(2, seed=7),
        "epoch": 3,
    }
    for name in _LIKELIHOODS:
        stand_in = SimpleNamespace(
            model_config=SimpleNamespace(reconstruction_loss=name),
            beta=0.3,
            C=2.0,
            warmup_epoch=5,
            linear_scheduling=7,
            training=True,
            n_samples=3,
            gradient_n_estimates=2,
            _log_p_z=lambda z: z.sin().sum(1),
        )
        operands = [given[argument] for argument in arguments.split(", ")]
        check_equal(
            f"{model.__name__}.loss_function", new(stand_in, *operands), model.loss_function(stand_in, *operands)
        )
