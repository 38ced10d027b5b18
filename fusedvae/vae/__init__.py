"""The variational autoencoder as a module: any encoder, any decoder, and the fused kernels between them.

    vae = fusedvae.VAE(encoder, decoder, latent_dim=16)
    vae.loss(x).backward()          # the negative evidence lower bound (ELBO)
    images = vae.generate(64)

Source of the model and its bound: Kingma & Welling 2014, "Auto-Encoding Variational Bayes", appendix B; of the bound
of several samples and the estimate of log p(x): Burda, Grosse & Salakhutdinov 2016 (arXiv:1509.00519).
"""

from ..torch_private import register_outputs
from .families import (
    Bernoulli,
    DiagonalGaussian,
    DiagonalLaplace,
    DiscretizedLogistic,
    NegativeBinomial,
    Poisson,
    ZeroInflatedNegativeBinomial,
)
from .module import VAE
from .output import VAEOutput

__all__ = [
    "VAE",
    "Bernoulli",
    "DiagonalGaussian",
    "DiagonalLaplace",
    "DiscretizedLogistic",
    "NegativeBinomial",
    "Poisson",
    "VAEOutput",
    "ZeroInflatedNegativeBinomial",
]

register_outputs(
    __name__,
    DiagonalGaussian,
    DiagonalLaplace,
    Bernoulli,
    Poisson,
    NegativeBinomial,
    ZeroInflatedNegativeBinomial,
    DiscretizedLogistic,
    VAEOutput,
)
