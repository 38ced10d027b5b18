"""The VAE module: values against the formulas, every form of encoder and decoder, and its errors."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from processes import results_of_processes
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

import fusedvae
from fusedvae import (
    VAE,
    Bernoulli,
    DiagonalLaplace,
    DiscretizedLogistic,
    ELBOLoss,
    NegativeBinomial,
    Poisson,
    ZeroInflatedNegativeBinomial,
    functional,
    networks,
)
from fusedvae.backend.reference import LIKELIHOODS
from fusedvae.vae import DiagonalGaussian, VAEOutput, families

BATCH, CHANNELS, LATENT = 5, 3, 2
SHAPE = (CHANNELS, 4, 4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads slow down models as small as these, much so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Apply(nn.Module):
    """A module without parameters, made of a function."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: object) -> object:
        return self.function(*arguments)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(BATCH, *SHAPE, generator=torch.Generator().manual_seed(1))


def packed_encoder() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), 2 * LATENT))


def packed_decoder() -> nn.Module:
    return nn.Sequential(nn.Linear(LATENT, 2 * math.prod(SHAPE)), nn.Unflatten(1, (2 * CHANNELS, *SHAPE[1:])))


def mean_decoder() -> nn.Module:
    return nn.Sequential(nn.Linear(LATENT, math.prod(SHAPE)), nn.Unflatten(1, SHAPE))


class AsPair(nn.Module):
    """The two halves of what a module gives, as a pair."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.module(x).chunk(2, dim=1)


def nll(x: Tensor, mean: Tensor, logvar: Tensor | float) -> Tensor:
    logvar = torch.as_tensor(logvar).expand_as(mean)
    return ((logvar + (mean - x) ** 2 * torch.exp(-logvar)) / 2).flatten(1).sum(1)


def kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return ((mu**2 + torch.expm1(logvar) - logvar) / 2).flatten(1).sum(1)


def drawn_from_seed(seed: int, *shape: int) -> Tensor:
    """The package's noise, of a seed from a generator of PyTorch's with a seed of its own."""
    seeds = torch.randint(-(2**63), 2**63 - 1, (), generator=torch.Generator().manual_seed(seed))
    return fusedvae.random.normal(shape, seeds)


def make_vae(**options: object) -> VAE:
    torch.manual_seed(0)
    return VAE(packed_encoder(), packed_decoder(), LATENT, **options)


# --- values -----------------------------------------------------------------------------------------------------


def test_forward_shows_every_step(x: Tensor) -> None:
    vae = make_vae()
    torch.manual_seed(3)
    out = vae(x)
    assert isinstance(out, VAEOutput)
    mu, logvar = vae.encoder(x).chunk(2, dim=1)
    torch.testing.assert_close(out.mu, mu)
    torch.testing.assert_close(out.logvar, logvar)
    torch.testing.assert_close(out.kl, kl(mu, logvar))
    mean, recon_logvar = vae.decoder(out.z).chunk(2, dim=1)
    torch.testing.assert_close(out.recon_x, mean)
    torch.testing.assert_close(out.recon_logvar, recon_logvar)
    torch.manual_seed(3)
    torch.testing.assert_close(out.z, functional.latent(mu, logvar).z)


@pytest.mark.parametrize("beta", [1.0, 0.25, torch.tensor(0.5)])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
def test_loss_is_the_bound_of_what_forward_computes(x: Tensor, beta: float | Tensor, reduction: str) -> None:
    vae = make_vae()
    reduce = {"batchmean": Tensor.mean, "sum": Tensor.sum, "none": Tensor.clone}[reduction]
    torch.manual_seed(3)
    out = vae(x)
    expected_nll, expected_kl = nll(x, out.recon_x, out.recon_logvar), kl(out.mu, out.logvar)
    torch.manual_seed(3)
    terms = vae.loss(x, beta=beta, reduction=reduction, return_terms=True)
    torch.testing.assert_close(terms.nll, reduce(expected_nll))
    torch.testing.assert_close(terms.kl, reduce(expected_kl))
    torch.testing.assert_close(terms.loss, reduce(expected_nll + beta * expected_kl))
    torch.manual_seed(3)
    torch.testing.assert_close(vae.loss(x, beta=beta, reduction=reduction), terms.loss)


def test_full_adds_the_constant_of_the_density(x: Tensor) -> None:
    vae = make_vae()
    losses = []
    for full in (False, True):
        torch.manual_seed(3)
        losses.append(vae.loss(x, full=full))
    constant = math.prod(SHAPE) * math.log(2 * math.pi) / 2
    torch.testing.assert_close(losses[1] - losses[0], torch.tensor(constant), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_formulas(x: Tensor) -> None:
    vae = make_vae().double()
    x = x.double()
    torch.manual_seed(3)
    vae.loss(x, beta=0.7).backward()
    fused = {name: parameter.grad for name, parameter in vae.named_parameters()}
    vae.zero_grad()
    mu, logvar = vae.encoder(x).chunk(2, dim=1)
    torch.manual_seed(3)
    noise = functional.reparameterize(torch.zeros_like(mu), torch.zeros_like(mu))
    mean, recon_logvar = vae.decoder(mu + torch.exp(logvar / 2) * noise).chunk(2, dim=1)
    (nll(x, mean, recon_logvar) + 0.7 * kl(mu, logvar)).mean().backward()
    for name, parameter in vae.named_parameters():
        torch.testing.assert_close(fused[name], parameter.grad, msg=name)


def test_the_elbo_bounds_the_evidence_of_a_linear_model() -> None:
    # x = w z + noise has the evidence N(0, w² + s²); with the exact posterior the bound is the evidence.
    w, variance = 2.0, 0.5
    posterior_variance = 1 / (1 + w * w / variance)

    def posterior(x: Tensor) -> tuple[Tensor, Tensor]:
        return x * w / variance * posterior_variance, torch.full_like(x, math.log(posterior_variance))

    vae = VAE(Apply(posterior), Apply(lambda z: w * z), 1, recon_logvar=math.log(variance))
    x = torch.tensor([[0.3], [-1.2], [2.5]], dtype=torch.float64)
    many = x.repeat(200_000, 1)
    torch.manual_seed(0)
    bound = -vae.loss(many, full=True, reduction="none").reshape(-1, 3).mean(0)
    evidence = torch.distributions.Normal(0, math.sqrt(w * w + variance)).log_prob(x)[:, 0]
    torch.testing.assert_close(bound, evidence.double(), rtol=0, atol=0.01)


# --- forms of encoder and decoder -------------------------------------------------------------------------------


def test_packed_and_pair_give_the_same(x: Tensor) -> None:
    vae = make_vae()
    pairs = VAE(AsPair(vae.encoder), AsPair(vae.decoder), LATENT)
    losses, gradients = [], []
    for model in (vae, pairs):
        torch.manual_seed(3)
        model.zero_grad()
        loss = model.loss(x)
        loss.backward()
        losses.append(loss)
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("recon_logvar", "trainable", "keys"),
    [
        (-1.5, False, []),
        (0, False, []),
        ("learned", True, ["recon_logvar"]),
        (torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1), False, ["recon_logvar"]),
        (nn.Parameter(torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1)), True, ["recon_logvar"]),
    ],
)
def test_a_mean_only_decoder_takes_its_log_variance_from_the_vae(
    x: Tensor, recon_logvar: object, trainable: bool, keys: list[str]
) -> None:
    vae = VAE(packed_encoder(), mean_decoder(), LATENT, recon_logvar=recon_logvar)
    assert [key for key in vae.state_dict() if "recon" in key] == keys
    assert ("recon_logvar" in dict(vae.named_parameters())) == trainable
    value = 0.0 if recon_logvar == "learned" else recon_logvar
    torch.manual_seed(3)
    out = vae(x)
    torch.manual_seed(3)
    terms = vae.loss(x, return_terms=True)
    torch.testing.assert_close(terms.nll, nll(x, out.recon_x, value).mean())
    torch.testing.assert_close(out.recon_logvar.expand_as(x), torch.as_tensor(value).float().expand_as(x))
    terms.loss.backward()
    if trainable:
        expected = (1 - (out.recon_x - x) ** 2 * torch.exp(-torch.as_tensor(value))) / 2 / BATCH
        kept = vae.recon_logvar.shape
        expected = expected.sum().view(kept) if kept in ((), (1,)) else expected.sum((0, 2, 3)).view(kept)
        torch.testing.assert_close(vae.recon_logvar.grad, expected.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_loss_of_an_output_is_the_modules_in_every_dtype(x: Tensor, dtype: torch.dtype) -> None:
    vae = VAE(packed_encoder(), mean_decoder(), LATENT, recon_logvar=-5.3).to(dtype)
    x, noise = x.to(dtype), torch.randn(BATCH, LATENT).to(dtype)
    torch.testing.assert_close(vae(x, noise=noise).loss(x), vae.loss(x, noise=noise))


def test_a_pair_may_hold_a_log_variance_that_broadcasts(x: Tensor) -> None:
    class PerChannel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = mean_decoder()

        def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
            return self.mean(z), z[:, :1, None, None].expand(-1, CHANNELS, 1, 1)

    vae = VAE(packed_encoder(), PerChannel(), LATENT)
    torch.manual_seed(3)
    out = vae(x)
    torch.manual_seed(3)
    torch.testing.assert_close(vae.loss(x), (nll(x, out.recon_x, out.recon_logvar) + out.kl).mean())
    assert vae.generate(7, sample=True).shape == (7, *SHAPE)


@pytest.mark.parametrize("latent_dim", [(4, 2, 2), [4, 2, 2], (4, None, None), (None, 2, 2)])
def test_latents_may_be_spatial(latent_dim: tuple) -> None:
    encoder = nn.Conv2d(CHANNELS, 8, 2, stride=2)
    decoder = nn.ConvTranspose2d(4, 2 * CHANNELS, 2, stride=2)
    vae = VAE(encoder, decoder, latent_dim)
    x = torch.rand(BATCH, *SHAPE)
    out = vae(x)
    assert out.z.shape == out.mu.shape == (BATCH, 4, 2, 2)
    torch.testing.assert_close(out.kl, kl(out.mu, out.logvar))
    vae.loss(x).backward()
    assert vae.embed(x).shape == (BATCH, 16)
    assert vae.reconstruct(x).shape == x.shape
    if None in latent_dim:
        with pytest.raises(ValueError, match=r"latent_dim: generate needs every size, got \(.*\*.*\); call decode"):
            vae.generate(3)
    else:
        assert vae.generate(3).shape == (3, *SHAPE)


def test_a_size_left_open_takes_images_of_several_sizes() -> None:
    vae = VAE(nn.Conv2d(3, 8, 2, stride=2), nn.ConvTranspose2d(4, 6, 2, stride=2), (4, None, None))
    for size in (4, 10):
        assert vae(torch.rand(2, 3, size, size)).z.shape == (2, 4, size // 2, size // 2)


# --- likelihoods ------------------------------------------------------------------------------------------------------


class ZeroInflated(NamedTuple):
    """Counts of which some dropped out."""

    counts: torch.distributions.NegativeBinomial
    zi_logits: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        kept = self.counts.log_prob(x) + nn.functional.logsigmoid(-self.zi_logits)
        return torch.where(x == 0, torch.logaddexp(kept, nn.functional.logsigmoid(self.zi_logits)), kept)


class Binned(NamedTuple):
    """A logistic distribution in bins."""

    mean: Tensor
    scale: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        upper, lower = (torch.sigmoid((x + half - self.mean) / self.scale) for half in (1 / 255, -1 / 255))
        return torch.log(torch.where(x > 0.999, 1.0, upper) - torch.where(x < -0.999, 0.0, lower))


def negative_binomial(mu: Tensor, theta: Tensor) -> torch.distributions.NegativeBinomial:
    return torch.distributions.NegativeBinomial(theta, probs=mu / (mu + theta), validate_args=False)


DENSITIES: dict[str, Callable[..., Any]] = {
    # name: what p(x|z) is, of the first and, if it has a scale, the second of what the decoder gives
    "gaussian": lambda m, s: torch.distributions.Normal(m, torch.exp(0.5 * s)),
    "laplace": lambda m, s: torch.distributions.Laplace(m, torch.exp(s)),
    "bernoulli": lambda m, s: torch.distributions.Bernoulli(logits=m),
    "bernoulli_probs": lambda m, s: torch.distributions.Bernoulli(probs=m),
    "mse": lambda m, s: torch.distributions.Normal(m, math.sqrt(0.5)),
    "l1": lambda m, s: torch.distributions.Laplace(m, 1.0),
    "poisson": lambda m, s: torch.distributions.Poisson(m + 1e-8),
    "negative_binomial": negative_binomial,
    "zero_inflated_negative_binomial": lambda m, s, zi: ZeroInflated(negative_binomial(m, s), zi),
    "discretized_logistic": lambda m, s: Binned(m, torch.exp(s)),
}
DISTRIBUTIONS = {
    "gaussian": DiagonalGaussian,
    "laplace": DiagonalLaplace,
    "bernoulli": Bernoulli,
    "bernoulli_probs": Bernoulli,
    "mse": DiagonalGaussian,
    "l1": DiagonalLaplace,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
    "zero_inflated_negative_binomial": ZeroInflatedNegativeBinomial,
    "discretized_logistic": DiscretizedLogistic,
}
every_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)

SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    # form: the standard deviation (or a Laplace distribution's b) of what the form is of; the eps added is 0.01
    "logvar": lambda s: (torch.exp(s) + 0.01).sqrt(),
    "logstd": lambda s: torch.exp(s) + 0.01,
    "std": lambda s: s + 0.01,
    "var": lambda s: (s + 0.01).sqrt(),
    "softplus": lambda s: nn.functional.softplus(s) + 0.01,
    "logscale": lambda s: torch.exp(s) + 0.01,
    "scale": lambda s: s + 0.01,
}


class AsParameters(nn.Module):
    """What a module gives, as the parameters of a likelihood: its means, packed with its scales, and logits."""

    def __init__(self, module: nn.Module, likelihood: str) -> None:
        super().__init__()
        self.module, self.likelihood = module, likelihood

    def forward(self, z: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        given = self.module(z)
        if self.likelihood == "bernoulli_probs":
            return torch.sigmoid(given)
        if self.likelihood == "discretized_logistic":
            return 0.3 * given  # in whose tails PyTorch's logistic function ends
        if self.likelihood in ("poisson", "negative_binomial", "zero_inflated_negative_binomial"):
            given = torch.exp(0.3 * given)
        if self.likelihood == "zero_inflated_negative_binomial":
            return given, torch.log(given.chunk(2, 1)[0]) - 0.5
        return given


def vae_of(likelihood: str, **options: object) -> VAE:
    """A VAE of this likelihood, in float64; where there is a scale, the decoder gives it, packed."""
    torch.manual_seed(0)
    decoder = packed_decoder() if LIKELIHOODS[likelihood].pairs else mean_decoder()
    return VAE(packed_encoder(), AsParameters(decoder, likelihood), LATENT, likelihood=likelihood, **options).double()


def density(vae: VAE, z: Tensor) -> Any:
    """p(x|z) by PyTorch's distributions."""
    decoded = vae.decoder(z)
    packed, *zi_logits = decoded if isinstance(decoded, tuple) else (decoded,)
    mean, scale = packed.chunk(2, 1) if LIKELIHOODS[vae.likelihood].pairs else (packed, None)
    return DENSITIES[vae.likelihood](mean, scale, *zi_logits)


