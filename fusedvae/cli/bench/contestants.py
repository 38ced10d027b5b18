"""Who competes: PyTorch as people write it, the same under torch.compile, and every backend of this package.

The idioms are those of widely copied code; each class and function names its source. What the registry has and nobody
has written down here competes as the registry's formula. In half precision all of these compute in float32, as losses
do under autocast, and give the sample back in the dtype of the moments; all of a case runs under autocast then, so that
the package's losses come in float32 too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from ... import functional
from ...backend import NAMES, reference, unavailable
from ...functional.forms import as_written
from ...functional.likelihoods import run_likelihood
from ...typing import Backend
from .cases import CLAMP, GAUSSIAN, KL, SPECS, Case, Operation, likelihood_inputs

Total = Callable[[Tensor], Tensor]
"""Adds up elements: all of them, or those of each sample."""

Function = Callable[..., tuple[Tensor, ...]]
"""Takes `Operands.arguments` and gives the outputs of the operation (of a step: loss, z, mu, logvar, for a batch)."""


# --- the latent, as people write it -----------------------------------------------------------------------------


class Posterior(Protocol):
    def sample(self) -> Tensor:
        """Differentiable in mean and scale."""

    def kl(self, total: Total) -> Tensor:
        """To the standard normal."""


class PosteriorWithPrior(Posterior, Protocol):
    """One that has other divergences, too."""

    def kl_to(self, prior: Any, total: Total) -> Tensor:
        """To another of its kind."""

    def kl_at(self, z: Tensor, prior: Any, total: Total) -> Tensor:
        """log q(z) - log p(z), p the standard normal without a prior (None)."""


class Handwritten:
    """pytorch/examples, vae/main.py; the KL to a prior as in code for hierarchical VAEs, the density as in
    TensorFlow's tutorial "Convolutional Variational Autoencoder" (log_normal_pdf)."""

    def __init__(self, mu: Tensor, logvar: Tensor) -> None:
        self.mu, self.logvar = mu, logvar

    def sample(self) -> Tensor:
        std = torch.exp(0.5 * self.logvar)
        eps = torch.randn_like(std)
        return self.mu + eps * std

    def kl(self, total: Total) -> Tensor:
        return -0.5 * total(1 + self.logvar - self.mu.pow(2) - self.logvar.exp())

    def kl_to(self, prior: Handwritten, total: Total) -> Tensor:
        ratio = (self.logvar.exp() + (self.mu - prior.mu).pow(2)) * torch.exp(-prior.logvar)
        return 0.5 * total(prior.logvar - self.logvar + ratio - 1)

    def kl_at(self, z: Tensor, prior: Handwritten | None, total: Total) -> Tensor:
        log_p = -0.5 * z.pow(2) if prior is None else prior.log_prob(z)
        return total(self.log_prob(z) - log_p)

    def log_prob(self, z: Tensor) -> Tensor:
        """Without the constant, which a difference of two does not have."""
        return -0.5 * ((z - self.mu).pow(2) * torch.exp(-self.logvar) + self.logvar)


class OfLogStd:
    """A network that gives log sigma."""

    def __init__(self, mu: Tensor, logstd: Tensor) -> None:
        self.mu, self.logstd = mu, logstd

    def sample(self) -> Tensor:
        return self.mu + torch.exp(self.logstd) * torch.randn_like(self.mu)

    def kl(self, total: Total) -> Tensor:
        return -0.5 * total(1 + 2 * self.logstd - self.mu.pow(2) - (2 * self.logstd).exp())


class OfStd:
    """A network that gives sigma."""

    def __init__(self, mu: Tensor, std: Tensor) -> None:
        self.mu, self.std = mu, std

    def sample(self) -> Tensor:
        return self.mu + self.std * torch.randn_like(self.std)

    def kl(self, total: Total) -> Tensor:
        return 0.5 * total(self.mu.pow(2) + self.std.pow(2) - 1 - 2 * torch.log(self.std))


