"""What a user writes, as type checkers see it: mypy and pyright check this file strictly; nothing runs it.

An error that is expected has a comment that says which; a checker complains of one that is not needed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fusedvae
import fusedvae.functional as F  # noqa: N812 - the usual name
from fusedvae.typing import LikelihoodName, Reduction

x = torch.rand(8, 784)
mu, logvar = torch.zeros(8, 16), torch.zeros(8, 16)

# Losses are tensors, or the terms that were asked for.
assert_type(F.elbo_loss(x, x, mu, logvar), Tensor)
assert_type(F.elbo_loss(x, x, mu, logvar, beta=0.5, reduction=("mean", "batchmean")), Tensor)
assert_type(F.elbo_loss(x, x, mu, logvar, return_terms=True), fusedvae.ELBOTerms)
assert_type(F.elbo_loss(x, x, mu, logvar, return_terms=True).kl, Tensor)
assert_type(F.gaussian_nll(x, x, reduction="none"), Tensor)
assert_type(F.latent(mu, logvar, estimator="sample").z, Tensor)
F.elbo_loss(x, x, mu, logvar, reduction="average")  # type: ignore[call-overload] # pyright: ignore[reportArgumentType]
F.gaussian_nll(x, x, scale="logscale")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
F.elbo_loss(x, x, mu, logvar, recon_scale="sigma")  # type: ignore[call-overload] # pyright: ignore[reportArgumentType]


class Model(nn.Module):
    """With the loss as a part, as people have it."""

    criterion: fusedvae.ELBOLoss

    def __init__(self, likelihood: LikelihoodName = "laplace", reduction: Reduction = "sum") -> None:
        super().__init__()
        self.criterion = fusedvae.ELBOLoss(likelihood=likelihood, reduction=reduction)
        self.terms = fusedvae.ELBOLoss(beta=4.0, return_terms=True)

    def forward(self, x: Tensor) -> Tensor:
        assert_type(self.terms(x, x, mu, logvar), fusedvae.ELBOTerms)
        assert_type(self.criterion(x, x, mu, logvar, return_terms=True), fusedvae.ELBOTerms)
        return assert_type(self.criterion(x, x, mu, logvar, weight=torch.ones(784)), Tensor)


assert_type(fusedvae.GaussianNLLLoss()(x, x, 1.0), Tensor)

vae = fusedvae.VAE(*fusedvae.networks.mlp((784,), 16), 16, likelihood="bernoulli", recon_logvar=None)
output = assert_type(vae(x), fusedvae.VAEOutput)
assert_type(output.loss(x), Tensor)
assert_type(output.loss(x, return_terms=True), fusedvae.ELBOTerms)
assert_type(vae.loss(x, bound="iwae", samples=5), Tensor)
assert_type(vae.loss(x, return_terms=True).nll, Tensor)
assert_type(vae.generate(4), Tensor)
assert_type(fusedvae.VAE.from_pretrained("runs/digits-001"), fusedvae.VAE)
vae.loss(x, bound="vae")  # type: ignore[call-overload] # pyright: ignore[reportArgumentType]


def annealed(return_terms: bool) -> Tensor | fusedvae.ELBOTerms:
    """What is known only when it runs may be either."""
    assert_type(fusedvae.ELBOLoss(return_terms=return_terms)(x, x, mu, logvar), Tensor | fusedvae.ELBOTerms)
    return vae.loss(x, return_terms=return_terms)


with fusedvae.use_backend("reference"):
    z = F.reparameterize(mu, logvar, generator=torch.Generator(), backend="native")
    assert_type(z, Tensor)
assert_type(fusedvae.random.normal((2, 3), seed=0), Tensor)
fusedvae.use_backend("cuda")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