def log_density(vae: VAE, z: Tensor, x: Tensor) -> Tensor:
    """log p(x|z), per sample."""
    return density(vae, z).log_prob(x).flatten(1).sum(1)


def with_gradients(value: Tensor, vae: VAE) -> list[Tensor]:
    vae.zero_grad()
    value.sum().backward()
    return [value.detach(), *[parameter.grad.clone() for parameter in vae.parameters()]]


@pytest.fixture
def bits(x: Tensor) -> Tensor:
    """Data that every likelihood takes."""
    return x.round().double()


def test_every_likelihood_has_a_distribution_and_a_density_to_compare_with() -> None:
    assert set(families.DISTRIBUTIONS) == set(DENSITIES) == set(LIKELIHOODS)


@every_likelihood
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("bound", ["elbo", "iwae"])
def test_bounds_of_every_likelihood_are_those_of_its_density(
    bits: Tensor, likelihood: str, samples: int, bound: str
) -> None:
    vae = vae_of(likelihood)
    torch.manual_seed(3)
    found = with_gradients(vae.loss(bits, samples=samples, bound=bound, full=True), vae)
    torch.manual_seed(3)
    by_output = with_gradients(vae(bits, samples=samples, bound=bound).loss(bits, full=True), vae)

    mu, logvar = vae.encoder(bits).chunk(2, 1)
    torch.manual_seed(3)
    shape = mu.shape if samples == 1 and bound == "elbo" else (samples, *mu.shape)
    noise = functional.reparameterize(
        torch.zeros_like(mu), torch.zeros_like(mu), samples=None if len(shape) == 2 else samples
    )
    z = (mu + torch.exp(logvar / 2) * noise).view(samples, BATCH, LATENT)
    log_p = torch.stack([log_density(vae, one, bits) for one in z])
    q = torch.distributions.Normal(mu, torch.exp(logvar / 2))
    prior = torch.distributions.Normal(0.0, 1.0)
    if bound == "elbo":
        values = log_p.mean(0) - kl(mu, logvar)
    else:
        log_weights = log_p + (prior.log_prob(z) - q.log_prob(z)).sum(-1)
        values = torch.logsumexp(log_weights, 0) - math.log(samples)
    expected = with_gradients(-values.mean(), vae)
    for f, b, e in zip(found, by_output, expected, strict=True):
        # Noise is of float32, and PyTorch adds no eps to means of counts.
        torch.testing.assert_close(f, e, rtol=1e-6, atol=2e-8 if "binomial" in likelihood else 1e-9)
        torch.testing.assert_close(b, f, rtol=1e-12, atol=1e-12)


@every_likelihood
def test_a_decoded_latent_is_a_distribution_of_its_likelihood(likelihood: str) -> None:
    vae = vae_of(likelihood)
    z = torch.randn(2, LATENT, dtype=torch.float64)
    p, expected = vae.decode(z), density(vae, z)
    assert type(p) is DISTRIBUTIONS[likelihood]
    if not isinstance(p, (DiagonalGaussian, DiagonalLaplace, Bernoulli)):
        return  # those have a test of their own
    torch.testing.assert_close(p.mu, expected.mean.expand(p.mu.shape))
    if isinstance(p, DiagonalGaussian):
        torch.testing.assert_close(torch.exp(p.logvar).expand_as(p.mu), expected.variance)
    elif isinstance(p, DiagonalLaplace):
        torch.testing.assert_close(torch.exp(p.log_scale).expand_as(p.mu), expected.scale)
    else:
        torch.testing.assert_close(p.logits, expected.logits)
    with torch.no_grad():
        drawn = vae.decode(z.repeat(4000, 1)).sample(generator=torch.Generator().manual_seed(0))
    drawn = drawn.view(4000, *p.mu.shape)
    error = drawn.mean(0) - expected.mean
    assert drawn.dtype == torch.float64
    assert (error.abs() < 5 * (expected.variance / 4000).sqrt()).all()
    torch.testing.assert_close(drawn.var(0), expected.variance, rtol=0.2, atol=0.01)
    images = vae.generate(3, generator=torch.Generator().manual_seed(1))
    again = drawn_from_seed(1, 3, LATENT).double()
    torch.testing.assert_close(images, vae.decode(again).mu)