class OfVar:
    """A network that gives sigma^2."""

    def __init__(self, mu: Tensor, var: Tensor) -> None:
        self.mu, self.var = mu, var

    def sample(self) -> Tensor:
        return self.mu + self.var.sqrt() * torch.randn_like(self.var)

    def kl(self, total: Total) -> Tensor:
        return 0.5 * total(self.mu.pow(2) + self.var - 1 - torch.log(self.var))


class Distributions:
    """torch.distributions, with the checks of arguments that it has by default."""

    def __init__(self, mu: Tensor, std: Tensor) -> None:
        self.q = Normal(mu, std)

    def sample(self) -> Tensor:
        return self.q.rsample()

    def kl(self, total: Total) -> Tensor:
        return total(kl_divergence(self.q, self._standard()))

    def kl_to(self, prior: Distributions, total: Total) -> Tensor:
        return total(kl_divergence(self.q, prior.q))

    def kl_at(self, z: Tensor, prior: Distributions | None, total: Total) -> Tensor:
        p = self._standard() if prior is None else prior.q
        return total(self.q.log_prob(z) - p.log_prob(z))

    def _standard(self) -> Normal:
        return Normal(torch.zeros_like(self.q.mean), torch.ones_like(self.q.mean))


class Diffusers:
    """huggingface/diffusers, DiagonalGaussianDistribution of models/autoencoders/vae.py (first in CompVis/
    latent-diffusion)."""

    def __init__(self, mu: Tensor, logvar: Tensor) -> None:
        self.mean = mu
        self.logvar = torch.clamp(logvar, *CLAMP)
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)

    def sample(self) -> Tensor:
        return self.mean + self.std * torch.randn(self.mean.shape, device=self.mean.device, dtype=self.mean.dtype)

    def kl(self, total: Total) -> Tensor:
        return 0.5 * total(torch.pow(self.mean, 2) + self.var - 1.0 - self.logvar)


# --- the likelihood, as people write it -------------------------------------------------------------------------

Likelihood = Callable[..., Tensor]
"""Takes recon_x, x, the scale if it has one, and what torch.nn.functional calls reduction: "sum", "mean" or "none"."""


def _reduced(elements: Tensor, reduction: str) -> Tensor:
    return elements if reduction == "none" else elements.mean() if reduction == "mean" else elements.sum()


def handwritten_nll(recon_x: Tensor, x: Tensor, recon_logvar: Tensor, reduction: str = "sum") -> Tensor:
    """The formula as it stands."""
    return 0.5 * _reduced(recon_logvar + (x - recon_x).pow(2) * torch.exp(-recon_logvar), reduction)


def _nll_of_clamped(recon_x: Tensor, x: Tensor, recon_logvar: Tensor, reduction: str) -> Tensor:
    return handwritten_nll(recon_x, x, torch.clamp(recon_logvar, *CLAMP), reduction)


def _nll_of_log_std(recon_x: Tensor, x: Tensor, logstd: Tensor, reduction: str) -> Tensor:
    return _reduced(0.5 * ((x - recon_x) * torch.exp(-logstd)).pow(2) + logstd, reduction)


def _nll_of_std(recon_x: Tensor, x: Tensor, std: Tensor, reduction: str) -> Tensor:
    return _reduced(0.5 * ((x - recon_x) / std).pow(2) + torch.log(std), reduction)


def _nll_of_var(recon_x: Tensor, x: Tensor, var: Tensor, reduction: str) -> Tensor:
    return 0.5 * _reduced(torch.log(var) + (x - recon_x).pow(2) / var, reduction)


def _nll_of_softplus(recon_x: Tensor, x: Tensor, scale: Tensor, reduction: str) -> Tensor:
    return _nll_of_std(recon_x, x, nn.functional.softplus(scale), reduction)


