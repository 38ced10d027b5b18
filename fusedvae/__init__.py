"""Fused kernels for variational autoencoders in PyTorch.

`ELBOLoss`, `LinearLikelihood`, `GaussianNLLLoss` and `VAE` are the modules, `functional` what they are made of,
`random` the noise, `networks` ready encoders and decoders; `distributions` are other libraries' classes, and `patch`
makes an installed library use them; `use_backend` and `backends` choose and list what computes; `typing` has what
arguments can be.
"""

from . import distributions, functional, networks, random, typing
from .backend import BackendInfo, backends, use_backend
from .dropins import Patch, patch
from .functional import ELBOTerms, Latent
from .losses import ELBOLoss, GaussianNLLLoss, LinearLikelihood
from .vae import (
    VAE,
    Bernoulli,
    DiagonalGaussian,
    DiagonalLaplace,
    DiscretizedLogistic,
    NegativeBinomial,
    Poisson,
    VAEOutput,
    ZeroInflatedNegativeBinomial,
)
from .version import __version__

__all__ = [
    "VAE",
    "BackendInfo",
    "Bernoulli",
    "DiagonalGaussian",
    "DiagonalLaplace",
    "DiscretizedLogistic",
    "ELBOLoss",
    "ELBOTerms",
    "GaussianNLLLoss",
    "Latent",
    "LinearLikelihood",
    "NegativeBinomial",
    "Patch",
    "Poisson",
    "VAEOutput",
    "ZeroInflatedNegativeBinomial",
    "__version__",
    "backends",
    "distributions",
    "functional",
    "networks",
    "patch",
    "random",
    "typing",
    "use_backend",
]
