"""The losses as modules."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Generic, Literal, overload

import torch
from torch import Tensor, nn

from . import functional
from .backend import checked_name
from .backend.reference import FORMULAS, LIKELIHOODS, Form
from .functional import ELBOTerms
from .functional.checks import (
    REQUIRED,
    REQUIRED_WITH_PRIOR_MU,
    check_broadcast,
    check_count,
    check_integer,
    check_number,
    checked_reductions,
    is_number,
)
from .functional.forms import as_written, checked_forms, checked_recon_form
from .functional.likelihoods import checked_likelihood
from .functional.linear import check_linear, run_linear_likelihood
from .typing import Backend, Bounds, LikelihoodName, LikelihoodScale, NormalScale, Reduction

if TYPE_CHECKING:
    from typing_extensions import TypeVar, Unpack

    from .typing import ELBOOperands, ELBOOptions, LinearELBOArguments

    _Returned = TypeVar("_Returned", bound=Tensor | ELBOTerms, default=Tensor)
else:
    from typing import TypeVar

    _Returned = TypeVar("_Returned")
"""What calls of an `ELBOLoss` return: its options say which."""


class ELBOLoss(nn.Module, Generic[_Returned]):
    """The negative evidence lower bound of a VAE: NLL(x) + beta * KL(q || p), p = N(0, I) unless given.

    A module over `fusedvae.functional.elbo_loss`, which has the formulas: what goes for every batch is said here, and
    the tensors of a batch when it is called.

    Args:
        beta: weight of the KL; a float or a 0-dim tensor. Assign ``loss.beta = ...`` to anneal it; a tensor changed
            in place anneals inside compiled and captured programs too.
        reduction: "batchmean" (default), "sum", "mean" (over elements), "weighted_mean", or "none" (one value per
            sample); or a pair, of the likelihood's and of the KL's.
        likelihood: that of x: "gaussian" (default; of variance 1 half the squared error), "mse" (all of it, what
            ``mse_loss(..., reduction="sum")`` sums up), "laplace", "l1", "bernoulli" (of logits), "bernoulli_probs",
            "poisson", "negative_binomial", "zero_inflated_negative_binomial", "discretized_logistic".
        scale, clamp, eps: the form of q's scale, the tensor beside mu: "logvar" (default), "logstd", "std", "var" or
            "softplus"; the bounds it is clamped to; what is added to what the form names.
        recon_scale, recon_clamp, recon_eps: the form of the likelihood's, if it has one; by default "logvar", of a
            Laplace or discretized logistic likelihood "logscale", of a negative binomial one "theta", of Poisson's,
            whose rate it is, "rate".
        prior_scale, prior_clamp, prior_eps: the form of the prior's.
        full: add the likelihood's constant, log(2 pi) / 2 per element of x for a Gaussian.
        grad_scale: what gradients are made times, while the value is what it is; a number or a 0-dim tensor, that may
            be assigned as ``beta`` may.
        return_terms: return `ELBOTerms` (loss, nll, kl) instead of the loss.
        inplace: write the gradient of recon_x into its memory, as `fusedvae.functional` says.
        packed_dim: the dimension that halves of packed tensors are along.
        backend: overrides the process's choice.

    Examples:
        >>> criterion = fusedvae.ELBOLoss(beta=0.5)
        >>> loss = criterion(recon_x, x, mu, logvar)
        >>> loss.backward()

    Raises:
        ValueError, TypeError: for an option or operand that cannot be, naming it.
    """

    beta: float | Tensor
    grad_scale: float | Tensor | None

    @overload
    def __init__(
        self: ELBOLoss[Tensor],
        beta: float | Tensor = ...,
        reduction: Reduction = ...,
        *,
        return_terms: Literal[False] = ...,
        **others: Unpack[ELBOOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: ELBOLoss[ELBOTerms],
        beta: float | Tensor = ...,
        reduction: Reduction = ...,
        *,
        return_terms: Literal[True],
        **others: Unpack[ELBOOptions],
    ) -> None: ...

    @overload
    def __init__(
        self: ELBOLoss[Tensor | ELBOTerms],
        beta: float | Tensor = ...,
        reduction: Reduction = ...,
        *,
        return_terms: bool,
        **others: Unpack[ELBOOptions],
    ) -> None: ...

    def __init__(
        self,
        beta: float | Tensor = 1.0,
        reduction: Reduction = "batchmean",
        *,
        likelihood: LikelihoodName = "gaussian",
        scale: NormalScale = "logvar",
        clamp: Bounds = None,
        eps: float = 0.0,
        recon_scale: LikelihoodScale | None = None,
        recon_clamp: Bounds = None,
        recon_eps: float = 0.0,
        prior_scale: NormalScale = "logvar",
        prior_clamp: Bounds = None,
        prior_eps: float | None = None,
        full: bool = False,
        grad_scale: float | Tensor | None = None,
        return_terms: bool = False,
        inplace: bool = False,
        packed_dim: int = 1,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        checked_reductions(reduction)
        checked_recon_options(likelihood, recon_scale, recon_clamp, recon_eps)
        checked_latent_options(scale, clamp, eps, prior_scale, prior_clamp, prior_eps)
        check_integer("packed_dim", packed_dim)
        if backend is not None:
            checked_name(backend)
        self.beta = beta
        self.reduction = reduction
        self.likelihood = likelihood
        self.scale, self.clamp, self.eps = scale, clamp, eps
        self.recon_scale, self.recon_clamp, self.recon_eps = recon_scale, recon_clamp, recon_eps
        self.prior_scale, self.prior_clamp, self.prior_eps = prior_scale, prior_clamp, prior_eps
        self.full = full
        self.grad_scale = grad_scale
        self.return_terms = return_terms
        self.inplace = inplace
        self.packed_dim = packed_dim
        self.backend = backend

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("beta", "grad_scale"):
            return super().__setattr__(name, value)
        if name == "beta" or value is not None:
            check_number(name, value)
        if isinstance(getattr(type(self), name, None), property):  # of torch.nn.utils.parametrize: it has a setter
            return object.__setattr__(self, name, value)
        if name in self._buffers or name in self._parameters or name in self.__dict__:
            delattr(self, name)  # it may have been a tensor, and now be a number
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            # Follows the module to its device, but is a setting, not something learned.
            return self.register_buffer(name, value, persistent=False)
        return super().__setattr__(name, value)

    def forward(
        self,
        recon_x: Tensor,
        x: Tensor,
        mu: Tensor | None,
        logvar: Tensor | None = REQUIRED,
        recon_logvar: Tensor | float | None = 0.0,
        *,
        prior_mu: Tensor | float | None = None,
        prior_logvar: Tensor | float | None = REQUIRED_WITH_PRIOR_MU,
        kl: Tensor | None = None,
        extra: Tensor | float | None = None,
        pos_weight: Tensor | float | None = None,
        zi_logits: Tensor | float | None = None,
        weight: Tensor | None = None,
        latent_weight: Tensor | None = None,
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
            scale=self.scale,
            clamp=self.clamp,
            eps=self.eps,
            recon_scale=self.recon_scale,
            recon_clamp=self.recon_clamp,
            recon_eps=self.recon_eps,
            prior_mu=prior_mu,
            prior_logvar=prior_logvar,
            prior_scale=self.prior_scale,
            prior_clamp=self.prior_clamp,
            prior_eps=self.prior_eps,
            kl=kl,
            beta=self.beta,
            full=self.full,
            extra=extra,
            pos_weight=pos_weight,
            zi_logits=zi_logits,
            weight=weight,
            latent_weight=latent_weight,
            reduction=self.reduction,
            grad_scale=self.grad_scale,
            return_terms=self.return_terms if return_terms is None else return_terms,
            inplace=self.inplace,
            packed_dim=self.packed_dim,
            backend=self.backend,
        )

    if TYPE_CHECKING:

        @overload
        def __call__(
            self,
            recon_x: Tensor,
            x: Tensor,
            mu: Tensor | None,
            logvar: Tensor | None = ...,
            recon_logvar: Tensor | float | None = ...,
            *,
            return_terms: None = ...,
            **operands: Unpack[ELBOOperands],
        ) -> _Returned: ...

        @overload
        def __call__(
            self,
            recon_x: Tensor,
            x: Tensor,
            mu: Tensor | None,
            logvar: Tensor | None = ...,
            recon_logvar: Tensor | float | None = ...,
            *,
            return_terms: Literal[False],
            **operands: Unpack[ELBOOperands],
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            recon_x: Tensor,
            x: Tensor,
            mu: Tensor | None,
            logvar: Tensor | None = ...,
            recon_logvar: Tensor | float | None = ...,
            *,
            return_terms: Literal[True],
            **operands: Unpack[ELBOOperands],
        ) -> ELBOTerms: ...

        @overload
        def __call__(
            self,
            recon_x: Tensor,
            x: Tensor,
            mu: Tensor | None,
            logvar: Tensor | None = ...,
            recon_logvar: Tensor | float | None = ...,
            *,
            return_terms: bool,
            **operands: Unpack[ELBOOperands],
        ) -> Tensor | ELBOTerms: ...

        def __call__(self, *operands: Any, **others: Any) -> Any: ...

    def extra_repr(self) -> str:
        """Beta, the reduction, and what else is not as it is without a word."""
        shown = [f"beta={shown_value(self.beta)}", f"reduction={self.reduction!r}"]
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            if isinstance(value, Tensor) or value != default:
                shown.append(f"{name}={shown_value(value)}")
        return ", ".join(shown)


class LinearLikelihood(nn.Linear):
    """The last linear layer of a decoder, and the likelihood of x under what it gives, in one.

    A `torch.nn.Linear` that, called with x, returns the loss and never stores its own output as a whole: see
    `functional.linear_elbo`. Called without x it is the layer, for samples and reconstructions; the state_dict is the
    layer's, and ``recon_logvar`` if that is a tensor or a parameter.

    Args:
        in_features: of the layer's input.
        out_features: of x.
        bias: whether the layer has one.
        likelihood: that of x, as `ELBOLoss` has it.
        recon_logvar: where the likelihood's log-variance comes from, or what else ``recon_scale`` says. None (default):
            the layer gives it, in out_features further outputs behind the means, if the likelihood has a scale. Or a
            number, a tensor (fixed) or an ``nn.Parameter`` (learned): of shape (out_features,) for one a column.
        recon_scale, recon_clamp, recon_eps: the form of that scale, as `ELBOLoss` has it.
        full: add the likelihood's constant.
        reduction: as `ELBOLoss` has it.
        block: how many columns are computed at a time, as `functional.linear_elbo` has it.
        backend: overrides the process's choice.
        device, dtype: of the layer's parameters.

    Examples:
        >>> decoder = nn.Sequential(nn.Linear(10, 128), nn.ReLU())
        >>> likelihood = fusedvae.LinearLikelihood(128, 20_000)
        >>> z, kl = fusedvae.functional.latent(mu, logvar)
        >>> loss = likelihood(decoder(z), x, kl=kl)

    Raises:
        ValueError, TypeError: for an option or operand that cannot be, naming it.
    """

    recon_logvar: Tensor | float | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        likelihood: LikelihoodName = "gaussian",
        recon_logvar: Tensor | float | None = None,
        recon_scale: LikelihoodScale | None = None,
        recon_clamp: Bounds = None,
        recon_eps: float = 0.0,
        full: bool = False,
        reduction: Reduction = "batchmean",
        block: int | None = None,
        backend: Backend | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checked_reductions(reduction)
        checked_recon_options(likelihood, recon_scale, recon_clamp, recon_eps)
        check_count("block", block)
        if backend is not None:
            checked_name(backend)
        has_scale = len(LIKELIHOODS[likelihood].pairs) > 0
        if recon_logvar is not None:
            if not has_scale:
                raise ValueError(f"recon_logvar: expected None, as the {likelihood} likelihood has no scale")
            if isinstance(recon_logvar, Tensor):
                check_broadcast("recon_logvar", recon_logvar, torch.Size((1, out_features)))
            elif not is_number(recon_logvar) or isinstance(recon_logvar, bool):
                raise TypeError(f"recon_logvar: expected None, a number or a tensor, got {type(recon_logvar).__name__}")
        rows = 2 * out_features if has_scale and recon_logvar is None else out_features
        super().__init__(in_features, rows, bias, device, dtype)
        self.out_features = out_features
        self.likelihood = likelihood
        self.recon_scale, self.recon_clamp, self.recon_eps = recon_scale, recon_clamp, recon_eps
        self.full, self.reduction, self.block, self.backend = full, reduction, block, backend
        if isinstance(recon_logvar, Tensor) and not isinstance(recon_logvar, nn.Parameter):
            self.register_buffer("recon_logvar", recon_logvar)
        else:
            self.recon_logvar = recon_logvar

    def forward(
        self,
        hidden: Tensor,
        x: Tensor | None = None,
        mu: Tensor | None = None,
        logvar: Tensor | None = REQUIRED,
        **arguments: Unpack[LinearELBOArguments],
    ) -> Any:
        """The loss of a batch: the negative bound, or without ``mu`` and ``kl`` the negative log-likelihood alone.

        Args:
            hidden: the layer's input, shape (batch, ..., in_features).
            x: data, shape (batch, ..., out_features); without it, what the layer gives is returned, a packed mean and
                scale along the last dimension if it gives both.
            mu, logvar, arguments: as `functional.linear_elbo` takes them; of the likelihood alone ``weight``,
                ``extra``, ``pos_weight``, ``zi_logits`` and ``grad_scale``, ``reduction``, ``full``, ``block`` and
                ``backend``: all else is a TypeError without a KL.
        """
        self._check_sizes(hidden, x)
        if x is None:
            return super().forward(hidden)
        options: Any = {"full": self.full, "block": self.block, "backend": self.backend, **arguments}
        layer = hidden, self.weight, self.bias, x
        scale = self.recon_logvar if self.recon_logvar is not None or LIKELIHOODS[self.likelihood].pairs else 0.0
        if mu is None and options.get("kl") is None and logvar is REQUIRED:
            for name in options:
                if name not in _OPTIONS:
                    raise TypeError(f"{type(self).__name__} got an unexpected keyword argument {name!r}")
                if name not in _OF_THE_LIKELIHOOD_ALONE:
                    raise TypeError(
                        f"{name}: expected with mu and logvar, or kl, only; without them, this is the likelihood alone"
                    )
            written = as_written(self.recon_scale, self.recon_clamp, self.recon_eps)
            options["reduction"] = checked_reductions(options.get("reduction", self.reduction))[0]
            check_linear(*layer, scale, self.likelihood)
            return run_linear_likelihood(*layer, scale, likelihood=self.likelihood, written=written, **options)
        return functional.linear_elbo(
            *layer,
            mu,
            logvar,
            scale,
            likelihood=self.likelihood,
            recon_scale=self.recon_scale,
            recon_clamp=self.recon_clamp,
            recon_eps=self.recon_eps,
            **{"reduction": self.reduction, **options},
        )

    def _check_sizes(self, hidden: Tensor, x: Tensor | None) -> None:
        for name, value, expected in (("hidden", hidden, "in_features"), ("x", x, "out_features")):
            size = getattr(self, expected)
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape[-1] != size:
                raise ValueError(f"{name}: expected {expected} {size}, got {value.shape[-1]}")

    def extra_repr(self) -> str:
        shown = [super().extra_repr(), f"likelihood={self.likelihood!r}"]
        if LIKELIHOODS[self.likelihood].pairs:
            shown.append(f"recon_logvar={shown_value(self.recon_logvar)}")
        return ", ".join(shown)


_OF_THE_MODULE = frozenset(("likelihood", "recon_logvar", "recon_scale", "recon_clamp", "recon_eps"))
_OPTIONS = frozenset(inspect.signature(functional.linear_elbo).parameters) - _OF_THE_MODULE
_OF_THE_LIKELIHOOD_ALONE = frozenset(
    ("full", "reduction", "weight", "extra", "pos_weight", "zi_logits", "grad_scale", "block", "backend")
)
"""What a call of a `LinearLikelihood` takes beside x where there is no KL."""


class GaussianNLLLoss(nn.GaussianNLLLoss):
    """`torch.nn.GaussianNLLLoss`, its signature and its results, in one pass: see `functional.gaussian_nll_loss`.

    Args:
        full: add the constant log(2 pi) / 2 an element.
        eps: lower bound of the variance.
        reduction: "mean" (over elements), "sum" or "none" (one value per element).
        check: look for negative variances, as PyTorch does; on a GPU the host waits for that. Without it, they count as
            eps.
        backend: overrides the process's choice.
    """

    def __init__(
        self,
        *,
        full: bool = False,
        eps: float = 1e-6,
        reduction: Literal["mean", "sum", "none"] = "mean",
        check: bool = True,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(full=full, eps=eps, reduction=reduction)
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
        self.check, self.backend = check, backend if backend is None else checked_name(backend)

    def forward(self, input: Tensor, target: Tensor, var: Tensor | float) -> Tensor:
        """The loss of a batch; operands as in `functional.gaussian_nll_loss`."""
        reduction: Any = self.reduction  # one of the three: see above
        return functional.gaussian_nll_loss(
            input, target, var, self.full, self.eps, reduction, check=self.check, backend=self.backend
        )

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, target: Tensor, var: Tensor | float) -> Tensor: ...


_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(ELBOLoss).parameters.items()
    if name not in ("beta", "reduction", "return_terms", "backend")
}
"""What a module shows of itself where it is something else."""


def shown_value(value: object) -> str:
    return "tensor" if isinstance(value, Tensor) else repr(value)


def checked_recon_options(likelihood: str, scale: str | None, clamp: Bounds, eps: float) -> Form | None:
    """The form of a likelihood's scale, of the options ``recon_scale``, ...; None of one that has no scale."""
    written = as_written(scale, clamp, eps)
    return checked_recon_form(checked_likelihood(likelihood), written)


def checked_latent_options(
    scale: str,
    clamp: Bounds,
    eps: float,
    prior_scale: str,
    prior_clamp: Bounds,
    prior_eps: float | None,
    prior_logvar: Tensor | float | None = None,
) -> tuple[Form, Form]:
    """The forms of q's scale and of the prior's, of the options of these names and what the latter is.

    Without a ``prior_eps``, that depends on it: a number has none.
    """
    posterior = as_written(scale, clamp, eps)
    prior = as_written(prior_scale, prior_clamp, prior_eps)  # type: ignore[arg-type]
    q, p = checked_forms(FORMULAS["kl_normal"], posterior, prior, prior_logvar)
    return q, p