def compvis_nll(recon_x: Tensor, x: Tensor, recon_logvar: Tensor, reduction: str) -> Tensor:
    """CompVis/latent-diffusion, ldm/modules/losses/contperceptual.py, with the squared error of a Gaussian."""
    rec_loss = (x - recon_x) ** 2
    return 0.5 * _reduced(rec_loss / torch.exp(recon_logvar) + recon_logvar, reduction)


def torch_nll(recon_x: Tensor, x: Tensor, recon_logvar: Tensor, reduction: str) -> Tensor:
    """torch.nn.functional.gaussian_nll_loss; it takes variances of the input's shape."""
    return _torch_nll_of_var(recon_x, x, torch.exp(recon_logvar), reduction)


def _torch_nll_of_var(recon_x: Tensor, x: Tensor, var: Tensor, reduction: str) -> Tensor:
    return nn.functional.gaussian_nll_loss(recon_x, x, var.expand_as(recon_x), reduction=reduction)


def distributions_nll(
    recon_x: Tensor, x: Tensor, scale: Tensor, reduction: str, std: Callable[[Tensor], Tensor]
) -> Tensor:
    """torch.distributions; includes the constant log(2 pi) / 2 per element."""
    return -_reduced(Normal(recon_x, std(scale)).log_prob(x), reduction)


def laplace_nll(recon_x: Tensor, x: Tensor, log_scale: Tensor, reduction: str) -> Tensor:
    """The absolute error over a learned scale, and its logarithm."""
    return _reduced((x - recon_x).abs() * torch.exp(-log_scale) + log_scale, reduction)


def _laplace_nll_of_scale(recon_x: Tensor, x: Tensor, scale: Tensor, reduction: str) -> Tensor:
    return _reduced((x - recon_x).abs() / scale + torch.log(scale), reduction)


def _laplace_nll_of_softplus(recon_x: Tensor, x: Tensor, scale: Tensor, reduction: str) -> Tensor:
    return _laplace_nll_of_scale(recon_x, x, nn.functional.softplus(scale), reduction)


def _bernoulli_nll(recon_x: Tensor, x: Tensor, reduction: str) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(recon_x, x, reduction=reduction)


def _bernoulli_nll_of_probabilities(recon_x: Tensor, x: Tensor, reduction: str) -> Tensor:
    """pytorch/examples, vae/main.py."""
    if not torch.is_autocast_enabled(recon_x.device.type):
        return nn.functional.binary_cross_entropy(recon_x, x, reduction=reduction)
    with torch.autocast(recon_x.device.type, enabled=False):  # under which it refuses to run
        return nn.functional.binary_cross_entropy(recon_x, x, reduction=reduction)


def _mse(recon_x: Tensor, x: Tensor, reduction: str) -> Tensor:
    return nn.functional.mse_loss(recon_x, x, reduction=reduction)


def _l1(recon_x: Tensor, x: Tensor, reduction: str) -> Tensor:
    return nn.functional.l1_loss(recon_x, x, reduction=reduction)


# --- the idioms -------------------------------------------------------------------------------------------------


class Idiom(NamedTuple):
    """A way to write it."""

    posteriors: Mapping[str | None, Callable[[Tensor, Tensor], Posterior]]
    """By the forms of the scale; none where it is a way to write likelihoods alone."""
    likelihoods: Mapping[tuple[str | None, str | None], Likelihood]
    """By the registry's names, and the forms of the scale."""
    priors: bool = False
    """Whether its posteriors are `PosteriorWithPrior`s."""
    steps: bool = True
    constant: bool = False
    """Whether its likelihood has the constant."""

    def has(self, operation: Operation) -> bool:
        """Whether it is a way of its own to write an operation."""
        if operation.kind == "step":
            return self.steps
        if operation.likelihood is not None:
            return (operation.likelihood, operation.form) in self.likelihoods
        return operation.form in self.posteriors and (self.priors or not (operation.prior or operation.at_sample))

    def posterior(self, mu: Tensor, scale: Tensor, form: str | None = "logvar") -> Posterior:
        return self.posteriors.get(form, Handwritten)(mu, scale)

    def nll(self, recon_x: Tensor, x: Tensor, recon_logvar: Tensor) -> Tensor:
        """That of a Gaussian and its log-variance, summed over everything."""
        return self.likelihoods[GAUSSIAN, "logvar"](recon_x, x, recon_logvar, "sum")