@pytest.mark.parametrize(
    "p",
    [
        Poisson(torch.tensor([0.3, 8.0])),
        NegativeBinomial(torch.tensor([0.3, 8.0]), torch.tensor(2.5)),
        ZeroInflatedNegativeBinomial(torch.tensor([0.3, 8.0]), torch.tensor([0.5, 40.0]), torch.tensor(-0.5)),
        DiscretizedLogistic(torch.tensor([-0.9, 0.1]), torch.tensor(-2.0)),
    ],
    ids=lambda p: type(p).__name__,
)
def test_samples_of_counts_and_of_bins_have_the_masses_of_the_likelihoods(p: Any) -> None:
    generator, count = torch.Generator(), 40_000
    many = type(p)(p.mu.expand(count, 2), *p[1:])
    drawn = many.sample(generator=generator.manual_seed(1))
    assert torch.equal(drawn, many.sample(generator=generator.manual_seed(1)))
    values = torch.arange(256.0) / 127.5 - 1 if isinstance(p, DiscretizedLogistic) else torch.arange(200.0)
    x, mean = values[:, None].expand(-1, 2).contiguous(), p.mu.expand(len(values), 2).contiguous()
    of = {
        Poisson: lambda: functional.poisson_nll(mean, x, full=True, reduction="none", dim=()),
        NegativeBinomial: lambda: functional.negative_binomial_nll(mean, x, p[1], reduction="none", dim=()),
        ZeroInflatedNegativeBinomial: lambda: functional.zero_inflated_negative_binomial_nll(
            mean, x, p[1], p[2], reduction="none", dim=()
        ),
        DiscretizedLogistic: lambda: functional.discretized_logistic_nll(mean, x, p[1], reduction="none", dim=()),
    }
    mass = torch.exp(-of[type(p)]())
    torch.testing.assert_close(mass.sum(0), torch.ones(2), rtol=1e-5, atol=1e-5)
    for k in range(2):
        found = torch.stack([(drawn[:, k] - value).abs() < 1e-3 for value in values]).double().mean(1)
        assert ((found - mass[:, k]).abs() < 5 * (mass[:, k] / count).sqrt() + 1e-4).all()
    if isinstance(p, ZeroInflatedNegativeBinomial):
        torch.testing.assert_close(p.mean, (mass * x).sum(0), rtol=1e-4, atol=1e-4)
    for dtype in (torch.bfloat16, torch.float16):
        coarse = type(p)(*[t.to(dtype) for t in many]).sample(generator=generator.manual_seed(1))
        assert coarse.dtype == dtype
        torch.testing.assert_close(coarse.float().mean(0), drawn.mean(0), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_means_and_thetas_of_counts_are_what_the_decoder_gives(dtype: torch.dtype) -> None:
    numbers = torch.tensor([[1000.0, 300.0, 37.0, 0.25]], dtype=dtype)
    encoder, z = nn.Linear(4, 2 * LATENT), torch.zeros(1, LATENT)
    vae = VAE(encoder, Apply(lambda z: numbers), LATENT, likelihood="poisson")
    assert torch.equal(vae.decode(z).mu, numbers)
    logs = VAE(encoder, Apply(lambda z: numbers.log()), LATENT, likelihood="poisson", recon_scale="lograte")
    assert torch.equal(logs.decode(z).mu, numbers.log().float().exp().to(dtype))
    options = {"likelihood": "negative_binomial", "recon_clamp": (0.5, None)}
    vae = VAE(encoder, Apply(lambda z: numbers), LATENT, recon_logvar=numbers[0], **options)
    assert torch.equal(vae.decode(z).mu, numbers)
    assert torch.equal(vae.decode(z).theta, numbers[0].clamp(min=0.5))
    assert torch.equal(
        VAE(encoder, Apply(lambda z: numbers), LATENT, recon_logvar=0.1, **options).decode(z).theta,
        torch.tensor(0.5, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logarithms_of_scales_are_rounded_once(dtype: torch.dtype) -> None:
    spread = torch.linspace(-3, 3, 41, dtype=dtype)[None]
    decoder = Apply(lambda z: (spread, spread))
    vae = VAE(nn.Linear(4, 2 * LATENT), decoder, LATENT, recon_scale="softplus", recon_eps=0.1)
    exact = 2 * torch.log(nn.functional.softplus(spread.double()) + 0.1)
    error = (vae.decode(torch.zeros(1, LATENT)).logvar - exact).abs()
    assert (error <= 0.501 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


def test_dropouts_come_last_from_a_decoder() -> None:
    """theta is one a gene, that the module has: what scvi-tools calls px_r."""
    theta = nn.Parameter(torch.rand(12) + 0.5)
    heads = nn.ModuleList([nn.Linear(LATENT, 12) for _ in range(2)])

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = heads

        def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
            return torch.exp(self.heads[0](z)), self.heads[1](z)

    name = "zero_inflated_negative_binomial"
    vae = VAE(nn.Linear(12, 2 * LATENT), Decoder(), LATENT, likelihood=name, recon_logvar=theta)
    x = torch.randint(0, 4, (BATCH, 12)).float()
    out = vae(x)
    mu, zi_logits = vae.decoder(out.z)
    expected = functional.zero_inflated_negative_binomial_nll(mu, x, theta, zi_logits) + out.kl.mean()
    torch.testing.assert_close(out.loss(x), expected)
    torch.testing.assert_close(vae.decode(out.z).theta, theta)
    mu, zi_logits = vae.decoder(vae.embed(x))
    torch.testing.assert_close(vae.reconstruct(x), mu * torch.sigmoid(-zi_logits))
    vae.loss(x, samples=3).backward()
    assert theta.grad is not None
    assert theta.grad.abs().min() > 0
    with pytest.raises(TypeError, match=r"decoder: expected \(mu, theta, zi_logits\) .* got Tensor"):
        VAE(nn.Linear(12, 2 * LATENT), nn.Linear(LATENT, 12), LATENT, likelihood=name).loss(x)


def test_samples_of_bernoulli_distributions_are_decided_by_the_generator() -> None:
    logits = torch.linspace(-2.0, 2.0, 5).expand(20_000, 5)
    p, generator = Bernoulli(logits.sigmoid(), logits), torch.Generator()
    drawn = p.sample(generator=generator.manual_seed(1))
    assert torch.equal(drawn, p.sample(generator=generator.manual_seed(1)))
    torch.testing.assert_close(drawn.mean(0), p.mu[0], rtol=0, atol=0.02)


def test_samples_of_laplace_distributions_are_differentiable_and_decided_by_the_generator() -> None:
    mu, log_scale = torch.zeros(3, 4, requires_grad=True), torch.full((4,), 0.5, requires_grad=True)
    p, generator = DiagonalLaplace(mu, log_scale), torch.Generator()
    drawn = p.sample(generator=generator.manual_seed(1))
    assert torch.equal(drawn, p.sample(generator=generator.manual_seed(1)))
    drawn.sum().backward()
    torch.testing.assert_close(mu.grad, torch.ones(3, 4))
    torch.testing.assert_close(log_scale.grad, drawn.detach().sum(0))


@pytest.mark.parametrize("scale", ["logvar", "logstd", "std", "var", "softplus"])
@pytest.mark.parametrize("prior_scale", ["logvar", "softplus"])
def test_forms_of_the_latents_scales(bits: Tensor, scale: str, prior_scale: str) -> None:
    prior = (nn.Parameter(torch.tensor([0.5, -0.5])), nn.Parameter(torch.tensor([0.3, 0.7])))
    of_prior: dict[str, Any] = {"prior_scale": prior_scale, "prior_clamp": (0.4, None), "prior_eps": 0.01}
    vae = vae_of("mse", scale=scale, clamp=(0.1, 0.4), eps=0.01, prior=prior, **of_prior)
    mu, s = vae.encoder(bits).chunk(2, 1)
    sigma = SCALES[scale](s.clamp(0.1, 0.4))
    q = torch.distributions.Normal(mu, sigma)
    p = torch.distributions.Normal(vae.prior_mu, SCALES[prior_scale](vae.prior_logvar.clamp(min=0.4)))
    torch.manual_seed(3)
    out = vae(bits)
    torch.testing.assert_close(out.kl, torch.distributions.kl_divergence(q, p).sum(1))
    for found in (vae.encode(bits), out):
        torch.testing.assert_close(found.mu, mu)
        torch.testing.assert_close(found.logvar, 2 * sigma.log())
    torch.manual_seed(3)
    noise = functional.reparameterize(torch.zeros_like(mu), torch.zeros_like(mu))
    torch.testing.assert_close(out.z, mu + sigma * noise)
    torch.manual_seed(3)
    terms = vae.loss(bits, return_terms=True)
    torch.testing.assert_close(terms.kl, out.kl.mean())
    found = torch.autograd.grad(terms.kl, prior)
    expected = torch.autograd.grad(torch.distributions.kl_divergence(q, p).sum(1).mean(), prior)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)
    drawn = p.loc + p.scale * drawn_from_seed(5, BATCH, LATENT)
    generated = vae.generate(BATCH, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(generated, vae.decode(drawn).mu)


def test_a_bound_or_a_floor_alone_is_in_what_encode_gives(bits: Tensor) -> None:
    for options, form in (
        ({"eps": 0.5}, lambda s: torch.log(torch.exp(s) + 0.5)),
        ({"clamp": (-0.1, 0.1)}, lambda s: s.clamp(-0.1, 0.1)),
    ):
        vae = vae_of("mse", **options)
        torch.testing.assert_close(vae.encode(bits).logvar, form(vae.encoder(bits).chunk(2, 1)[1]))


@pytest.mark.parametrize(
    ("likelihood", "scale"),
    [("gaussian", s) for s in ("logvar", "logstd", "std", "var", "softplus")]
    + [("laplace", s) for s in ("logscale", "scale", "softplus")],
)
@pytest.mark.parametrize("source", ["decoder", "learned", 0.3])
def test_forms_of_the_likelihoods_scale(bits: Tensor, likelihood: str, scale: str, source: str | float) -> None:
    options: dict = {"likelihood": likelihood, "recon_scale": scale, "recon_clamp": (0.1, 0.4), "recon_eps": 0.01}
    if source == "decoder":
        vae = VAE(packed_encoder(), packed_decoder(), LATENT, **options).double()
    else:
        vae = VAE(packed_encoder(), mean_decoder(), LATENT, recon_logvar=source, **options).double()
    if source == "learned":
        assert vae.recon_logvar.tolist() == [1.0 if scale in ("std", "var", "scale") else 0.0]
        with torch.no_grad():
            vae.recon_logvar.fill_(0.2)
    torch.manual_seed(3)
    out = vae(bits)
    decoded = vae.decoder(out.z)
    mean, s = decoded.chunk(2, 1) if source == "decoder" else (decoded, torch.as_tensor(vae.recon_logvar).double())
    sigma = SCALES[scale](s.clamp(0.1, 0.4))
    density = (torch.distributions.Normal if likelihood == "gaussian" else torch.distributions.Laplace)(mean, sigma)
    expected = -density.log_prob(bits).flatten(1).sum(1)
    torch.manual_seed(3)
    terms = vae.loss(bits, return_terms=True, full=True, reduction="none")
    torch.testing.assert_close(terms.nll, expected)
    torch.testing.assert_close(out.loss(bits, return_terms=True, full=True, reduction="none").nll, expected)
    p = vae.decode(out.z)
    torch.testing.assert_close(p.mu, mean)
    torch.testing.assert_close(
        p[1].expand_as(mean), (sigma.log() * (2 if likelihood == "gaussian" else 1)).expand_as(mean)
    )
    torch.manual_seed(3)
    found = vae.loss(bits, samples=2, return_terms=True, full=True, reduction="none").nll
    torch.manual_seed(3)
    several = [vae.decode(z) for z in vae(bits, samples=2).z]
    expected_of_several = [
        -type(density)(one.mu, torch.exp(one[1] / (2 if likelihood == "gaussian" else 1))).log_prob(bits)
        for one in several
    ]
    torch.testing.assert_close(found, torch.stack(expected_of_several).mean(0).flatten(1).sum(1))
    if source == "learned":
        (found,) = torch.autograd.grad(terms.nll.sum(), vae.recon_logvar)
        torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), vae.recon_logvar)[0])


# --- priors and conditions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prior", "keys"),
    [
        ((nn.Parameter(torch.tensor([1.0, -1.0])), nn.Parameter(torch.tensor([0.5]))), ["prior_mu", "prior_logvar"]),
        ((torch.tensor([[1.0, -1.0]]), 0.5), ["prior_mu"]),
        ((0.5, -0.25), []),
    ],
)
def test_a_prior_may_be_a_pair(x: Tensor, prior: tuple, keys: list[str]) -> None:
    vae = make_vae(prior=prior)
    assert [key for key in vae.state_dict() if "prior" in key] == keys
    assert ("prior_mu" in dict(vae.named_parameters())) == isinstance(prior[0], nn.Parameter)
    mean, logvar = (torch.as_tensor(t).expand(1, LATENT) for t in prior)
    out = vae(x)
    q = torch.distributions.Normal(out.mu, torch.exp(out.logvar / 2))
    p = torch.distributions.Normal(mean, torch.exp(logvar / 2))
    torch.testing.assert_close(out.kl, torch.distributions.kl_divergence(q, p).sum(1))
    noise = drawn_from_seed(5, 6, LATENT)
    images = vae.generate(6, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(images, vae.decode(mean + torch.exp(logvar / 2) * noise).mu)


class Conditional(nn.Module):
    """A linear layer over its argument and a condition."""

    def __init__(self, sizes: int, condition: int, out: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(sizes + condition, math.prod(out)), nn.Unflatten(1, out))
        self.batches: list[int] = []

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        self.batches.append(len(x))
        return self.layers(torch.cat([x.flatten(1), condition], 1))


def conditional_vae() -> VAE:
    """With a prior of the condition, in float64."""
    torch.manual_seed(0)
    encoder, decoder = Conditional(math.prod(SHAPE), 3, (2 * LATENT,)), Conditional(LATENT, 3, (2 * CHANNELS, 4, 4))
    return VAE(encoder, decoder, LATENT, prior=nn.Linear(3, 2 * LATENT)).double()


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("bound", ["elbo", "iwae"])
def test_a_condition_goes_to_every_module(bits: Tensor, samples: int, bound: str) -> None:
    vae, condition = conditional_vae(), torch.randn(BATCH, 3, dtype=torch.float64)
    torch.manual_seed(3)
    found = vae.loss(bits, condition, samples=samples, bound=bound, reduction="none")
    torch.manual_seed(3)
    out = vae(bits, condition, samples=samples, bound=bound)
    torch.testing.assert_close(out.loss(bits, reduction="none"), found)
    assert vae.decoder.batches == [samples * BATCH] * 2
    z = out.z.view(samples, BATCH, LATENT)
    q = torch.distributions.Normal(out.mu, torch.exp(out.logvar / 2))
    mean, logvar = vae.prior(condition).chunk(2, 1)
    p = torch.distributions.Normal(mean, torch.exp(logvar / 2))
    torch.testing.assert_close(torch.cat([out.mu, out.logvar], 1), vae.encoder(bits, condition))
    nlls = torch.stack([nll(bits, *vae.decoder(one, condition).chunk(2, 1)) for one in z])
    if bound == "elbo":
        expected = nlls.mean(0) + torch.distributions.kl_divergence(q, p).sum(1)
    else:
        log_weights = (p.log_prob(z) - q.log_prob(z)).sum(-1) - nlls
        expected = math.log(samples) - torch.logsumexp(log_weights, 0)
    torch.testing.assert_close(found, expected)


def test_a_condition_goes_with_every_method(bits: Tensor) -> None:
    vae, condition = conditional_vae(), torch.randn(BATCH, 3, dtype=torch.float64)
    mu, logvar = vae.encoder(bits, condition).chunk(2, 1)
    torch.testing.assert_close(vae.encode(bits, condition).logvar, logvar)
    torch.testing.assert_close(vae.embed(bits, condition), mu)
    torch.testing.assert_close(vae.reconstruct(bits, condition), vae.decoder(mu, condition)[:, :CHANNELS])
    torch.testing.assert_close(vae.decode(mu, condition).logvar, vae.decoder(mu, condition)[:, CHANNELS:])
    noise = drawn_from_seed(5, BATCH, LATENT).double()
    mean, logvar = vae.prior(condition).chunk(2, 1)
    images = vae.generate(BATCH, condition, generator=torch.Generator().manual_seed(5))
    z = mean + torch.exp(logvar / 2) * noise
    torch.testing.assert_close(images, vae.decoder(z, condition)[:, :CHANNELS])
    with pytest.raises(ValueError, match=r"prior: expected moments that broadcast to \(3, 2\), got shape \(5, 2\)"):
        vae.generate(3, condition)


def test_conditions_may_be_of_several_tensors(x: Tensor) -> None:
    seen: list = []

    def decode(z: Tensor, condition: dict) -> Tensor:
        seen.append(condition)
        return (z.sum(1) + condition["label"]).view(-1, 1, 1, 1).expand(-1, *SHAPE)

    encode = Apply(lambda x, condition: (x[:, :LATENT, 0, 0], x[:, :LATENT, 0, 1]))
    vae = VAE(encode, Apply(decode), LATENT, recon_logvar=0.0)
    condition = {"label": torch.arange(BATCH), "pair": (torch.ones(1, 7), torch.tensor(2.0)), "name": "digits"}
    vae.loss(x, condition, samples=3)
    assert torch.equal(seen[0]["label"], torch.arange(BATCH).repeat(3))
    assert seen[0]["pair"][0].shape == (1, 7)  # of no batch
    assert seen[0]["name"] == "digits"


class Labels(dict):
    """A dict with more than its items, as the outputs of diffusers and transformers are."""

    size = 0

    @property
    def label(self) -> Tensor:
        return self["label"]


def test_a_condition_stays_what_it_is_where_there_are_several_samples(x: Tensor) -> None:
    seen: list[Labels] = []

    def decode(z: Tensor, condition: Labels) -> Tensor:
        seen.append(condition)
        return (z.sum(1) + condition.label).view(-1, 1, 1, 1).expand(-1, *SHAPE)

    encode = Apply(lambda x, condition: (x[:, :LATENT, 0, 0], x[:, :LATENT, 0, 1]))
    condition = Labels(label=torch.arange(BATCH))
    condition.size = 7
    VAE(encode, Apply(decode), LATENT, recon_logvar=0.0).loss(x, condition, samples=2)
    assert torch.equal(seen[0].label, torch.arange(BATCH).repeat(2))
    assert seen[0].size == 7
    assert torch.equal(condition.label, torch.arange(BATCH))


def test_a_prior_of_no_condition_may_be_a_module_and_know_the_sizes_left_open() -> None:
    prior = Apply(lambda *condition: (torch.full((2, 4, 3, 3), 0.5), torch.full((1,), -60.0)))
    vae = VAE(nn.Conv2d(3, 8, 2, stride=2), nn.ConvTranspose2d(4, 6, 2, stride=2), (4, None, None), prior=prior)
    images = vae.generate(2)
    torch.testing.assert_close(images, vae.decode(torch.full((2, 4, 3, 3), 0.5)).mu)
    x = torch.rand(2, 3, 6, 6)
    out = vae(x)
    q = torch.distributions.Normal(out.mu, torch.exp(out.logvar / 2))
    p = torch.distributions.Normal(0.5, math.exp(-30))
    torch.testing.assert_close(out.kl, torch.distributions.kl_divergence(q, p).flatten(1).sum(1))


# --- options of the loss ----------------------------------------------------------------------------------------------

EVERY_REDUCTION = ["batchmean", "sum", "mean", "weighted_mean", "none", ("mean", "batchmean"), ["sum", "mean"]]


@pytest.mark.parametrize("reduction", EVERY_REDUCTION, ids=str)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions_are_those_of_all_elements(
    bits: Tensor, reduction: str | tuple, samples: int, weighted: bool
) -> None:
    vae = vae_of("gaussian")
    weight = (bits[:, :1] + 0.5) if weighted else None
    torch.manual_seed(3)
    found = vae.loss(
        bits, samples=samples, reduction=reduction, beta=0.7, weight=weight, return_terms=True, grad_scale=4.0
    )
    torch.manual_seed(3)
    out = vae(bits, samples=samples)
    by_output = out.loss(bits, reduction=reduction, beta=0.7, weight=weight, return_terms=True, grad_scale=4.0)

    w = torch.ones_like(bits) if weight is None else weight.expand_as(bits)
    mean, logvar = out.recon_x.view(samples, *bits.shape), out.recon_logvar.view(samples, *bits.shape)
    nlls = (w * (logvar + (mean - bits) ** 2 * torch.exp(-logvar)) / 2).mean(0)
    kls = (out.mu**2 + torch.expm1(out.logvar) - out.logvar) / 2
    reduce = {
        "batchmean": lambda t, w: t.sum() / BATCH,
        "sum": lambda t, w: t.sum(),
        "mean": lambda t, w: t.mean(),
        "weighted_mean": lambda t, w: t.sum() / w.sum(),
        "none": lambda t, w: t.flatten(1).sum(1),
    }
    of_nll, of_kl = (reduction, reduction) if isinstance(reduction, str) else reduction
    expected_nll, expected_kl = reduce[of_nll](nlls, w), reduce[of_kl](kls, torch.ones_like(kls))
    expected = (expected_nll + 0.7 * expected_kl, expected_nll, expected_kl)
    for f, b, e in zip(found, by_output, expected, strict=True):
        torch.testing.assert_close(f, e)
        torch.testing.assert_close(b, e)
        weights = vae.encoder[1].weight
        gradients = [torch.autograd.grad(t.sum(), weights, retain_graph=True)[0] for t in (b, e)]
        torch.testing.assert_close(gradients[0], 4 * gradients[1])  # grad_scale
    torch.testing.assert_close(with_gradients(found.loss, vae), with_gradients(by_output.loss, vae))


@pytest.mark.parametrize("bound", ["elbo", "iwae"])
@pytest.mark.parametrize("samples", [1, 3])
def test_where_the_weight_is_0_x_may_be_anything(bits: Tensor, bound: str, samples: int) -> None:
    vae = vae_of("gaussian")
    weight = torch.rand(BATCH, *SHAPE) > 0.3
    broken = torch.where(weight, bits, torch.nan)
    results = []
    for x in (bits, broken):
        torch.manual_seed(3)
        results.append(with_gradients(vae(bits, samples=samples, bound=bound).loss(x, weight=weight), vae))
    for f, e in zip(*results, strict=True):
        assert torch.equal(f, e)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "none"])
