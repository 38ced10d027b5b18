"""What a training step differentiates, as one module: what synchronises gradients, or compiles, sees all of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..functional import ELBOTerms
from ..typing import Bound
from ..vae import VAE


class Objective(nn.Module):
    """The bound of a batch, or of this process's rows of it.

    Args:
        model: what is trained.
        samples, bound: as `fusedvae.VAE.loss` takes them.
    """

    def __init__(self, model: VAE, samples: int, bound: Bound) -> None:
        super().__init__()
        self.model, self.samples, self.bound = model, samples, bound

    def forward(
        self,
        x: Tensor,
        condition: Tensor | None,
        beta: float | Tensor,
        grad_scale: Tensor | None,
        offset: int,
        noise: Tensor | None,
    ) -> ELBOTerms:
        """(loss, NLL, KL), constants included, summed over the rows of ``x``; of the importance-weighted bound, the
        NLL is NaN: it is no sum of terms. Gradients are made ``grad_scale`` times as large."""
        out = self.model(x, condition, samples=self.samples, bound=self.bound, offset=offset, noise=noise)
        if self.bound == "iwae":
            loss = out.loss(x, reduction="sum", full=True, grad_scale=grad_scale)
            return ELBOTerms(loss, torch.full_like(loss, math.nan), out.kl.detach().mean(0).sum().to(loss.dtype))
        return out.loss(x, beta=beta, reduction="sum", full=True, grad_scale=grad_scale, return_terms=True)