_STD: dict[str, Callable[[Tensor], Tensor]] = {
    "logvar": lambda logvar: torch.exp(0.5 * logvar),
    "clamp": lambda logvar: torch.exp(0.5 * torch.clamp(logvar, *CLAMP)),
    "logstd": torch.exp,
    "std": lambda std: std,
    "var": torch.sqrt,
    "softplus": nn.functional.softplus,
}
"""Sigma, by the form of the scale."""


def _distributions(mu: Tensor, scale: Tensor, std: Callable[[Tensor], Tensor]) -> Distributions:
    return Distributions(mu, std(scale))


IDIOMS = {
    "handwritten": Idiom(
        {
            "logvar": Handwritten,
            "clamp": lambda mu, logvar: Handwritten(mu, torch.clamp(logvar, *CLAMP)),
            "logstd": OfLogStd,
            "std": OfStd,
            "var": OfVar,
            "softplus": lambda mu, scale: OfStd(mu, nn.functional.softplus(scale)),
        },
        {
            (GAUSSIAN, "logvar"): handwritten_nll,
            (GAUSSIAN, "clamp"): _nll_of_clamped,
            (GAUSSIAN, "logstd"): _nll_of_log_std,
            (GAUSSIAN, "std"): _nll_of_std,
            (GAUSSIAN, "var"): _nll_of_var,
            (GAUSSIAN, "softplus"): _nll_of_softplus,
            ("laplace", "logscale"): laplace_nll,
            ("laplace", "scale"): _laplace_nll_of_scale,
            ("laplace", "softplus"): _laplace_nll_of_softplus,
            ("bernoulli", None): _bernoulli_nll,
            ("bernoulli_probs", None): _bernoulli_nll_of_probabilities,
            ("mse", None): _mse,
            ("l1", None): _l1,
        },
        priors=True,
    ),
    "distributions": Idiom(
        {form: partial(_distributions, std=std) for form, std in _STD.items()},
        {(GAUSSIAN, form): partial(distributions_nll, std=std) for form, std in _STD.items()},
        priors=True,
        constant=True,
    ),
    "diffusers": Idiom(
        {"logvar": Diffusers, "clamp": Diffusers},
        {(GAUSSIAN, "logvar"): compvis_nll},
        steps=False,
    ),
    "torch-loss": Idiom({}, {(GAUSSIAN, "logvar"): torch_nll, (GAUSSIAN, "var"): _torch_nll_of_var}),
}

REFERENCE = "reference"
"""Stands beside the names of idioms for the registry's formula."""


def usual_idiom(operation: str) -> str:
    """The name of the way to write an operation that stands for all of them where one has to."""
    return "handwritten" if IDIOMS["handwritten"].has(SPECS[operation]) else REFERENCE


def _in_working_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors)


def _per_sample(elements: Tensor) -> Tensor:
    return elements.flatten(1).sum(1)