@pytest.mark.parametrize("factor", [8.0, torch.tensor(8.0)])
def test_the_gradient_of_an_importance_weighted_bound_may_be_scaled(
    bits: Tensor, reduction: str, factor: float | Tensor
) -> None:
    vae, results = vae_of("bernoulli"), []
    for scale in (None, factor):
        torch.manual_seed(3)
        loss = vae.loss(bits, samples=3, bound="iwae", reduction=reduction, grad_scale=scale)
        results.append(with_gradients(loss, vae))
    values = {"batchmean": Tensor.mean, "sum": Tensor.sum, "none": Tensor.clone}[reduction]
    torch.manual_seed(3)
    each = vae.loss(bits, samples=3, bound="iwae", reduction="none")
    torch.testing.assert_close(results[0][0], values(each).detach())
    (value, *gradients), (plain, *plain_gradients) = results[1], results[0]
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(gradients, [8 * gradient for gradient in plain_gradients])


@pytest.mark.parametrize("recon_logvar", [None, 0.3, "learned", torch.full((3, 1, 1), 0.2)])
@pytest.mark.parametrize("pair", [False, True])
def test_several_samples_take_every_form_of_a_decoder(x: Tensor, recon_logvar: object, pair: bool) -> None:
    torch.manual_seed(0)
    decoder = packed_decoder() if recon_logvar is None else mean_decoder()
    if pair and recon_logvar is None:
        decoder = AsPair(decoder)
    vae = VAE(packed_encoder(), decoder, LATENT, recon_logvar=recon_logvar)
    torch.manual_seed(3)
    found = vae.loss(x, samples=4, reduction="none", full=True)
    torch.manual_seed(3)
    out = vae(x, samples=4)
    expected = torch.stack([nll(x, *vae.decode(z)) for z in out.z]).mean(0) + out.kl
    constant = math.prod(SHAPE) * math.log(2 * math.pi) / 2
    torch.testing.assert_close(found, expected + constant)
    torch.testing.assert_close(out.loss(x, reduction="none", full=True), found)


