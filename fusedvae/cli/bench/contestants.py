"""Who competes: PyTorch as people write it, the same under torch.compile, and every backend of this package.

The idioms are those of widely copied code; each class and function names its source. A likelihood other than the
Gaussian competes as the registry's formula. In half precision all of these compute in float32, as losses do under
autocast, and give the sample back in the dtype of the moments; all of a case runs under autocast then, so that the
package's losses come in float32 too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from ... import functional
from ...backend import NAMES, unavailable
from ...backend.reference import LIKELIHOODS
from .cases import GAUSSIAN, Case, likelihoods

Total = Callable[[Tensor], Tensor]
"""Adds up elements: all of them, or those of each sample."""

Function = Callable[..., tuple[Tensor, ...]]
"""Takes `Operands.arguments` and gives the outputs of the operation (of a step: loss, z, mu, logvar, for a batch)."""


# --- the latent, as people write it -----------------------------------------------------------------------------


class Posterior(Protocol):
    def __init__(self, mu: Tensor, logvar: Tensor) -> None: ...

    def sample(self) -> Tensor:
        """Differentiable in mu and logvar."""

    def kl(self, total: Total) -> Tensor:
        """To the standard normal."""


class Handwritten:
    """pytorch/examples, vae/main.py."""

    def __init__(self, mu: Tensor, logvar: Tensor) -> None:
        self.mu, self.logvar = mu, logvar

    def sample(self) -> Tensor:
        std = torch.exp(0.5 * self.logvar)
        eps = torch.randn_like(std)
        return self.mu + eps * std

    def kl(self, total: Total) -> Tensor:
        return -0.5 * total(1 + self.logvar - self.mu.pow(2) - self.logvar.exp())


class Distributions:
    """torch.distributions, with the checks of arguments that it has by default."""

    def __init__(self, mu: Tensor, logvar: Tensor) -> None:
        self.q = Normal(mu, torch.exp(0.5 * logvar))

    def sample(self) -> Tensor:
        return self.q.rsample()

    def kl(self, total: Total) -> Tensor:
        prior = Normal(torch.zeros_like(self.q.mean), torch.ones_like(self.q.mean))
        return total(kl_divergence(self.q, prior))


class Diffusers:
    """huggingface/diffusers, DiagonalGaussianDistribution of models/autoencoders/vae.py (first in CompVis/
    latent-diffusion)."""

    def __init__(self, mu: Tensor, logvar: Tensor) -> None:
        self.mean = mu
        self.logvar = torch.clamp(logvar, -30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)

    def sample(self) -> Tensor:
        return self.mean + self.std * torch.randn(self.mean.shape, device=self.mean.device, dtype=self.mean.dtype)

    def kl(self, total: Total) -> Tensor:
        return 0.5 * total(torch.pow(self.mean, 2) + self.var - 1.0 - self.logvar)


# --- the likelihood, as people write it -------------------------------------------------------------------------


def handwritten_nll(recon_x: Tensor, x: Tensor, recon_logvar: Tensor) -> Tensor:
    """The formula as it stands."""
    return 0.5 * (recon_logvar + (x - recon_x).pow(2) * torch.exp(-recon_logvar)).sum()


def compvis_nll(recon_x: Tensor, x: Tensor, recon_logvar: Tensor) -> Tensor:
    """CompVis/latent-diffusion, ldm/modules/losses/contperceptual.py, with the squared error of a Gaussian."""
    rec_loss = (x - recon_x) ** 2
    return 0.5 * torch.sum(rec_loss / torch.exp(recon_logvar) + recon_logvar)


def torch_nll(recon_x: Tensor, x: Tensor, recon_logvar: Tensor) -> Tensor:
    """torch.nn.functional.gaussian_nll_loss; it takes variances of the input's shape."""
    var = torch.exp(recon_logvar).expand_as(recon_x)
    return nn.functional.gaussian_nll_loss(recon_x, x, var, reduction="sum")


def distributions_nll(recon_x: Tensor, x: Tensor, recon_logvar: Tensor) -> Tensor:
    """torch.distributions; includes the constant log(2 pi) / 2 per element."""
    return -Normal(recon_x, torch.exp(0.5 * recon_logvar)).log_prob(x).sum()


class Idiom(NamedTuple):
    """A way to write it."""

    posterior: type[Posterior]
    nll: Callable[[Tensor, Tensor, Tensor], Tensor]
    operations: tuple[str, ...]
    """Those in which it differs from the other idioms."""

    @property
    def constant(self) -> bool:
        """Whether its likelihood has the constant."""
        return self.nll is distributions_nll