def _moments(mu: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and scale, packed or not, in working precision."""
    mean, scale = _in_working_precision(*(mu.chunk(2, dim=1) if scale is None else (mu, scale)))
    return mean, scale


def _reduced_as(operation: Operation, likelihood: Callable[[str], Tensor], weight: Tensor | None, batch: int) -> Tensor:
    """The value of an operation, of a likelihood that takes what torch.nn.functional calls reduction."""
    reduction = operation.reduction
    if weight is not None:
        (weight,) = _in_working_precision(weight)
        elements = weight * likelihood("none")
        if reduction == "weighted_mean":
            return elements.sum() / weight.sum()
        likelihood = partial(_reduced, elements)
    if reduction == "none":
        return likelihood("none").flatten(1).sum(1)
    return likelihood("sum") / batch if reduction == "batchmean" else likelihood(reduction)


def idiomatic(idiom: Idiom, operation: str) -> Function:
    """The operation in eager PyTorch."""
    spec = SPECS[operation]

    def nll(recon_x: Tensor, x: Tensor, scale: Tensor | None, weight: Tensor | None) -> Tensor:
        inputs = _in_working_precision(recon_x, x) if scale is None else _in_working_precision(recon_x, x, scale)
        likelihood = idiom.likelihoods[spec.likelihood, spec.form]
        return _reduced_as(spec, lambda reduction: likelihood(*inputs, reduction), weight, x.shape[0])

    def run(
        mu: Tensor,
        logvar: Tensor | None,
        recon_x: Tensor,
        x: Tensor,
        recon_logvar: Tensor | None,
        _: Tensor | None,
        prior_mu: Tensor | None,
        prior_logvar: Tensor | None,
        weight: Tensor | None,
    ) -> tuple[Tensor, ...]:
        if spec.kind == "nll":
            return (nll(recon_x, x, recon_logvar, weight),)
        q = idiom.posterior(*_moments(mu, logvar), spec.form)
        if spec.kind == "reparameterize":
            return (q.sample().to(mu.dtype),)
        p = None if prior_mu is None else idiom.posterior(*_moments(prior_mu, prior_logvar), spec.form)
        if spec.kind == "kl":
            kl = q.kl(torch.sum) if p is None else cast(PosteriorWithPrior, q).kl_to(p, torch.sum)
            return (kl / mu.shape[0],)
        if spec.kind == "latent":
            z = q.sample()
            if spec.at_sample:
                kl = cast(PosteriorWithPrior, q).kl_at(z, p, _per_sample)
            else:
                kl = q.kl(_per_sample) if p is None else cast(PosteriorWithPrior, q).kl_to(p, _per_sample)
            return z.to(mu.dtype), kl
        assert recon_logvar is not None
        loss = idiom.nll(*_in_working_precision(recon_x, x, recon_logvar)) + q.kl(torch.sum)
        return (loss / x.shape[0],)

    return run


def registered(operation: str) -> Function:
    """The operation in eager PyTorch, by the registry's formula."""
    spec = SPECS[operation]
    if spec.likelihood is not None:
        return _registered_likelihood(spec, reference.LIKELIHOODS[spec.likelihood])
    (form,) = spec.forms
    divergence = reference.FORMULAS["kl_normal"] if spec.prior else KL

    def run(mu: Tensor, logvar: Tensor | None, *others: Tensor | None) -> tuple[Tensor, ...]:
        inputs = list(_moments(mu, logvar))
        prior_mu, prior_logvar = others[4:6]
        if prior_mu is not None:
            inputs += _moments(prior_mu, prior_logvar)
        ready = divergence.prepared(inputs, [form] * len(divergence.pairs))
        if spec.kind == "kl":
            return (divergence.elements(*ready).sum() / mu.shape[0],)
        noise = torch.randn_like(inputs[0])
        z = reference.sample(ready[0], ready[1], noise)
        if spec.kind == "reparameterize":
            return (z.to(mu.dtype),)
        elements = divergence.elements(*ready)
        if spec.at_sample and divergence.at_sample is not None:
            elements = divergence.at_sample(z, noise, *ready[1:])
        return z.to(mu.dtype), _per_sample(elements)

    return run


def _registered_likelihood(operation: Operation, formula: reference.Formula) -> Function:
    def run(mu: None, logvar: None, *others: Tensor | None) -> tuple[Tensor, ...]:
        recon_x, x, scale, extra = (None if t is None else _in_working_precision(t)[0] for t in others[:4])
        assert recon_x is not None
        assert x is not None
        elements = formula(likelihood_inputs(formula, recon_x, x, scale, extra), operation.forms)
        return (_reduced_as(operation, partial(_reduced, elements), others[-1], x.shape[0]),)

    return run


def fused(backend: str, operation: str) -> Function:
    """The operation by this package."""
    spec = SPECS[operation]
    if spec.likelihood not in (None, GAUSSIAN):
        return _fused_likelihood(backend, spec)
    options: dict[str, Any] = {"backend": backend}  # only what people would write
    if spec.scale != "logvar":
        options["scale"] = spec.scale
    if spec.clamp is not None:
        options["clamp"] = spec.clamp
    if spec.at_sample:
        options["estimator"] = "sample"
    if spec.reduction != "batchmean":
        options["reduction"] = spec.reduction

    def run(
        mu: Tensor,
        logvar: Tensor | None,
        recon_x: Tensor,
        x: Tensor,
        recon_logvar: Tensor,
        _: Tensor | None,
        prior_mu: Tensor | None,
        prior_logvar: Tensor | None,
        weight: Tensor | None,
    ) -> tuple[Tensor, ...]:
        if spec.kind == "reparameterize":
            return (functional.reparameterize(mu, logvar, **options),)
        if spec.kind == "kl":
            if prior_mu is not None:
                return (functional.kl_normal(mu, logvar, prior_mu, prior_logvar, **options),)
            return (functional.kl_standard_normal(mu, logvar, **options),)
        if spec.kind == "latent":
            return functional.latent(mu, logvar, prior_mu, prior_logvar, **options)
        if spec.kind == "nll":
            if weight is not None:
                return (functional.gaussian_nll(recon_x, x, recon_logvar, weight=weight, **options),)
            return (functional.gaussian_nll(recon_x, x, recon_logvar, **options),)
        return (cast(Tensor, functional.elbo_loss(recon_x, x, mu, logvar, recon_logvar, **options)),)

    return run


def _fused_likelihood(backend: str, operation: Operation) -> Function:
    """Any likelihood, as `functional` has it for all of them alike."""
    assert operation.likelihood is not None
    likelihood, formula = operation.likelihood, reference.LIKELIHOODS[operation.likelihood]
    written = as_written(operation.scale, operation.clamp, 0.0)
    reduction = operation.reduction

    def run(
        mu: None,
        logvar: None,
        recon_x: Tensor,
        x: Tensor,
        scale: Tensor | None,
        extra: Tensor | None,
        prior_mu: None,
        prior_logvar: None,
        weight: Tensor | None,
    ) -> tuple[Tensor, ...]:
        inputs = likelihood_inputs(formula, recon_x, x, scale, extra)
        value = run_likelihood(likelihood, inputs, written, False, weight, reduction, None, 1, backend)
        return (value,)

    return run


# --- a training step --------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """The networks of pytorch/examples' VAE, with a second output for the log-variance."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 400)
        self.fc21 = nn.Linear(400, 20)
        self.fc22 = nn.Linear(400, 20)
        self.fc3 = nn.Linear(20, 400)
        self.fc41 = nn.Linear(400, 784)
        self.fc42 = nn.Linear(400, 784)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.fc1(x))
        return self.fc21(h), self.fc22(h)

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.fc3(z))
        return torch.sigmoid(self.fc41(h)), self.fc42(h)


