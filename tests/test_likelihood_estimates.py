"""Importance-weighted estimates of log p(x), where it is known: exactly of linear models, by quadrature of others."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from fusedvae import VAE

FEATURES, LATENT, VARIANCE = 3, 2, 0.5


class LinearGaussian(nn.Module):
    """The posterior of x ~ N(W z + b, s^2 I), z ~ N(m, I): exact but for its factors, and then off by a little."""

    def __init__(self, decoder: nn.Linear, prior_mu: Tensor, off: float = 0.0) -> None:
        super().__init__()
        self.decoder, self.prior_mu, self.off = decoder, prior_mu, off

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w = self.decoder.weight
        covariance = torch.linalg.inv(torch.eye(LATENT, dtype=w.dtype) + w.T @ w / VARIANCE)
        mean = self.prior_mu + (x - self.decoder(self.prior_mu)) @ w @ covariance / VARIANCE
        return mean + self.off, covariance.diagonal().log().expand_as(mean) + self.off


def linear_model(
    dtype: torch.dtype, off: float, prior: Tensor | None = None
) -> tuple[VAE, torch.distributions.Distribution]:
    """The VAE, and its p(x). The columns of W are orthogonal, so that the posterior is diagonal."""
    decoder = nn.Linear(LATENT, FEATURES).to(dtype)
    with torch.no_grad():
        decoder.weight.copy_(torch.tensor([[1.0, 0.5], [0.5, -1.0], [0.0, 0.0]]))
    mean = torch.zeros(LATENT, dtype=dtype) if prior is None else prior.to(dtype)
    vae = VAE(
        LinearGaussian(decoder, mean, off),
        decoder,
        LATENT,
        recon_logvar=math.log(VARIANCE),
        prior=None if prior is None else (mean, 0.0),
    )
    covariance = decoder.weight @ decoder.weight.T + VARIANCE * torch.eye(FEATURES, dtype=dtype)
    return vae, torch.distributions.MultivariateNormal(decoder(mean).detach(), covariance.detach())


@pytest.mark.parametrize("prior", [None, torch.tensor([1.0, -0.5])], ids=["N(0, I)", "another"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize("samples", [1, 50])
def test_with_the_exact_posterior_it_is_the_evidence(
    prior: Tensor | None, dtype: torch.dtype, tolerance: float, samples: int
) -> None:
    vae, evidence = linear_model(dtype, 0.0, prior)
    x = torch.randn(7, FEATURES, dtype=dtype)
    found = vae.log_likelihood(x, samples=samples)
    assert found.shape == (7,)
    assert found.dtype == dtype
    assert not found.requires_grad
    torch.testing.assert_close(found, evidence.log_prob(x), rtol=tolerance, atol=tolerance)
    bound = -vae.loss(x, samples=samples, bound="iwae", full=True, reduction="none")
    torch.testing.assert_close(bound, evidence.log_prob(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("prior", [None, torch.tensor([1.0, -0.5])], ids=["N(0, I)", "another"])
def test_with_a_near_posterior_it_is_the_evidence_within_its_error(prior: Tensor | None) -> None:
    vae, evidence = linear_model(torch.float64, 0.3, prior)
    x = torch.randn(5, FEATURES, dtype=torch.float64)
    samples = 20_000
    found = vae.log_likelihood(x, samples=samples)
    # The standard error of log mean w is that of w / mean w: from weights of their own.
    many = x.repeat(1000, 1)
    log_weights = -vae.loss(many, bound="iwae", full=True, reduction="none").detach().view(1000, 5)
    error = (log_weights - torch.logsumexp(log_weights, 0) + math.log(1000)).exp().std(0) / math.sqrt(samples)
    assert (error > 1e-4).all()  # or nothing was estimated
    assert ((found - evidence.log_prob(x)).abs() < 4 * error).all()


def test_bounds_rise_with_the_samples_up_to_the_evidence() -> None:
    vae, evidence = linear_model(torch.float64, 0.5)
    x = torch.tensor([[0.3, -1.0, 0.2]], dtype=torch.float64)
    many = x.expand(20_000, -1)
    bounds = [
        -vae.loss(many, samples=k, bound=bound, full=True).item()
        for k, bound in [(1, "elbo"), (2, "iwae"), (8, "iwae"), (32, "iwae")]
    ]
    assert bounds == sorted(bounds)
    assert all(b - a > 0.005 for a, b in pairwise(bounds))
    assert 0 < evidence.log_prob(x).item() - bounds[-1] < 0.04
    again = -vae.loss(many, samples=1, bound="iwae", full=True).item()
    assert again == pytest.approx(bounds[0], abs=0.06)  # that of one sample is the ELBO


@pytest.mark.parametrize("likelihood", ["bernoulli", "bernoulli_probs", "laplace", "l1", "mse"])
def test_others_agree_with_quadrature(likelihood: str) -> None:
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 4))
    if likelihood == "bernoulli_probs":
        decoder.append(nn.Sigmoid())
    decoder = decoder.double()
    encoder = nn.Linear(4, 2).double()
    options = {"recon_logvar": -0.5} if likelihood == "laplace" else {}
    vae = VAE(encoder, decoder, 1, likelihood=likelihood, **options)
    x = torch.rand(6, 4).round().double()

    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        out = decoder(grid)[:, None]
    density = {
        "bernoulli": lambda: torch.distributions.Bernoulli(logits=out),
        "bernoulli_probs": lambda: torch.distributions.Bernoulli(probs=out),
        "laplace": lambda: torch.distributions.Laplace(out, math.exp(-0.5)),
        "l1": lambda: torch.distributions.Laplace(out, 1.0),
        "mse": lambda: torch.distributions.Normal(out, math.sqrt(0.5)),
    }[likelihood]()
    log_joint = density.log_prob(x).sum(-1) + torch.distributions.Normal(0.0, 1.0).log_prob(grid)
    expected = torch.logsumexp(log_joint, 0) + math.log(24 / 4000)
    torch.testing.assert_close(vae.log_likelihood(x, samples=40_000), expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("is_packed", [False, True])
def test_chunks_bound_the_memory_and_change_nothing_else(is_packed: bool) -> None:
    vae, _ = linear_model(torch.float64, 0.3)
    if is_packed:
        vae.encoder = nn.Linear(FEATURES, 2 * LATENT).double()
    batches: list[int] = []
    vae.decoder.register_forward_hook(lambda module, arguments, output: batches.append(len(output)))
    x = torch.randn(4, FEATURES, dtype=torch.float64)

    def estimate(chunk: int | None) -> Tensor:
        return vae.log_likelihood(x, samples=100, chunk=chunk, generator=torch.Generator().manual_seed(5))

    vae.train()
    whole = estimate(None)
    assert vae.training
    torch.testing.assert_close(estimate(100), whole, rtol=1e-12, atol=1e-12)
    batches.clear()
    torch.testing.assert_close(estimate(7), whole, rtol=1e-12, atol=1e-12)
    assert max(batches) == 7 * 4
    assert not torch.equal(vae.log_likelihood(x, samples=100), whole)
    state = torch.get_rng_state()
    estimate(7)
    assert torch.equal(torch.get_rng_state(), state)  # all of the noise is the generator's


def test_chunks_are_bounded_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, _ = linear_model(torch.float64, 0.3)
    batches: list[int] = []
    vae.decoder.register_forward_hook(lambda module, arguments, output: batches.append(len(output)))
    x = torch.randn(4, FEATURES, dtype=torch.float64)
    for elements, samples in ((24, 2), (25, 2), (1, 1)):
        monkeypatch.setattr("fusedvae.vae.module._ELEMENTS_AT_A_TIME", elements)
        batches.clear()
        vae.log_likelihood(x, samples=5)
        assert max(batches) == samples * 4


def test_conditions_are_repeated_for_every_chunk() -> None:
    class Shift(nn.Module):
        def forward(self, z: Tensor, condition: Tensor) -> Tensor:
            return z + condition

    class Posterior(nn.Module):
        def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
            return condition + (x - 2 * condition) / 2, torch.full_like(x, math.log(0.5))

    class Prior(nn.Module):
        def forward(self, condition: Tensor) -> tuple[Tensor, Tensor]:
            return condition, torch.zeros_like(condition)

    # z ~ N(c, 1), x ~ N(z + c, 1): x ~ N(2 c, 2), and the posterior is N(c + (x - 2 c) / 2, 1 / 2)
    vae = VAE(Posterior(), Shift(), 1, recon_logvar=0.0, prior=Prior())
    x, condition = torch.randn(6, 1, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    evidence = torch.distributions.Normal(2 * condition, math.sqrt(2)).log_prob(x)[:, 0]
    torch.testing.assert_close(vae.log_likelihood(x, condition, samples=10, chunk=3), evidence)