_ALL = ("reparameterize", "kl", "nll", "latent", "elbo", "step")
IDIOMS = {
    "handwritten": Idiom(Handwritten, handwritten_nll, _ALL),
    "distributions": Idiom(Distributions, distributions_nll, _ALL),
    "diffusers": Idiom(Diffusers, compvis_nll, ("reparameterize", "kl", "nll", "latent", "elbo")),
    "torch-loss": Idiom(Handwritten, torch_nll, ("nll", "elbo", "step")),
}


def _in_working_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors)


def _per_sample(elements: Tensor) -> Tensor:
    return elements.flatten(1).sum(1)


REFERENCE = "reference"
"""Stands beside the names of idioms for the registry's formula."""


def usual_idiom(operation: str) -> str:
    """The name of the way to write an operation that stands for all of them where one has to."""
    return "handwritten" if likelihoods().get(operation, GAUSSIAN) == GAUSSIAN else REFERENCE


def idiomatic(idiom: Idiom, operation: str) -> Function:
    """The operation in eager PyTorch."""

    def latent(mu: Tensor, logvar: Tensor | None) -> Posterior:
        mean, log_variance = mu.chunk(2, dim=1) if logvar is None else (mu, logvar)
        return idiom.posterior(*_in_working_precision(mean, log_variance))

    def run(
        mu: Tensor, logvar: Tensor | None, recon_x: Tensor, x: Tensor, recon_logvar: Tensor, _: Tensor | None
    ) -> tuple[Tensor, ...]:
        if operation == "reparameterize":
            return (latent(mu, logvar).sample().to(mu.dtype),)
        if operation == "kl":
            return (latent(mu, logvar).kl(torch.sum) / mu.shape[0],)
        if operation == "latent":
            q = latent(mu, logvar)
            return q.sample().to(mu.dtype), q.kl(_per_sample)
        nll = idiom.nll(*_in_working_precision(recon_x, x, recon_logvar))
        if operation == "nll":
            return (nll / x.shape[0],)
        return ((nll + latent(mu, logvar).kl(torch.sum)) / x.shape[0],)

    return run


def registered(operation: str) -> Function:
    """A likelihood in eager PyTorch, by the registry's formula."""
    formula = LIKELIHOODS[likelihoods()[operation]]

    def run(mu: None, logvar: None, *inputs: Tensor) -> tuple[Tensor, ...]:
        elements = formula(_in_working_precision(*inputs[: len(formula.inputs)]), 0.0)
        return (elements.sum() / elements.shape[0],)

    return run


def fused(backend: str, operation: str) -> Function:
    """The operation by this package."""
    if usual_idiom(operation) == REFERENCE:
        return _fused_likelihood(backend, likelihoods()[operation])

    def run(
        mu: Tensor, logvar: Tensor | None, recon_x: Tensor, x: Tensor, recon_logvar: Tensor, _: Tensor | None
    ) -> tuple[Tensor, ...]:
        if operation == "reparameterize":
            return (functional.reparameterize(mu, logvar, backend=backend),)
        if operation == "kl":
            return (functional.kl_standard_normal(mu, logvar, backend=backend),)
        if operation == "latent":
            return functional.latent(mu, logvar, backend=backend)
        if operation == "nll":
            return (functional.gaussian_nll(recon_x, x, recon_logvar, backend=backend),)
        return (cast(Tensor, functional.elbo_loss(recon_x, x, mu, logvar, recon_logvar, backend=backend)),)

    return run


def _fused_likelihood(backend: str, likelihood: str) -> Function:
    """Any likelihood, as `functional` has it for all of them alike."""
    count = len(LIKELIHOODS[likelihood].inputs)

    def run(mu: None, logvar: None, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (functional._likelihood(likelihood, (*inputs[:count], None), False, "batchmean", 1, backend),)

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


def fused_step(backend: str, model: MLP) -> Function:
    """Forward pass and loss by this package."""

    def run(x: Tensor) -> tuple[Tensor, ...]:
        mu, logvar = model.encode(x)
        z, kl = functional.latent(mu, logvar, backend=backend)
        recon_x, recon_logvar = model.decode(z)
        loss = functional.elbo_loss(recon_x, x, None, None, recon_logvar, kl=kl, backend=backend)
        return cast(Tensor, loss), z, mu, logvar

    return run


# --- all of them ------------------------------------------------------------------------------------------------


def _no_step(model: MLP) -> Function:
    raise AssertionError("likelihoods but the Gaussian one have no training step here")


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
        if case.operation in idiom.operations
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


def _compiled(method: Method, kind: str) -> Method:
    def compile(function: Function) -> Function:
        return torch.compile(function, dynamic=False, mode=_COMPILE_MODES[kind])

    return method._replace(
        name=method.name.replace("eager", kind),
        family="compile",
        operation=lambda operation: compile(method.operation(operation)),
        step=lambda model: compile(method.step(model)),
    )