def test_a_second_of_a_pair_that_broadcasts_goes_with_several_samples(x: Tensor) -> None:
    for spread in (lambda z: z[:, :1, None, None], lambda z: z[:1, :1, None, None] * 0 + 0.5, lambda z: z[0, 0] * 0):
        decoder = Apply(lambda z, spread=spread: (z[:, :1, None, None].expand(-1, *SHAPE), spread(z)))
        vae = VAE(packed_encoder(), decoder, LATENT)
        torch.manual_seed(3)
        found = vae.loss(x, samples=2, reduction="none")
        torch.manual_seed(3)
        out = vae(x, samples=2)
        expected = torch.stack([nll(x, *vae.decode(z)) for z in out.z]).mean(0) + out.kl
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bound", ["elbo", "iwae"])
def test_a_compiled_step_of_several_samples_agrees(bits: Tensor, bound: str) -> None:
    vae = vae_of("laplace", scale="softplus", eps=1e-3, recon_clamp=(-3.0, None))
    results = []
    for loss in (vae.loss, torch.compile(vae.loss, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        results.append(with_gradients(loss(bits, samples=3, bound=bound), vae))
    torch.testing.assert_close(*results)


# --- use --------------------------------------------------------------------------------------------------------


def test_encode_and_decode_are_distributions(x: Tensor) -> None:
    vae = make_vae()
    posterior = vae.encode(x)
    assert isinstance(posterior, DiagonalGaussian)
    mu, logvar = posterior
    torch.testing.assert_close(torch.cat([mu, logvar], 1), vae.encoder(x))
    generator = torch.Generator().manual_seed(5)
    z = posterior.sample(generator=generator)
    noise = (z - mu) / torch.exp(logvar / 2)
    again = functional.reparameterize(torch.zeros_like(mu), torch.zeros_like(mu), generator=generator.manual_seed(5))
    torch.testing.assert_close(noise, again)
    mean, recon_logvar = vae.decode(z)
    torch.testing.assert_close(torch.cat([mean, recon_logvar], 1), vae.decoder(z))


def test_a_sample_has_the_moments_of_its_distribution() -> None:
    p = DiagonalGaussian(torch.tensor([[1.0, -2.0]]).expand(100_000, 2), torch.tensor([0.0, math.log(9.0)]))
    drawn = p.sample(generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(0), torch.tensor([1.0, -2.0]), rtol=0, atol=0.05)
    torch.testing.assert_close(drawn.std(0), torch.tensor([1.0, 3.0]), rtol=0.02, atol=0)


def test_reconstruct_is_the_decoder_of_the_posterior_mean(x: Tensor) -> None:
    vae = make_vae()
    expected = vae.decoder(vae.encoder(x)[:, :LATENT])[:, :CHANNELS]
    torch.testing.assert_close(vae.reconstruct(x), expected)
    torch.testing.assert_close(vae.reconstruct(x), expected)  # no noise in it


def test_reconstruct_can_sample(x: Tensor) -> None:
    vae = make_vae()
    generator = torch.Generator().manual_seed(5)
    drawn = vae.reconstruct(x, sample=True, generator=generator)
    z = vae.encode(x).sample(generator=generator.manual_seed(5))
    torch.testing.assert_close(drawn, vae.decode(z).sample(generator=generator))
    assert not torch.equal(drawn, vae.reconstruct(x, sample=True))


def test_generate_decodes_the_prior() -> None:
    vae = make_vae()
    images = vae.generate(6, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(images, vae.decode(drawn_from_seed(5, 6, LATENT)).mu)
    sampled = vae.generate(6, sample=True, generator=torch.Generator().manual_seed(5))
    assert sampled.shape == images.shape
    assert not torch.equal(sampled, images)
    torch.manual_seed(5)
    first = vae.generate(6)
    torch.manual_seed(5)
    assert torch.equal(first, vae.generate(6))


def test_the_posteriors_floor_is_that_of_a_priors_tensors_and_not_of_its_numbers() -> None:
    for prior, variance in (((0.5, 0.3), math.exp(0.3)), ((0.5, torch.tensor([0.3])), math.exp(0.3) + 0.25)):
        vae = make_vae(eps=0.25, prior=prior)
        z = 0.5 + math.sqrt(variance) * drawn_from_seed(5, 6, LATENT)
        found = vae.generate(6, generator=torch.Generator().manual_seed(5))
        torch.testing.assert_close(found, vae.decode(z).mu)
        x = torch.rand(BATCH, *SHAPE)
        q = vae.encode(x)
        p = torch.distributions.Normal(0.5, math.sqrt(variance))
        expected = torch.distributions.kl_divergence(torch.distributions.Normal(q.mu, torch.exp(q.logvar / 2)), p)
        torch.testing.assert_close(vae(x).kl, expected.sum(1))


def test_generate_samples_with_the_likelihoods_variance() -> None:
    vae = VAE(packed_encoder(), mean_decoder(), LATENT, recon_logvar=math.log(0.25))
    with torch.no_grad():
        vae.decoder[0].weight.zero_()
    pixels = vae.generate(4000, sample=True, generator=torch.Generator().manual_seed(0)).detach()
    torch.testing.assert_close(pixels.std(0), torch.full(SHAPE, 0.5), rtol=0.06, atol=0)


def test_embed_gives_posterior_means(x: Tensor) -> None:
    vae = make_vae()
    assert torch.equal(vae.embed(x), vae.encode(x).mu)


def test_generate_follows_the_decoders_dtype() -> None:
    assert make_vae().double().generate(2).dtype == torch.float64
    without_parameters = VAE(Apply(lambda x: (x, x)), Apply(lambda z: z), LATENT, recon_logvar=0.0)
    assert without_parameters.generate(2).dtype == torch.float32


def test_a_generator_decides_the_noise(x: Tensor) -> None:
    vae = make_vae()
    generator = torch.Generator()
    first = vae.loss(x, generator=generator.manual_seed(1))
    torch.manual_seed(99)
    assert torch.equal(first, vae.loss(x, generator=generator.manual_seed(1)))
    assert not torch.equal(first, vae.loss(x, generator=generator.manual_seed(2)))
    assert torch.equal(vae(x, generator=generator.manual_seed(1)).z, vae(x, generator=generator.manual_seed(1)).z)


def test_the_state_dict_is_the_same_under_every_backend(x: Tensor) -> None:
    states, losses = [], []
    for name in fusedvae.backends():
        with fusedvae.use_backend(name):
            torch.manual_seed(0)
            vae = VAE(*networks.conv(SHAPE, LATENT, width=4), LATENT)
            torch.manual_seed(3)
            losses.append(vae.loss(x))
            states.append(vae.state_dict())
    for state, loss in zip(states[1:], losses[1:], strict=True):
        assert list(state) == list(states[0])
        assert all(torch.equal(state[key], states[0][key]) for key in state)
        torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=1e-4)


def test_a_state_dict_round_trip(x: Tensor, tmp_path: object) -> None:
    vae = VAE(packed_encoder(), mean_decoder(), LATENT, recon_logvar="learned")
    with torch.no_grad():
        vae.recon_logvar.fill_(-0.7)
    other = VAE(packed_encoder(), mean_decoder(), LATENT, recon_logvar="learned")
    torch.save(vae.state_dict(), f"{tmp_path}/vae.pt")
    other.load_state_dict(torch.load(f"{tmp_path}/vae.pt", weights_only=True))
    assert torch.equal(other.reconstruct(x), vae.reconstruct(x))
    assert other.recon_logvar.item() == vae.recon_logvar.item()


def test_training_improves_the_bound(x: Tensor) -> None:
    torch.manual_seed(0)
    vae = VAE(packed_encoder(), mean_decoder(), LATENT, recon_logvar="learned")
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.02)
    first = vae.loss(x).item()
    for _ in range(100):
        optimizer.zero_grad()
        loss = vae.loss(x)
        loss.backward()
        optimizer.step()
    assert loss.item() < first - 10
    assert vae.recon_logvar.item() < -0.5


def test_beta_may_be_learned_by_someone_else(x: Tensor) -> None:
    vae = make_vae()
    beta = torch.tensor(0.5, requires_grad=True)
    terms = vae.loss(x, beta=beta, return_terms=True)
    (gradient,) = torch.autograd.grad(terms.loss, beta)
    torch.testing.assert_close(gradient, terms.kl.detach())


def test_under_autocast_the_loss_is_float32(x: Tensor) -> None:
    vae = make_vae()
    torch.manual_seed(3)
    expected = vae.loss(x)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = vae.loss(x)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.2)
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in vae.parameters())


@pytest.mark.parametrize("recon_logvar", [None, "learned"])
def test_a_compiled_step_is_one_graph_and_agrees(recon_logvar: str | None) -> None:
    torch.manual_seed(0)
    pair = networks.mlp(SHAPE, LATENT, hidden=(16,), mean_only=recon_logvar is not None)
    vae = VAE(*pair, LATENT, recon_logvar=recon_logvar)
    x = torch.rand(BATCH, *SHAPE)
    results = []
    for loss in (vae.loss, torch.compile(vae.loss, fullgraph=True, backend="aot_eager")):
        vae.zero_grad()
        torch.manual_seed(3)
        terms = loss(x, return_terms=True)
        terms.loss.backward()
        results.append((tuple(terms), [parameter.grad.clone() for parameter in vae.parameters()]))
    torch.testing.assert_close(*results)


