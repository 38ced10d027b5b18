"""The loss as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import functional
from .backend import checked_name
from .functional import ELBOTerms


class ELBOLoss(nn.Module):
    """The negative evidence lower bound of a VAE: NLL(x) + beta * KL(q || N(0, I)).

    A module over `fusedvae.functional.elbo_loss`, which has the formulas and takes the same operands.

    Args:
        beta: weight of the KL; a float or a 0-dim tensor. Assign ``loss.beta = ...`` to anneal it; a tensor changed
            in place anneals inside compiled and captured programs too.
        reduction: "batchmean" (default), "sum", or "none" (one value per sample).
        likelihood: that of x: a name that `elbo_loss` takes, "gaussian" by default.
        full: add the likelihood's constant, log(2 pi) / 2 per element of x for a Gaussian.
        return_terms: return `ELBOTerms` (loss, nll, kl) instead of the loss.
        backend: overrides the process's choice.

    Example:
        >>> criterion = fusedvae.ELBOLoss(beta=0.5)
        >>> loss = criterion(recon_x, x, mu, logvar)
        >>> loss.backward()

    Raises:
        ValueError, TypeError: for a reduction, beta, backend or operand that cannot be, naming it.
    """

    beta: float | Tensor

    def __init__(
        self,
        beta: float | Tensor = 1.0,
        reduction: str = "batchmean",
        *,
        likelihood: str = "gaussian",
        full: bool = False,
        return_terms: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        functional._checked_reductions(reduction)
        functional._checked_likelihood(likelihood)
        if backend is not None:
            checked_name(backend)
        self.beta = beta
        self.reduction = reduction
        self.likelihood = likelihood
        self.full = full
        self.return_terms = return_terms
        self.backend = backend

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "beta":
            return super().__setattr__(name, value)
        functional._check_number("beta", value)
        if "beta" in self._buffers or "beta" in self._parameters or "beta" in self.__dict__:
            del self.beta  # it may have been a tensor, and now be a number
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            # Follows the module to its device, but is a setting, not something learned.
            return self.register_buffer("beta", value, persistent=False)
        return super().__setattr__("beta", value)

    def forward(
        self,
        recon_x: Tensor,
        x: Tensor,
        mu: Tensor | None,
        logvar: Tensor | None = functional._FORGOTTEN,
        recon_logvar: Tensor | float | None = 0.0,
        *,
        prior_mu: Tensor | float | None = None,
        prior_logvar: Tensor | float | None = None,
        kl: Tensor | None = None,
        extra: Tensor | float | None = None,
        return_terms: bool | None = None,
    ) -> Tensor | ELBOTerms:
        """The loss of a batch; operands as in `fusedvae.functional.elbo_loss`."""
        return functional.elbo_loss(
            recon_x,
            x,
            mu,
            logvar,
            recon_logvar,
            likelihood=self.likelihood,
            prior_mu=prior_mu,
            prior_logvar=prior_logvar,
            kl=kl,
            beta=self.beta,
            full=self.full,
            extra=extra,
            reduction=self.reduction,
            return_terms=self.return_terms if return_terms is None else return_terms,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        beta = self.beta if isinstance(self.beta, (int, float)) else "tensor"
        likelihood = "" if self.likelihood == "gaussian" else f", likelihood={self.likelihood!r}"
        return f"beta={beta}, reduction={self.reduction!r}{likelihood}"
