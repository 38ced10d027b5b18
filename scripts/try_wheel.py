"""Uses an installed wheel: that its kernels are there, and that they and the definition of correct agree."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch

import fusedvae
from fusedvae.cli import main

folder = Path(fusedvae.__file__).parent
assert folder.is_relative_to(sysconfig.get_path("platlib")), f"{folder} is not what was installed"
assert "native" in fusedvae.backends(), "no kernels"

generator = torch.Generator().manual_seed(0)
x, recon_x, recon_logvar = torch.randn(3, 64, 784, generator=generator)
mu, logvar = torch.randn(2, 64, 16, generator=generator).requires_grad_()
found = []
for backend in ("native", "reference"):
    z, kl = fusedvae.functional.latent(mu, logvar, generator=torch.Generator().manual_seed(1), backend=backend)
    loss = fusedvae.functional.elbo_loss(recon_x, x, None, None, recon_logvar, kl=kl, backend=backend)
    found.append((z, loss, *torch.autograd.grad(loss + z.sum(), (mu, logvar))))
for mine, expected in zip(*found, strict=True):
    torch.testing.assert_close(mine, expected)
main(["info"])