def test_repr_names_the_options() -> None:
    assert "latent_dim=2, recon_logvar=None" in repr(make_vae())
    spatial = VAE(nn.Identity(), nn.Identity(), (4, None, None), recon_logvar="learned")
    assert "latent_dim=(4, None, None)" in repr(spatial)
    assert "recon_logvar=tensor" in repr(spatial)
    bernoulli = VAE(nn.Identity(), nn.Identity(), 2, likelihood="bernoulli", scale="softplus")
    assert "latent_dim=2, likelihood='bernoulli', scale='softplus'" in repr(bernoulli)
    forms = {"recon_scale": "std", "recon_clamp": (0.1, None), "clamp": (-30, 20), "eps": 0.1, "prior_scale": "std"}
    vae = VAE(nn.Identity(), nn.Identity(), 2, recon_logvar=0.5, prior=(0.0, torch.ones(2)), **forms)
    assert repr(vae).splitlines()[1].strip() == (
        "latent_dim=2, recon_logvar=0.5, prior=(0.0, tensor), recon_scale='std', recon_clamp=(0.1, None), "
        "clamp=(-30, 20), eps=0.1, prior_scale='std'"
    )
    assert repr(ELBOLoss()) == "ELBOLoss(beta=1.0, reduction='batchmean')"
    criterion = ELBOLoss(torch.tensor(0.5), ("mean", "sum"), likelihood="l1", clamp=(-30, 20), grad_scale=2.0)
    shown = "beta=tensor, reduction=('mean', 'sum'), likelihood='l1', clamp=(-30, 20), grad_scale=2.0"
    assert repr(criterion) == f"ELBOLoss({shown})"
    assert repr(ELBOLoss(packed_dim=-1, prior_eps=0.1)) == (
        "ELBOLoss(beta=1.0, reduction='batchmean', prior_eps=0.1, packed_dim=-1)"
    )


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((len, nn.Identity(), 2), {}, TypeError, r"encoder: expected a torch.nn.Module, got builtin_function"),
        ((nn.Identity(), None, 2), {}, TypeError, r"decoder: expected a torch.nn.Module, got NoneType"),
        ((nn.Identity(), nn.Identity(), 0), {}, ValueError, r"latent_dim: expected positive sizes, got 0"),
        ((nn.Identity(), nn.Identity(), (4, -1)), {}, ValueError, r"latent_dim: .* got \(4, -1\)"),
        ((nn.Identity(), nn.Identity(), ()), {}, ValueError, r"latent_dim: .* got \(\)"),
        ((nn.Identity(), nn.Identity(), 2.0), {}, TypeError, r"latent_dim: .* got float"),
        ((nn.Identity(), nn.Identity(), True), {}, TypeError, r"latent_dim: .* got bool"),
        ((nn.Identity(), nn.Identity(), "2"), {}, TypeError, r"latent_dim: .* got str"),
        ((nn.Identity(), nn.Identity(), (2, 2.5)), {}, TypeError, r"latent_dim: .* got \(2, 2.5\)"),
        ((nn.Identity(), nn.Identity(), 2), {"recon_logvar": "fixed"}, ValueError, r"recon_logvar: .* 'fixed'"),
        ((nn.Identity(), nn.Identity(), 2), {"recon_logvar": [0.0]}, TypeError, r"recon_logvar: .* got list"),
        ((nn.Identity(), nn.Identity(), 2), {"recon_logvar": True}, TypeError, r"recon_logvar: .* got bool"),
        *[
            ((nn.Identity(), nn.Identity(), 2), options, error, message)
            for options, error, message in [
                ({"likelihood": "cauchy"}, ValueError, r"likelihood: expected one of 'gaussian', .* got 'cauchy'"),
                (
                    {"likelihood": "mse", "recon_logvar": 0.0},
                    ValueError,
                    r"recon_logvar: expected None, as the mse likelihood has no scale",
                ),
                ({"likelihood": "bernoulli", "recon_scale": "std"}, ValueError, r"recon_scale: .* bernoulli .* 'std'"),
                ({"likelihood": "laplace", "recon_scale": "std"}, ValueError, r"recon_scale: .*'logscale'.* 'std'"),
                ({"recon_clamp": 3.0}, TypeError, r"recon_clamp: expected a pair"),
                ({"recon_eps": -1.0}, ValueError, r"recon_eps: expected at least 0"),
                ({"scale": "sigma"}, ValueError, r"scale: expected one of 'logvar', .* 'sigma'"),
                ({"clamp": (2.0, -2.0)}, ValueError, r"clamp: expected low <= high"),
                ({"eps": "small"}, TypeError, r"eps: expected a number"),
                ({"prior_scale": "sigma"}, ValueError, r"prior_scale: expected one of"),
                ({"prior_clamp": (1,)}, TypeError, r"prior_clamp: expected a pair"),
                ({"prior_eps": -1.0}, ValueError, r"prior_eps: expected at least 0"),
                ({"prior": 0.0}, TypeError, r"prior: expected None, a pair or a torch.nn.Module, got float"),
                ({"prior": (0.0, None)}, TypeError, r"prior_logvar: expected a number or a tensor, got NoneType"),
                ({"prior": (torch.zeros(3), 0.0)}, ValueError, r"prior_mu: .* broadcasts to latent_dim \(2,\)"),
                ({"prior": (0.0, torch.zeros(4, 2))}, ValueError, r"prior_logvar: .* got \(4, 2\)"),
            ]
        ],
    ],
)
def test_wrong_arguments_are_named(arguments: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        VAE(*arguments, **options)


@pytest.mark.parametrize(
    ("encoder", "error", "message"),
    [
        (lambda x: x.new_zeros(5, 3), ValueError, r"encoder: expected a packed posterior of shape \(5, 4\).*\(5, 3\)"),
        (lambda x: x.new_zeros(5, 4, 1, 1), ValueError, r"encoder: .*latent_dim \(2,\); got \(5, 4, 1, 1\)"),
        (lambda x: x.new_zeros(4, 4), ValueError, r"encoder: expected .*\(5, 4\).* got \(4, 4\)"),
        (lambda x: (x.new_zeros(5, 4),) * 2, ValueError, r"encoder: expected mu of shape \(5, 2\).* got \(5, 4\)"),
        (
            lambda x: (x.new_zeros(5, 2), x.new_zeros(5, 1)),
            ValueError,
            r"encoder: expected logvar of shape \(5, 2\).* got \(5, 1\)",
        ),
        (lambda x: (x, x, x), TypeError, r"encoder: expected a tensor or a pair.* got tuple of \(Tensor, Tensor"),
        (lambda x: (x, None), TypeError, r"encoder: .* got tuple of \(Tensor, NoneType\)"),
        (lambda x: {"mu": x}, TypeError, r"encoder: .* got dict"),
    ],
)
@pytest.mark.parametrize("method", ["loss", "encode", "embed", "reconstruct", "forward"])
def test_what_an_encoder_gives_is_checked(
    x: Tensor, method: str, encoder: Callable, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(VAE(Apply(encoder), packed_decoder(), LATENT), method)(x)


@pytest.mark.parametrize(
    ("decoder", "recon_logvar", "error", "message"),
    [
        (mean_decoder(), None, ValueError, r"decoder: expected a mean and a log-variance.*even.*pass recon_logvar"),
        (packed_decoder(), 0.0, ValueError, r"decoder: expected a mean of shape \(5, 3, 4, 4\).*leave recon_logvar"),
        (AsPair(packed_decoder()), 0.0, TypeError, r"decoder: expected the mean only, .* got a pair"),
        (Apply(lambda z: z.new_zeros(4, 6, 4, 4)), None, ValueError, r"decoder: .*batch of 5.*\(4, 6, 4, 4\)"),
        (Apply(lambda z: z.new_zeros(5)), None, ValueError, r"decoder: .*\(batch, channels, \.\.\.\).*\(5,\)"),
        (
            Apply(lambda z: z.new_zeros(5, 6, 4, 5)),
            None,
            ValueError,
            r"decoder: expected a packed mean and log-variance of shape \(5, 6, 4, 4\).*got \(5, 6, 4, 5\)",
        ),
        (Apply(lambda z: None), None, TypeError, r"decoder: expected a tensor or a pair.* got NoneType"),
    ],
)
@pytest.mark.parametrize("method", ["loss", "reconstruct", "forward", "log_likelihood"])
def test_what_a_decoder_gives_is_checked(
    x: Tensor, method: str, decoder: nn.Module, recon_logvar: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(VAE(packed_encoder(), decoder, LATENT, recon_logvar=recon_logvar), method)(
            x, **({"samples": 1} if method == "log_likelihood" else {})
        )


@pytest.mark.parametrize(
    ("decoder", "likelihood", "error", "message"),
    [
        (AsPair(packed_decoder()), "bernoulli", TypeError, r"decoder: expected one tensor, as the bernoulli .* a pair"),
        (packed_decoder(), "l1", ValueError, r"decoder: expected a tensor of shape \(5, 3, 4, 4\) .*\(5, 6, 4, 4\)$"),
        (mean_decoder(), "laplace", ValueError, r"decoder: expected a mean and a scale packed .* pass recon_logvar"),
    ],
)
@pytest.mark.parametrize("method", ["loss", "reconstruct", "forward"])
def test_what_a_decoder_gives_is_checked_for_every_likelihood(
    x: Tensor, method: str, decoder: nn.Module, likelihood: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(VAE(packed_encoder(), decoder, LATENT, likelihood=likelihood), method)(x)


@pytest.mark.parametrize(
    ("prior", "error", "message"),
    [
        (lambda *c: None, TypeError, r"prior: expected a tensor or a pair of tensors .* got NoneType"),
        (lambda *c: torch.zeros(2 * LATENT), ValueError, r"prior: packed .* got shape \(4,\)"),
        (lambda *c: torch.zeros(1, 2 * LATENT + 2), ValueError, r"prior.*: .*expected .*broadcast to \(5, 2\)"),
        (lambda *c: (torch.zeros(3), torch.zeros(2)), ValueError, r"prior.*: .*broadcasts? to \(5, 2\), got .*\(3,\)"),
    ],
)
@pytest.mark.parametrize("call", [VAE.loss, VAE.forward, lambda vae, x: vae.generate(len(x))])
def test_what_a_prior_gives_is_checked(
    x: Tensor, call: Callable, prior: Callable, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(make_vae(prior=Apply(prior)), x)


def test_one_tensor_of_a_prior_is_packed_and_has_twice_the_latents_size(x: Tensor) -> None:
    for given in (torch.zeros(1, LATENT), torch.zeros(len(x), LATENT)):
        for call in (VAE.loss, VAE.forward, VAE.log_likelihood, lambda vae, x: vae.generate(len(x))):
            with pytest.raises(ValueError, match=r"^prior: expected one packed tensor to have twice the latent's size"):
                call(make_vae(prior=Apply(lambda given=given: given)), x)
    make_vae(prior=Apply(lambda: torch.zeros(1, 2 * LATENT))).loss(x)


@pytest.mark.parametrize("method", ["loss", "reconstruct", "forward"])
def test_what_lies_beside_a_decoders_mean_is_checked(x: Tensor, method: str) -> None:
    def error(kind: type[Exception], give: Callable, **options: Any) -> str:
        with pytest.raises(kind) as found:
            getattr(VAE(packed_encoder(), Apply(give), LATENT, **options), method)(x)
        return str(found.value)

    def wrong(z: Tensor) -> Tensor:
        return z.new_zeros(len(z), *SHAPE), z.new_zeros(len(z), 7)

    assert error(ValueError, wrong).startswith(
        "decoder: expected a log-variance that broadcasts to (5, 3, 4, 4), got (5, 7)"
    )
    assert error(ValueError, wrong, likelihood="laplace").startswith("decoder: expected a scale that broadcasts to")
    zinb: dict = {"likelihood": "zero_inflated_negative_binomial"}
    mean, theta = torch.ones(BATCH, *SHAPE), torch.ones(CHANNELS, 1, 1)
    assert error(TypeError, lambda z: (mean, mean), **zinb).endswith("zi_logits is missing")
    of_no_sample = VAE(packed_encoder(), Apply(lambda z: (mean, mean)), LATENT, **zinb)
    with pytest.raises(TypeError, match=r"zi_logits is missing$"):
        of_no_sample.generate(BATCH)
    packed = torch.ones(BATCH, 2 * CHANNELS, 4, 4)
    VAE(packed_encoder(), Apply(lambda z: (packed, mean)), LATENT, **zinb).loss(x)
    assert "zi_logits that broadcasts to (5, 3, 4, 4), got (7,)" in error(
        ValueError, lambda z: (mean, theta, z.new_zeros(7)), **zinb
    )
    even = torch.ones(BATCH, 4, 4, 4)
    assert error(ValueError, lambda z: (even, theta), **zinb).endswith("; of (mu, theta), zi_logits is missing")


def test_an_encoder_that_packs_tokens_is_told_to_give_a_pair() -> None:
    encoder = Apply(lambda x: x.repeat(1, 1, 2))
    with pytest.raises(ValueError, match=r"got \(2, 5, 6\); one that packs along another dimension gives a pair"):
        VAE(encoder, nn.Identity(), (5, 3), recon_logvar=0.0).loss(torch.rand(2, 5, 3))


def test_a_condition_that_is_missing_or_too_much_is_named(x: Tensor) -> None:
    labelled = VAE(*networks.mlp(SHAPE, LATENT, hidden=(8,), classes=4), LATENT)
    for call in (VAE.loss, VAE.forward, VAE.encode, VAE.embed):
        with pytest.raises(
            TypeError,
            match=r"^condition: expected labels of shape \(5,\), as the encoder is a LabelledEncoder; got None$",
        ):
            call(labelled, x)
    with pytest.raises(TypeError, match=r"^condition: .* shape \(3,\), as the decoder is a LabelledDecoder; got None$"):
        labelled.generate(3)
    with pytest.raises(TypeError, match=r"^condition: expected None, as the encoder \(Sequential\) takes none; got T"):
        make_vae().loss(x, torch.zeros(5))
    with pytest.raises(TypeError, match=r"^condition: expected one, as the prior \(Linear\) takes it; got None$"):
        make_vae(prior=nn.Linear(3, 2 * LATENT)).loss(x)


def test_a_program_of_any_batch_takes_what_lies_beside_a_decoders_mean() -> None:
    torch._dynamo.reset()
    vae = VAE(*networks.mlp((6,), LATENT, hidden=(8,)), LATENT, prior=Apply(lambda: torch.zeros(1, 2 * LATENT)))
    compiled = torch.compile(lambda x, noise: vae.loss(x, noise=noise), backend="eager", dynamic=True, fullgraph=True)
    for batch in (4, 7):
        operands = torch.rand(batch, 6), torch.randn(batch, LATENT)
        torch.testing.assert_close(compiled(*operands), vae.loss(operands[0], noise=operands[1]))


def test_errors_from_inside_of_a_module_are_its_own(x: Tensor) -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor, condition: object = None) -> Tensor:
            return len(3)  # type: ignore[arg-type]

    for condition in (None, 1):
        with pytest.raises(TypeError, match=r"^object of type 'int' has no len"):
            VAE(Wrong(), nn.Identity(), 2).loss(x, condition)


def test_an_even_number_of_channels_is_told_from_a_packed_output_by_the_data() -> None:
    # Means of two channels look like one mean and one log-variance until there is an x to compare with.
    decoder = nn.Sequential(nn.Linear(LATENT, 8), nn.Unflatten(1, (2, 2, 2)))
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(8, 2 * LATENT))
    x = torch.rand(3, 2, 2, 2)
    with pytest.raises(ValueError, match=r"\(3, 4, 2, 2\) for x of shape \(3, 2, 2, 2\), got \(3, 2, 2, 2\); if"):
        VAE(encoder, decoder, LATENT).loss(x)
    vae = VAE(encoder, decoder, LATENT, recon_logvar=0.0)
    vae.loss(x)
    assert vae.generate(5).shape == (5, 2, 2, 2)


def test_data_without_a_dimension_beside_the_batch_are_told_how_to_get_one() -> None:
    encoder = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 2 * LATENT))
    vae = VAE(encoder, nn.Linear(LATENT, 1), LATENT, recon_logvar=0.0)
    with pytest.raises(ValueError, match=r"x: expected shape \(batch, .*, got \(3,\); .*unsqueeze\(1\)"):
        vae.loss(torch.rand(3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda vae: vae.generate(0), ValueError, r"n: expected at least 1, got 0"),
        (lambda vae: vae.generate(2.0), TypeError, r"n: expected an integer, got float"),
        (
            lambda vae: vae.generate(2, generator=3),
            TypeError,
            r"generator: expected a torch.Generator or None, got int",
        ),
        (lambda vae: vae.loss([1.0]), TypeError, r"x: expected a tensor, got list"),
        (lambda vae: vae.encode(torch.tensor(1.0)), ValueError, r"x: expected a batch dimension"),
        (lambda vae: vae.loss(torch.rand(2, *SHAPE), reduction="median"), ValueError, r"reduction: .* got 'median'"),
        (lambda vae: vae.loss(torch.rand(2, *SHAPE), beta="1"), TypeError, r"beta: expected a number"),
        (lambda vae: vae.loss(torch.rand(2, *SHAPE), samples=2, beta="1"), TypeError, r"beta: expected a number"),
        (lambda vae: vae.loss(torch.rand(2, *SHAPE), samples=0), ValueError, r"samples: expected at least 1, got 0"),
        (lambda vae: vae.loss(torch.rand(2, *SHAPE), samples=None), TypeError, r"samples: .* got NoneType"),
        (lambda vae: vae(torch.rand(2, *SHAPE), bound="vi"), ValueError, r"bound: expected 'elbo' or 'iwae', got 'vi'"),
        (lambda vae: vae.loss(torch.rand(2, *SHAPE), grad_scale="2"), TypeError, r"grad_scale: expected a number"),
        (lambda vae: vae.loss(torch.rand(2, *SHAPE), samples=2, grad_scale=[2.0]), TypeError, r"grad_scale: .* list"),
        (lambda vae: vae.loss(torch.rand(2, *SHAPE), weight=0.5), TypeError, r"weight: expected a tensor"),
        (lambda vae: vae.loss(torch.rand(2, *SHAPE), weight=torch.ones(7)), ValueError, r"weight: .* broadcasts"),
        (lambda vae: vae.loss(torch.rand(2, *SHAPE), bound="iwae", beta=0.5), ValueError, r"beta: .*'iwae', got 0.5"),
        (
            lambda vae: vae.loss(torch.rand(2, *SHAPE), bound="iwae", beta=torch.tensor(1.0)),
            ValueError,
            r"beta: .* got a tensor",
        ),
        (
            lambda vae: vae.loss(torch.rand(2, *SHAPE), bound="iwae", reduction="mean"),
            ValueError,
            r"reduction: .* with bound='iwae', got 'mean'",
        ),
        (
            lambda vae: vae.loss(torch.rand(2, *SHAPE), bound="iwae", return_terms=True),
            ValueError,
            r"return_terms: expected False",
        ),
        (lambda vae: vae.log_likelihood(torch.rand(2, *SHAPE), samples=0), ValueError, r"samples: .* got 0"),
        (lambda vae: vae.log_likelihood(torch.rand(2, *SHAPE), chunk=2.5), TypeError, r"chunk: .* got float"),
        (
            lambda vae: vae.log_likelihood(torch.rand(2, *SHAPE), generator=[torch.Generator()] * 2),
            TypeError,
            r"generator: expected a torch.Generator or None, got list",
        ),
        (
            lambda vae: vae.loss(torch.rand(2, *SHAPE), samples=2, weight=torch.rand(2)),
            ValueError,
            r"weight: expected a shape that broadcasts to \(2, .*\), got \(2,\); one a sample is weight\.view\(-1",
        ),
        (
            lambda vae: vae.loss(torch.rand(3, *SHAPE), samples=2, weight=torch.rand(2, 1, *[1] * len(SHAPE))),
            ValueError,
            r"weight: expected a shape that broadcasts to \(3, ",
        ),
    ],
)
def test_wrong_calls_are_named(call: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(make_vae())


# --- under wrappers, exported, and with numbers of NumPy --------------------------------------------------------------


def test_the_output_has_the_loss_of_its_pass(x: Tensor) -> None:
    vae = VAE(packed_encoder(), mean_decoder(), LATENT, recon_logvar="learned")
    torch.manual_seed(5)
    expected = vae.loss(x, beta=0.3, return_terms=True, full=True)
    torch.manual_seed(5)
    found = vae(x).loss(x, beta=0.3, return_terms=True, full=True)
    parameters = list(vae.parameters())
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)
    for f, e in zip(
        torch.autograd.grad(found[0], parameters), torch.autograd.grad(expected[0], parameters), strict=True
    ):
        torch.testing.assert_close(f, e)