def idiomatic_step(idiom: Idiom, model: MLP) -> Function:
    """Forward pass and loss in eager PyTorch."""

    def run(x: Tensor) -> tuple[Tensor, ...]:
        mu, logvar = model.encode(x)
        q = idiom.posterior(mu, logvar)
        z = q.sample()
        recon_x, recon_logvar = model.decode(z)
        loss = (idiom.nll(recon_x, x, recon_logvar) + q.kl(torch.sum)) / x.shape[0]
        return loss, z, mu, logvar

    return run


def fused_step(backend: Backend, model: MLP) -> Function:
    """Forward pass and loss by this package."""

    def run(x: Tensor) -> tuple[Tensor, ...]:
        mu, logvar = model.encode(x)
        z, kl = functional.latent(mu, logvar, backend=backend)
        recon_x, recon_logvar = model.decode(z)
        loss = functional.elbo_loss(recon_x, x, None, None, recon_logvar, kl=kl, backend=backend)
        return loss, z, mu, logvar

    return run


# --- all of them ------------------------------------------------------------------------------------------------


def _no_step(model: MLP) -> Function:
    raise AssertionError("what the registry's formula stands for has no training step")


class Method(NamedTuple):
    """One way to do an operation."""

    name: str
    family: str
    """"eager", "compile", "fused" (kernels of this package) or "reference" (its formulas in plain PyTorch)."""
    operation: Callable[[str], Function]
    """By the operation's name."""
    step: Callable[[MLP], Function]
    constant: bool = False
    """Whether its likelihood has the constant log(2 pi) / 2 per element."""
    captured: bool = False
    """Replayed as a CUDA graph."""


