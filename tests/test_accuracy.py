"""What is small beside what it is computed of: no difference of larger numbers has taken its digits."""

from __future__ import annotations

import pytest
import torch
from conftest import TARGETS, Target

from fusedvae import functional

pytestmark = pytest.mark.parametrize("target", TARGETS, indirect=True)


@pytest.mark.parametrize("x", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("pos_weight", [1.0, 3.0])
def test_bernoulli_likelihoods_of_certain_logits(target: Target, x: float, pos_weight: float) -> None:
    """A background pixel of which a network is sure has a small gradient: e^a, and not 1 - (1 - e^a)."""
    a = torch.tensor([-80.0, -30.0, -20.0, -17.0, -12.0, -3.0, -1e-3, 0.0, 1e-3, 3.0, 12.0, 17.0, 20.0, 30.0, 80.0])
    a.requires_grad_()
    given, weight = torch.full_like(a, x), torch.tensor(pos_weight)
    value = functional.bernoulli_nll(a, given, pos_weight=weight, reduction="none", dim=(), backend=target.backend)
    (gradient,) = torch.autograd.grad(value.sum(), a)
    d = a.detach().double()
    hit, miss = torch.nn.functional.softplus(-d, threshold=100), torch.nn.functional.softplus(d, threshold=100)
    torch.testing.assert_close(value.double(), pos_weight * x * hit + (1 - x) * miss, rtol=1e-6, atol=0)
    right = (1 - x) * torch.sigmoid(d) - pos_weight * x * torch.sigmoid(-d)
    torch.testing.assert_close(gradient.double(), right, rtol=1e-6, atol=0 if x != 0.25 else 1e-7)


@pytest.mark.parametrize(
    "options",
    [{}, {"clamp": (-30.0, 20.0)}, {"clamp": (None, 20.0)}, {"scale": "logstd"}, {"scale": "logstd", "clamp": (-9, 9)}],
    ids=str,
)
@pytest.mark.parametrize("is_learned", [False, True], ids=["standard", "learned"])
def test_divergences_of_what_is_near(target: Target, is_learned: bool, options: dict) -> None:
    """Of a small d = log sigma^2 - log prior_sigma^2 it is about d^2 / 4, and not a difference of e^d and 1 + d."""
    d = torch.tensor([1e-5, -1e-4, 1e-4, -1e-3, 1e-3, -1e-2, 1e-2, -0.1, 0.1, -0.5, 0.5])
    prior = torch.full_like(d, 0.25 if is_learned else 0.0)
    spread, d = prior + d, (prior + d) - prior  # as much of it as float32 has
    spread.requires_grad_()
    distributions = [torch.zeros_like(d), spread, *([torch.zeros_like(d), prior] if is_learned else [])]
    divergence = functional.kl_normal if is_learned else functional.kl_standard_normal
    if is_learned and "scale" in options:
        options = {**options, "prior_scale": options["scale"]}
    value = divergence(*distributions, reduction="none", dim=(), backend=target.backend, **options)
    (gradient,) = torch.autograd.grad(value.sum(), spread)
    steps = 2.0 if options.get("scale") == "logstd" else 1.0
    d = steps * d.double()
    assert (value >= 0).all()
    assert ((value - 0.5 * (torch.expm1(d) - d)).abs() <= 1e-7 * d.abs()).all()
    # (PyTorch differentiates expm1 into e^d - 1.)
    atol = 1.3e-7 if target.backend == "reference" else 0.0
    torch.testing.assert_close(gradient.double(), steps * 0.5 * torch.expm1(d), rtol=1e-6, atol=atol)


@pytest.mark.parametrize(("rate", "x"), [(1e30, 1.0), (1e20, 3.0), (5e21, 1000.0), (1e-3, 0.0), (2.5, 3.0)])
def test_poisson_likelihoods_of_distant_counts(target: Target, rate: float, x: float) -> None:
    rates, counts = torch.full((2,), rate).requires_grad_(), torch.full((2,), x).requires_grad_()
    value = functional.poisson_nll(rates, counts, full=True, reduction="none", dim=(), backend=target.backend)
    d_rate, d_x = torch.autograd.grad(value.sum(), [rates, counts])
    r, k = rates.detach().double(), counts.detach().double()
    torch.testing.assert_close(value.double(), r - k * r.log() + torch.lgamma(k + 1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d_rate.double(), 1 - k / r, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d_x.double(), torch.digamma(k + 1) - r.log(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", ["std", "var", "softplus"])
@pytest.mark.parametrize("is_learned", [False, True], ids=["standard", "learned"])
def test_divergences_of_scales_without_logarithms_that_are_near(target: Target, is_learned: bool, scale: str) -> None:
    """As near 0 as those of torch.distributions are: the gradients of equal scales are 0, and no value is below."""
    step = torch.tensor([0.0, 1e-6, -1e-6, 1e-4, -1e-3, 1e-2, -0.1, 0.5])
    priors = torch.tensor([1.0] if not is_learned else [1.1, 5e-5, 0.037, 18637.6875])[:, None]
    if scale == "softplus":
        priors = torch.log(torch.expm1(priors.double().clamp(max=30))).float()
    prior, spread = (priors * torch.ones_like(step)).requires_grad_(), (priors * (1 + step)).requires_grad_()
    zeros, options = torch.zeros_like(spread), {"reduction": "none", "dim": (), "backend": target.backend}
    if is_learned:
        value = functional.kl_normal(zeros, spread, zeros, prior, scale=scale, prior_scale=scale, **options)
    else:
        value = functional.kl_standard_normal(zeros, spread, scale=scale, **options)
    given = [spread, prior] if is_learned else [spread]
    found = torch.autograd.grad(value.sum(), given)
    softplus = torch.nn.functional.softplus
    of = {"std": torch.square, "var": torch.clone, "softplus": lambda s: softplus(s).square()}[scale]
    exact = [t.detach().double().requires_grad_() for t in given]
    d = torch.log(of(exact[0])) - (torch.log(of(exact[1])) if is_learned else 0.0)
    right = 0.5 * (torch.expm1(d) - d)
    assert (value >= 0).all()
    # What a scale is off by in the last place counts times the derivative, (e^d - 1) / 2.
    assert ((value - right).abs() <= 3e-7 * torch.maximum(d.abs(), torch.expm1(d)) + 1e-13).all()
    for ours, theirs, at in zip(found, torch.autograd.grad(right.sum(), exact), exact, strict=True):
        if scale != "softplus" and is_learned:
            assert (ours[:, 0] == 0).all()
        # (A small softplus is as an exponential: the relative error of its slope counts times its input.)
        tolerance = 4e-7 * (1 + at.abs() if scale == "softplus" else 1) + 1e-6 * (theirs * at).abs()
        assert (((ours - theirs) * at).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_given_divergences_in_16_bits_are_those_of_32(target: Target, dtype: torch.dtype) -> None:
    x, kl = torch.zeros(37, 3), torch.linspace(30000, 40000, 37).to(dtype)
    for weight in (None, torch.ones(37, 3).requires_grad_()):  # that of the formula, too
        loss = functional.elbo_loss(x, x, None, None, kl=kl, weight=weight, reduction="sum", backend=target.backend)
        torch.testing.assert_close(loss, kl.double().sum().float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_samples_and_divergences_in_16_bits(target: Target, dtype: torch.dtype) -> None:
    """The sample and the gradients are as exact as their dtype; the divergence, a float32, to 14 bits, near 0 too."""
    steps = [1e-3, 1e-2, 0.1, 0.24, 0.25, 0.26, 1.0, 8.0]
    logvar = torch.tensor([-9.0, *(-step for step in steps), *steps]).to(dtype)[:, None].repeat(1, 64).requires_grad_()
    mu, d_z = torch.zeros_like(logvar).requires_grad_(), torch.rand_like(logvar)
    torch.manual_seed(5)
    z, kl = functional.latent(mu, logvar, backend=target.backend)
    d_mu, d_logvar = torch.autograd.grad([z, kl], [mu, logvar], [d_z, torch.ones_like(kl)])
    torch.manual_seed(5)
    noise = functional.latent(mu.detach().double(), torch.zeros_like(mu).double(), backend="reference").z
    d, ulp = logvar.detach().double(), torch.finfo(dtype).eps
    sampled, growth = torch.exp(0.5 * d) * noise, torch.expm1(d)
    assert ((z - sampled).abs() <= ulp * sampled.abs() + 2.0**-17 * torch.exp(0.5 * d)).all()
    right = (0.5 * (growth - d)).sum(1)
    assert ((kl - right).abs() <= 2.0**-14 * right + 1e-7 * d.abs().sum(1)).all()
    torch.testing.assert_close(d_mu.double(), d_z.double(), rtol=ulp, atol=0)
    parts = 0.5 * d_z.double() * sampled, 0.5 * growth
    size = parts[0].abs() + parts[1].abs()
    assert ((d_logvar - sum(parts)).abs() <= ulp * size + 2.0**-16 * torch.exp(0.5 * d)).all()