def test_the_learned_log_variance_is_no_scalar_and_comes_out_as_a_function_of_itself(x: Tensor) -> None:
    vae = VAE(packed_encoder(), mean_decoder(), LATENT, recon_logvar="learned")
    assert isinstance(vae.recon_logvar, nn.Parameter)
    assert vae.recon_logvar.shape == (1,)
    assert vae(x).recon_logvar.grad_fn is not None
    vae.load_state_dict({**vae.state_dict(), "recon_logvar": torch.tensor(0.7)})  # as versions before had it
    assert vae.recon_logvar.tolist() == [pytest.approx(0.7)]


def test_a_loss_past_a_wrapper_is_said_once(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr("fusedvae.vae.module._has_warned", False)
    vae = VAE(packed_encoder(), mean_decoder(), LATENT, recon_logvar=0.0)
    vae(x).loss(x)
    with torch.no_grad():
        vae.loss(x)
    vae._is_fsdp_managed_module = True  # as FSDP marks what it has sharded
    vae.loss(x)
    vae._is_fsdp_managed_module = False
    with pytest.warns(UserWarning, match=r"do not synchronise .* wrapped\(x\)\.loss\(x\)"):
        vae.loss(x)
    vae.loss(x)  # warnings are errors


@pytest.mark.parametrize("options", [{"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_the_loss_of_a_distributed_modules_output(bits: Tensor, tmp_path: Path, options: dict) -> None:
    results_of_processes(1, tmp_path / "store", _check_distributed, bits, options)


def _check_distributed(bits: Tensor, options: dict[str, bool]) -> None:
    vae = conditional_vae()
    vae.likelihood, vae.recon_scale, vae.recon_clamp = "laplace", "softplus", (None, 3.0)
    condition = torch.randn(BATCH, 3, dtype=torch.float64)
    wrapped = nn.parallel.DistributedDataParallel(vae, **options)
    for _ in range(2):
        torch.manual_seed(3)
        found = with_gradients(wrapped(bits, condition, samples=3, bound="iwae").loss(bits), vae)
    torch.manual_seed(3)
    expected = with_gradients(vae.loss(bits, condition, samples=3, bound="iwae"), vae)
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of its exporter
@pytest.mark.parametrize(
    "options",
    [
        {"recon_logvar": 0.0},
        {"likelihood": "bernoulli", "scale": "softplus", "prior": (0.5, 0.0)},
        {"likelihood": "laplace", "recon_logvar": 0.5, "recon_scale": "softplus", "recon_clamp": (None, 3.0)},
    ],
    ids=str,
)
def test_an_exported_vae_can_be_saved_and_moved(x: Tensor, options: dict) -> None:
    vae = VAE(packed_encoder(), mean_decoder(), LATENT, **options).eval()
    program, buffer = torch.export.export(vae, (x,)), io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    torch.manual_seed(3)
    expected = vae(x).loss(x, full=True)
    torch.manual_seed(3)
    torch.testing.assert_close(loaded(x).loss(x, full=True), expected)
    moved = move_to_device_pass(program, "meta")
    drawn = [node for node in moved.graph.nodes if "draw_seed" in str(node.target)]
    assert [str(node.args[0].kwargs["device"]) for node in drawn] == ["meta"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of its exporter
def test_an_exported_vae_can_be_compiled_ahead_of_time(x: Tensor, tmp_path: Path) -> None:
    vae = VAE(packed_encoder(), mean_decoder(), LATENT, recon_logvar="learned", clamp=(None, 1.0)).eval()
    program = torch.export.export(vae, (x,))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "vae.pt2"))
    torch.manual_seed(3)
    expected = vae(x)
    torch.manual_seed(3)
    found = torch._inductor.aoti_load_package(package)(x)
    torch.testing.assert_close(found[:6], expected[:6])
    torch.testing.assert_close(found.loss(x), expected.loss(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of its exporter
@pytest.mark.parametrize("options", [{"samples": 3}, {"reduction": "mean"}, {"samples": 2, "bound": "iwae"}], ids=str)
def test_an_exported_loss_is_of_any_batch(options: dict) -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vae = VAE(packed_encoder(), AsPair(packed_decoder()), LATENT)

        def forward(self, x: Tensor) -> Tensor:
            return self.vae.loss(x, **options)

    loss, batch = Loss(), torch.export.Dim("batch", min=2)
    x = torch.rand(9, *SHAPE)
    exported = torch.export.export(loss, (x[:5],), dynamic_shapes=({0: batch},), strict=False).module()
    torch.manual_seed(3)
    expected = loss(x)
    torch.manual_seed(3)
    torch.testing.assert_close(exported(x), expected)


def test_sizes_and_numbers_may_be_numpys() -> None:
    six, three = np.int64(6), np.int64(3)
    vae = VAE(*networks.mlp((six,), three, hidden=[np.int32(8)]), three)
    assert vae.generate(np.int64(2)).shape == (2, 6)
    assert VAE(nn.Identity(), nn.Identity(), 3, recon_logvar=np.float32(0.5)).recon_logvar == 0.5
    seed = np.uint32(2**32 - 5)
    assert torch.equal(fusedvae.random.normal((np.int64(2), 3), seed), fusedvae.random.normal((2, 3), 2**32 - 5))


def test_a_tensor_beta_may_become_a_number_and_back() -> None:
    t = torch.zeros(4, 3)
    for beta in (torch.tensor(0.0), nn.Parameter(torch.tensor(0.0)), 0.0):
        criterion = fusedvae.ELBOLoss(beta=beta)
        criterion.beta = 0.5
        assert criterion(t, t, t + 1, t).item() == 0.75
        assert not list(criterion.parameters())
        criterion.beta = torch.tensor(0.25)
        assert criterion(t, t, t + 1, t).item() == 0.375
        assert [name for name, _ in criterion.named_buffers()] == ["beta"]
        with pytest.raises(TypeError, match="beta"):
            criterion.beta = "one"


# --- the loss as a module ---------------------------------------------------------------------------------------------


def test_the_loss_as_a_module_takes_all_options_of_the_function() -> None:
    forms: dict = {
        "scale": "softplus",
        "clamp": (-1.0, 1.0),
        "eps": 0.1,
        "recon_scale": "scale",
        "recon_clamp": (0.5, None),
        "recon_eps": 0.2,
        "prior_scale": "std",
        "prior_clamp": (0.3, 0.9),
        "prior_eps": 0.05,
    }
    options: dict = {"likelihood": "laplace", "full": True, "reduction": ("mean", "weighted_mean"), "packed_dim": -1}
    moments, decoded, x = torch.randn(4, 2, 6), torch.randn(4, 5, 6), torch.randn(4, 5, 3)
    moments.requires_grad_()
    operands = {
        "prior_mu": torch.randn(3),
        "prior_logvar": torch.rand(2, 3),
        "extra": torch.rand(4, 1, 1),
        "weight": torch.rand(5, 1),
        "latent_weight": torch.rand(4, 2, 1),
    }
    results = []
    for function in (
        lambda *t, **k: functional.elbo_loss(*t, **k, **forms, **options, beta=0.3, grad_scale=2.0, return_terms=True),
        ELBOLoss(0.3, **forms, **options, grad_scale=2.0, return_terms=True),
    ):
        terms = function(decoded, x, moments, None, None, **operands)
        results.append([*terms, *torch.autograd.grad(terms.loss, moments)])
    for f, e in zip(*results, strict=True):
        assert torch.equal(f, e)
    logits = torch.randn(4, 3)
    loss = ELBOLoss(likelihood="bernoulli")(logits, logits > 0, None, None, kl=torch.ones(4), pos_weight=2.0)
    expected = nn.functional.binary_cross_entropy_with_logits(
        logits, (logits > 0).float(), pos_weight=torch.tensor(2.0), reduction="sum"
    )
    torch.testing.assert_close(loss, expected / 4 + 1)


def test_the_scale_of_gradients_may_be_assigned() -> None:
    t, mu = torch.zeros(4, 3), torch.ones(4, 3, requires_grad=True)
    for scale in (None, torch.tensor(4.0), 0.5):
        criterion = ELBOLoss(grad_scale=scale)
        for factor in (2.0, torch.tensor(8.0), None):
            criterion.grad_scale = factor
            loss = criterion(t, t, mu, t)
            assert loss.item() == 1.5
            (gradient,) = torch.autograd.grad(loss, mu)
            torch.testing.assert_close(gradient, torch.full((4, 3), 0.25 * (1.0 if factor is None else float(factor))))
        assert not list(criterion.buffers())
        with pytest.raises(TypeError, match="grad_scale"):
            criterion.grad_scale = "two"


def test_a_parametrized_beta_may_be_assigned() -> None:
    class Halved(nn.Module):
        def forward(self, beta: Tensor) -> Tensor:
            return beta / 2

        def right_inverse(self, beta: Tensor) -> Tensor:
            return beta * 2

    t = torch.zeros(4, 3)
    criterion = ELBOLoss(torch.tensor(1.0))
    nn.utils.parametrize.register_parametrization(criterion, "beta", Halved())
    criterion.beta = torch.tensor(0.25)
    assert criterion(t, t, t + 1, t).item() == 0.375
    assert criterion.parametrizations.beta.original.item() == 0.5
    with pytest.raises(TypeError, match="beta: expected a number"):
        criterion.beta = "one"
    nn.utils.parametrize.remove_parametrizations(criterion, "beta")
    criterion.beta = 0.5
    assert criterion(t, t, t + 1, t).item() == 0.75


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reduction": ("none", "sum")}, ValueError, r"reduction: expected 'none' for both"),
        ({"scale": "sigma"}, ValueError, r"scale: expected one of"),
        ({"clamp": 3}, TypeError, r"clamp: expected a pair"),
        ({"eps": -1}, ValueError, r"eps: expected at least 0"),
        ({"likelihood": "laplace", "recon_scale": "logvar"}, ValueError, r"recon_scale: expected one of 'logscale'"),
        ({"likelihood": "mse", "recon_eps": 0.1}, ValueError, r"recon_eps: expected none, as the mse likelihood"),
        ({"prior_scale": 3}, ValueError, r"prior_scale: expected one of"),
        ({"prior_eps": "1"}, TypeError, r"prior_eps: expected a number"),
        ({"grad_scale": torch.ones(2)}, ValueError, r"grad_scale: expected a number or a 0-dim float tensor"),
        ({"packed_dim": 1.0}, TypeError, r"packed_dim: expected an integer, got float"),
    ],
)
def test_wrong_options_of_the_module_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ELBOLoss(**options)


@pytest.mark.parametrize("bound", ["elbo", "iwae"])
@pytest.mark.parametrize("samples", [1, 3])
def test_a_part_of_a_batch_gets_the_noise_that_the_whole_would_give_it(samples: int, bound: str) -> None:
    vae = VAE(*fusedvae.networks.mlp((7,), 3, hidden=(8,)), 3)
    x = torch.rand(5, 7)
    noise = torch.randn(samples, 5, 3) if samples > 1 or bound == "iwae" else torch.randn(5, 3)
    for whole_options, part_options in (
        ({}, {"offset": 2 * 3}),
        ({"noise": noise}, {"noise": noise[..., 2:, :]}),
    ):
        if "offset" in part_options and samples > 1:
            continue  # samples lie in front of the batch: their parts are no stretch of the stream
        torch.manual_seed(1)
        whole = vae.loss(x, samples=samples, bound=bound, reduction="none", **whole_options)
        torch.manual_seed(1)
        part = vae.loss(x[2:], samples=samples, bound=bound, reduction="none", **part_options)
        torch.testing.assert_close(part, whole[2:])
        torch.manual_seed(1)
        out = vae(x[2:], samples=samples, bound=bound, **part_options)
        torch.testing.assert_close(out.loss(x[2:], reduction="none"), whole[2:])