_GRAPH_DIRECTIONS = ("both", "evaluate")
"""A CUDA graph's results are gone at its next replay: several forward passes before their backward passes cannot be."""
_COMPILE_MODES = {"compile": None, "compile-max-autotune": "max-autotune", "compile-reduce-overhead": "reduce-overhead"}


def methods(case: Case, device: torch.device) -> list[Method]:
    """Everyone who competes in a case: eager PyTorch first, this package last."""
    eager = [
        Method(f"eager/{name}", "eager", partial(idiomatic, idiom), partial(idiomatic_step, idiom), idiom.constant)
        for name, idiom in IDIOMS.items()
        if idiom.has(case.spec)
    ]
    if usual_idiom(case.operation) == REFERENCE:
        eager.append(Method(f"eager/{REFERENCE}", "eager", registered, _no_step))
    compiled = [_compiled(method, mode) for mode in _COMPILE_MODES if _applies(mode, case, device) for method in eager]
    ours = [
        Method(
            f"fusedvae/{name}",
            "reference" if name == "reference" else "fused",
            partial(fused, name),
            partial(fused_step, name),
        )
        for name in NAMES
        if unavailable(name, device.type) is None
    ]
    graphs = []
    if device.type == "cuda" and case.operation != "step" and case.direction in _GRAPH_DIRECTIONS:
        graphs = [method._replace(name=f"{method.name}+graph", captured=True) for method in (*eager, *ours)]
    return [*eager, *compiled, *ours, *graphs]


def _applies(mode: str, case: Case, device: torch.device) -> bool:
    """Whether a way to compile makes a difference. Autotuning chooses between kernels of matrix products, on GPUs
    between those of anything, and runs CUDA graphs there."""
    if device.type == "cuda":
        return mode == "compile" or case.direction in _GRAPH_DIRECTIONS
    return mode == "compile" or (mode == "compile-max-autotune" and case.operation == "step")


def compile_for_processor(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """torch.compile for given sizes.

    PyTorch's cache of compiled graphs does not know for which vectors it has written one: what ATEN_CPU_CAPABILITY=avx2
    has left there, compiled for longer ones, reads and writes past the ends of its tensors. So the tag says it.
    """
    config = getattr(torch.compiler, "config", None)
    if hasattr(config, "cache_key_tag"):
        config.cache_key_tag = torch.backends.cpu.get_cpu_capability()  # type: ignore[union-attr]
    return torch.compile(function, dynamic=False, mode=mode)


def _compiled(method: Method, kind: str) -> Method:
    def compile(function: Function) -> Function:
        return compile_for_processor(function, _COMPILE_MODES[kind])

    return method._replace(
        name=method.name.replace("eager", kind),
        family="compile",
        operation=lambda operation: compile(method.operation(operation)),
        step=lambda model: compile(method.step(model)),
    )
