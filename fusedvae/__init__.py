"""Fused kernels for variational autoencoders in PyTorch.

`ELBOLoss` and `VAE` are the modules, `functional` what they are made of, `random` the noise; `use_backend` and
`backends` choose and list what computes.
"""

from . import functional, networks, random
from .backend import BackendInfo, backends, use_backend
from .functional import ELBOTerms, Latent
from .losses import ELBOLoss
from .vae import VAE, Bernoulli, DiagonalGaussian, DiagonalLaplace, VAEOutput
from .version import __version__

__all__ = [
    "VAE",
    "BackendInfo",
    "Bernoulli",
    "DiagonalGaussian",
    "DiagonalLaplace",
    "ELBOLoss",
    "ELBOTerms",
    "Latent",
    "VAEOutput",
    "__version__",
    "backends",
    "functional",
    "networks",
    "random",
    "use_backend",
]
